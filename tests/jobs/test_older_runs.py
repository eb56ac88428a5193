"""Run folders, checkpoints and codes that an older tlscale left still load, evaluate and resume, in another folder."""

import json
import re
import shutil

import pytest
from click.testing import CliRunner

import tlscale
from tests.older_runs import put_older_runs
from tests.small_runs import exported, result, small_recipe
from tlscale.cli import main
from tlscale.codes.store import CodesStore
from tlscale.commands.evaluate import evaluate_run
from tlscale.errors import DataError, ResumeError
from tlscale.recipe.load import dump_recipe

FINISHED = ("trained", "views", "full", "probe", "probe_no_test", "knn")
STOPPED = ("ema", "on_codes", "staged", "distilled", "sharded")
REFUSED = {"weighted": "weights-beside-smoothing", "decayed": "layer-decay-of-timm"}


@pytest.fixture
def older(tmp_path, monkeypatch):
    """A copy of all that there is, as the working folder and with its own cache."""
    folder = put_older_runs(tmp_path / "older")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TLSCALE_CACHE", str(folder / "cache"))
    return folder


def recipe_of(name):
    # One process here; the sharded checkpoint is of two.
    return tlscale.load_recipe(f"recipes/{name}.yaml", ["compute.engine=auto"] if name == "sharded" else [])


def test_all_of_it_is_tested(older):
    assert sorted(path.name for path in (older / "runs").iterdir()) == sorted([*FINISHED, *STOPPED, *REFUSED])


@pytest.mark.parametrize("name", FINISHED)
def test_a_finished_run_loads_and_has_its_figures(name, older):
    figures = result(older / "runs" / name)
    model = tlscale.load(f"runs/{name}")
    assert model.classes == ("board", "ring", "slope")
    assert None not in model.predict("photos").labels
    if name == "probe_no_test":  # fitted to all that it could be scored on; older versions scored it all the same
        with pytest.raises(DataError, match="no image left to score it on"):
            evaluate_run(f"runs/{name}")
        return
    again = evaluate_run(f"runs/{name}")
    for key in ("split", "num_images", "confusion"):
        assert again[key] == figures[key], key
    # That of `full` had label smoothing in it when it was written; what is reported is plain cross-entropy now.
    assert (again["loss"] == pytest.approx(figures["loss"], rel=1e-4)) == (name != "full")


@pytest.mark.parametrize("name", FINISHED)
def test_a_finished_run_is_complete(name, older):
    before = (older / "runs" / name / "result.json").read_text()
    assert tlscale.run(recipe_of(name), f"runs/{name}", resume=True) == json.loads(before)
    assert (older / "runs" / name / "result.json").read_text() == before


@pytest.mark.parametrize("name", STOPPED)
def test_an_unfinished_run_ends_as_it_did(name, older):
    figures = tlscale.run(recipe_of(name), f"runs/{name}", resume=True)
    end = json.loads((older / "ends.json").read_text())[name]
    for key in ("split", "num_images", "steps", "confusion"):
        assert figures[key] == end[key], key
    assert figures["loss"] == pytest.approx(end["loss"], rel=1e-4)
    log = [json.loads(line) for line in (older / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if line["kind"] == "train"] == list(range(1, 9)), "resumed, not begun again"


@pytest.mark.parametrize("name", REFUSED)
def test_an_unfinished_run_that_would_end_as_another_is_refused(name, older):
    before = (older / "runs" / name / "run.json").read_text()
    with pytest.raises(ResumeError) as refused:
        tlscale.run(recipe_of(name), f"runs/{name}", resume=True)
    if recipe_of(name).backbone.weights == "none" and "its weights are not those" in str(refused.value):
        # Frozen at random, by another kind of CPU: refused for that before anything else.
        assert "on another kind of CPU" in refused.value.remedy
    else:
        assert re.search(f"another training from step \\d+ on:\n  {REFUSED[name]}: ", str(refused.value))
    assert (older / "runs" / name / "run.json").read_text() == before


def test_codes_of_each_kind_are_whole(older):
    store = CodesStore()
    assert store.verify(None) == []
    keys = [entry.key for entry in store.entries()]
    assert {tuple(key["layers"]) for key in keys} == {
        ("layer3 avg", "layer3 max", "penultimate"),
        ("backbone.layer2",),
        ("logits",),
    }
    assert {key["transform"].get("view") for key in keys} == {None, 0, 1}


def test_codes_that_are_there_are_those_that_a_new_run_computes(older):
    """A probe on what is kept and one that computes everything again fit the same classifier."""
    found = tlscale.run(recipe_of("probe"), "found")
    shutil.rmtree(older / "cache")
    fresh = tlscale.run(recipe_of("probe"), "fresh")
    assert fresh["codes"]["num_computed"] == 48
    assert found["loss"] == pytest.approx(fresh["loss"], rel=1e-4)
    assert exported(older / "found").keys() == exported(older / "fresh").keys()


def test_a_key_that_is_refused_today_as_without_effect_is_none_where_the_run_began_with_it(idx, tmp_path):
    recipe = small_recipe(tmp_path / "r.yaml", idx, duration="2 steps", codes={"keep": "never"})
    idle = recipe.model_copy(update={"codes": recipe.codes.model_copy(update={"disk_gib": 5.0})})
    tlscale.run(idle, tmp_path / "run")  # not checked by the reader, as an older version did not
    (tmp_path / "r.yaml").write_text(dump_recipe(idle))
    command = ["run", str(tmp_path / "r.yaml"), "--resume", "--out"]
    resumed = CliRunner().invoke(main, [*command, str(tmp_path / "run")])
    assert resumed.exit_code == 0, resumed.output
    fresh = CliRunner().invoke(main, [*command, str(tmp_path / "other")])
    assert fresh.exit_code == 2
    assert "codes.disk_gib" in fresh.output
