"""A real run with the real W&B, offline: stopped, resumed, and read back record by record."""

import json
import signal

import pytest
import yaml

from tests.small_runs import logged, put_small_idx, small_recipe, start, wait_until
from tests.wandb_records import offline_runs
from tlscale.errors import EXIT_STOPPED
from tlscale.tracking.metrics_log import read_metrics

CANARY = "canary0123456789abcdef0123456789abcdef00"  # 40 characters, as an API key has
STEPS = 40


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder of a run that was stopped by SIGTERM and resumed, each in a process of its own."""
    folder = tmp_path_factory.mktemp("wandb")
    data = put_small_idx(folder / "data")
    changes = {"duration": f"{STEPS} steps", "track": ["wandb"], "wandb": {"project": "digits", "tags": ["small"]}}
    small_recipe(folder / "recipe.yaml", data, **changes)
    words = ["run", str(folder / "recipe.yaml"), "optim.lr=1e-3", "--out", str(folder / "run"), "--resume"]
    secrets = {"HUB_TOKEN": CANARY, "AWS_SECRET_ACCESS_KEY": CANARY}
    first = start(*words, log=folder / "log1", **secrets)
    wait_until(logged(folder / "run", 7), first)
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == EXIT_STOPPED, (folder / "log1").read_text()
    second = start(*words, log=folder / "log2", **secrets)
    assert second.wait(90) == 0, (folder / "log2").read_text()
    return folder / "run"


def test_one_run_in_two_segments(out):
    runs = offline_runs(out)
    assert len(runs) == 2
    assert len({run.run.run_id for run in runs}) == 1
    assert {(run.run.project, run.run.display_name) for run in runs} == {("digits", "small")}
    assert list(runs[0].run.tags) == ["small"]
    assert [run.exit_code for run in runs] == [EXIT_STOPPED, 0]
    state = json.loads((out / "checkpoints" / f"step_{STEPS:08}" / "state.json").read_text())
    assert state["clock"]["wandb_run_id"] == runs[0].run.run_id


def test_the_config_is_the_recipe_and_what_made_the_run(out):
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    record = json.loads((out / "run.json").read_text())
    for run in offline_runs(out):
        # But for where the data lie: paths hold names of users. (tests/unit/tracking/test_places.py)
        for key, value in {**recipe, "data": {**recipe["data"], "path": "data"}}.items():
            assert run.config[key] == value, key
        assert run.config["optim"]["lr"] == 1e-3
        assert run.config["run"]["git"] == record["git"]
        assert len(run.config["run"]["git"]["commit"]) == 40
        assert run.config["run"]["world_size"] == 1


def test_every_figure_of_the_log_is_there_once_with_its_value(out):
    rows = [row for run in offline_runs(out) for row in run.rows()]
    sent = {}
    for row in rows:
        for key, value in row.items():
            if key != "trainer/step":
                assert sent.setdefault((row["trainer/step"], key), value) == value
    logged_figures = {
        (record["step"], f"{record['kind']}/{key}"): value
        for record in read_metrics(out / "metrics.jsonl")
        for key, value in record.items()
        if key not in ("kind", "step", "split")
    }
    assert {step for step, _ in logged_figures} == set(range(1, STEPS + 1))
    assert sent.keys() == logged_figures.keys()
    assert [key for key in sent if sent[key] != pytest.approx(logged_figures[key], rel=1e-12)] == []


def test_the_step_never_goes_back(out):
    steps = [row["trainer/step"] for run in offline_runs(out) for row in run.rows()]
    assert steps == sorted(steps)
    assert steps.count(1) == 1
    assert steps[-1] == STEPS


def test_the_summary_is_the_result(out):
    figures = json.loads((out / "result.json").read_text())
    summary = offline_runs(out)[-1].summary
    assert summary["top1"] == figures["top1"]
    assert summary["num_images"] == figures["num_images"] == 37


def test_the_parts_of_the_time_are_in_the_summary(out):
    figures = json.loads((out / "result.json").read_text())
    summary = offline_runs(out)[-1].summary
    found = {key.removeprefix("seconds/"): value for key, value in summary.items() if key.startswith("seconds/")}
    assert found == figures["seconds"]
    assert sum(found.values()) == pytest.approx(summary["wall_s"], abs=0.01)


def test_no_secret_is_in_any_file(out):
    files = [path for path in out.rglob("*") if path.is_file()]
    assert any("wandb" in path.parts for path in files)
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []
