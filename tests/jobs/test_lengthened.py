"""`--resume` with a longer `duration`: the run that was so long from the start, or the words that start another."""

import json
import shlex
import shutil

import pytest
from click.testing import CliRunner

import tlscale
from tests.jobs.test_resume import stop_at
from tests.small_runs import (
    assert_same_bits,
    exported,
    last_checkpoint,
    lines,
    put_small_folder,
    result,
    small_recipe,
    tensors,
)
from tlscale.cli import main
from tlscale.errors import EXIT_BAD_INPUT, ResumeError, Stopped
from tlscale.recipe.load import diff_recipes
from tlscale.training.lengthening import lengthens, other_steps

CONSTANT = {"schedule": {"warmup": "3 steps", "decay": "constant"}}
CODES = {"backbone": {"name": "test_resnet"}, "freeze": r"(conv1|bn1|layer[12])\..*", "codes": {"keep": "always"}}
STAGES = [
    {"freeze": ".*", "duration": "3 steps"},
    {"duration": "1 epochs", "lr": 1e-3, "schedule": {"warmup": "0 steps", "decay": "constant"}},
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TLSCALE_CACHE", str(tmp_path / "cache"))


def ran(folder, idx, name, changes, resume=False):
    tlscale.run(small_recipe(folder / f"{name}.yaml", idx, **changes), folder / name, resume=resume)
    return folder / name


def longer_last(stages, duration):
    return [*stages[:-1], {**stages[-1], "duration": duration}]


KINDS = {
    "images": ({**CONSTANT, "duration": "1 epochs"}, {"duration": "2 epochs"}),
    "in other units": ({**CONSTANT, "duration": "5 steps", "optim": {"ema_decay": 0.9}}, {"duration": "2 epochs"}),
    "codes": ({**CONSTANT, **CODES, "duration": "1 epochs"}, {"duration": "3 epochs"}),
    "stages": ({"stages": STAGES}, {"stages": longer_last(STAGES, "2 epochs")}),
}


MARKS = {"in other units": [pytest.mark.long], "codes": [pytest.mark.slow], "stages": [pytest.mark.slow]}


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=MARKS.get(kind, ())) for kind in KINDS])
def test_a_finished_run_becomes_the_longer_one(kind, idx, tmp_path):
    changes, change = KINDS[kind]
    out = ran(tmp_path, idx, "run", changes)
    steps = result(out)["steps"]
    whole = ran(tmp_path, idx, "whole", {**changes, **change})
    ran(tmp_path, idx, "run", {**changes, **change}, resume=True)
    assert steps < result(out)["steps"] == result(whole)["steps"]
    for file in sorted(path.name for path in last_checkpoint(whole).glob("*.safetensors")):
        assert_same_bits(tensors(last_checkpoint(whole) / file), tensors(last_checkpoint(out) / file))
    assert_same_bits(exported(whole), exported(out))
    assert [line["loss"] for line in lines(out, "train")] == [line["loss"] for line in lines(whole, "train")]
    recorded = json.loads((out / "run.json").read_text())
    assert recorded["total_steps"] == result(whole)["steps"]
    assert [earlier["total_steps"] for earlier in recorded["lengthened"]] == [steps]
    # It is a run of its new length: complete, and of no other recipe than the longer one.
    assert ran(tmp_path, idx, "run", {**changes, **change}, resume=True) == out
    with pytest.raises(ResumeError, match=r"another recipe|cannot be made longer"):
        ran(tmp_path, idx, "run", changes, resume=True)


@pytest.mark.slow
def test_a_run_that_is_stopped_while_it_is_made_longer_is_no_complete_one(idx, tmp_path):
    changes = {**CONSTANT, "duration": "1 epochs"}
    out = ran(tmp_path, idx, "run", changes)
    longer = {**changes, "duration": "2 epochs"}
    with pytest.raises(Stopped), stop_at(out, 7):
        ran(tmp_path, idx, "run", longer, resume=True)
    ran(tmp_path, idx, "run", longer, resume=True)
    assert result(out)["steps"] == 10


def test_a_run_that_is_killed_between_two_files_as_it_is_made_longer_goes_on(idx, tmp_path):
    changes = {**CONSTANT, "duration": "1 epochs"}
    out, longer = ran(tmp_path, idx, "run", changes), {**changes, "duration": "2 epochs"}
    shutil.copytree(out, tmp_path / "done")
    ran(tmp_path, idx, "done", longer, resume=True)
    # run.json is written first; recipe.yaml is still that of the shorter run.
    shutil.copyfile(tmp_path / "done" / "run.json", out / "run.json")
    (out / "result.json").unlink()
    ran(tmp_path, idx, "run", longer, resume=True)
    assert result(out)["steps"] == 10
    for file in ("recipe.yaml", "run.json"):
        was, now = ((folder / file).read_text() for folder in (tmp_path / "done", out))
        assert "2 epochs" in now or json.loads(now)["lengthened"] == json.loads(was)["lengthened"]


@pytest.mark.slow  # four runs
def test_a_run_that_was_killed_as_it_was_made_longer_keeps_its_length_where_nobody_asks_for_more(idx, tmp_path):
    changes = {**CONSTANT, "duration": "1 epochs"}
    out, longer = ran(tmp_path, idx, "run", changes), {**changes, "duration": "3 epochs"}
    before = json.loads((out / "run.json").read_text())
    whole = result(out)
    shutil.copytree(out, tmp_path / "done")
    ran(tmp_path, idx, "done", longer, resume=True)
    for then in (changes, {**changes, "duration": "2 epochs"}):
        shutil.copyfile(tmp_path / "done" / "run.json", out / "run.json")
        (out / "result.json").unlink()
        ran(tmp_path, idx, "run", then, resume=True)
        record = json.loads((out / "run.json").read_text())
        if then is changes:
            same = ("recipe_sha256", "total_steps", "lengthened")
            assert {key: record.get(key) for key in same} == {key: before.get(key) for key in same}
            assert (result(out)["steps"], result(out)["choice"]) == (5, whole["choice"])
    earlier = {key: before[key] for key in ("total_steps", "recipe_sha256")}
    assert (record["total_steps"], record["lengthened"]) == (10, [earlier])
    assert result(out)["steps"] == 10


def test_a_run_that_is_made_longer_has_chosen_by_the_images_that_score_it(idx, tmp_path):
    """It was evaluated where it ended first and at its end, though no evaluation was due before that."""
    rare = {
        "schedule": {"warmup": "0 steps", "decay": "constant"},
        "evaluate": {"every": "99 steps"},
        "data": {"source": "folder", "path": str(tmp_path / "data")},
    }
    put_small_folder(tmp_path, train=60, test=20)
    (tmp_path / "train").rename(tmp_path / "data")
    out = ran(tmp_path, idx, "run", {**rare, "duration": "1 steps"})
    assert result(out)["selected_on"] is None
    ran(tmp_path, idx, "run", {**rare, "duration": "2 steps"}, resume=True)
    assert result(out)["selected_on"] == "validation"


def test_any_other_schedule_names_the_run_to_start_from(idx, tmp_path):
    """And what it says to type is a run that begins with those weights."""
    recipe = small_recipe(tmp_path / "r.yaml", idx, duration="3 steps")
    out = tmp_path / "a run"
    tlscale.run(recipe, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    line = ["run", str(tmp_path / "r.yaml"), "duration=6 steps"]
    refused = CliRunner().invoke(main, [*line, "--out", str(out), "--resume"])
    assert refused.exit_code == EXIT_BAD_INPUT
    said = " ".join(refused.output.split())
    assert "schedule.decay: cosine" in said
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    words = shlex.split(said[said.index("--out DIR") :].split("]")[0])[:3]
    again = CliRunner().invoke(main, [*line, "--out", str(tmp_path / "other"), words[2]])
    assert again.exit_code == 0, again.output
    assert json.loads((tmp_path / "other" / "run.json").read_text())["weights"]["origin"].startswith("the run ")


EARLIER = [{**STAGES[0], "duration": "4 steps"}, STAGES[1]]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (CONSTANT, None),
        ({"schedule": {"warmup": "0%", "decay": "constant"}}, None),
        ({"schedule": {"warmup": "5%", "decay": "constant"}}, "schedule.warmup: 5%"),
        ({}, "schedule.decay: cosine"),
        ({**CONSTANT, "evaluate": {"every": "50%"}}, "evaluate.every: 50%"),
        ({"stages": STAGES}, None),
        ({**CONSTANT, "stages": [*STAGES[::-1]]}, None),
        ({"stages": [*STAGES[::-1]]}, "schedule.decay: cosine"),
        ({**CONSTANT, "stages": [STAGES[0], {**STAGES[1], "schedule": {}}]}, "stages[1].schedule.decay: cosine"),
    ],
)
def test_what_makes_the_steps_of_a_longer_run_others(changes, says, idx, tmp_path):
    why = other_steps(small_recipe(tmp_path / "r.yaml", idx, **changes))
    assert why is None if says is None else f"with {says}" in why


@pytest.mark.parametrize(
    ("changes", "change", "is_so"),
    [
        (CONSTANT, {"duration": "3 epochs"}, True),
        (CONSTANT, {"duration": "99 steps"}, True),
        (CONSTANT, {"duration": "1 epochs"}, False),
        (CONSTANT, {"duration": "3 epochs", "seed": 3}, False),
        ({"stages": STAGES}, {"stages": longer_last(STAGES, "3 epochs")}, True),
        ({"stages": STAGES}, {"stages": EARLIER}, False),
        ({"stages": STAGES}, {"stages": [*STAGES, {"duration": "1 steps"}]}, False),
        ({"stages": STAGES}, {"stages": [STAGES[0], {**STAGES[1], "duration": "9 epochs", "lr": 1e-4}]}, False),
    ],
)
def test_only_the_length_of_the_last_stage_may_grow(changes, change, is_so, idx, tmp_path):
    stored = small_recipe(tmp_path / "r.yaml", idx, **changes)
    recipe = small_recipe(tmp_path / "s.yaml", idx, **{**changes, **change})
    assert lengthens(stored, recipe, diff_recipes(stored, recipe)) is is_so


def test_a_run_that_cannot_be_made_longer_stays_as_it_is(idx, tmp_path):
    changes = {**CONSTANT, "duration": "1 epochs"}
    out = ran(tmp_path, idx, "run", changes)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for change, says in (
        ({"duration": "2 epochs", "seed": 3}, "seed: 0 -> 3"),
        ({"duration": "4 steps"}, "4 steps are 4 steps, and it has 5"),
    ):
        with pytest.raises(ResumeError) as caught:
            ran(tmp_path, idx, "run", {**changes, **change}, resume=True)
        assert says in str(caught.value)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_run_whose_checkpoints_are_gone_is_not_begun_again(idx, tmp_path):
    changes = {"schedule": {"warmup": "0 steps", "decay": "constant"}, "duration": "1 steps"}
    out = ran(tmp_path, idx, "run", changes)
    shutil.rmtree(out / "checkpoints")
    with pytest.raises(ResumeError, match="no checkpoint of it is left"):
        ran(tmp_path, idx, "run", {**changes, "duration": "2 steps"}, resume=True)
    assert result(out)["steps"] == 1


@pytest.mark.slow
def test_a_run_that_is_not_finished_becomes_longer_too_or_is_finished_first(idx, tmp_path):
    for name, changes in (("constant", CONSTANT), ("cosine", {})):
        out = tmp_path / name
        with pytest.raises(Stopped), stop_at(out, 3):
            ran(tmp_path, idx, name, {**changes, "duration": "1 epochs"})
        longer = {**changes, "duration": "2 epochs"}
        if name == "cosine":
            with pytest.raises(ResumeError, match="another recipe"):
                ran(tmp_path, idx, name, longer, resume=True)
            continue
        ran(tmp_path, idx, name, longer, resume=True)
        assert result(out)["steps"] == 10
        assert_same_bits(exported(ran(tmp_path, idx, "whole", longer)), exported(out))
