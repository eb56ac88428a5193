"""Early stopping: where the figures say it, the same from any checkpoint, and the model of a run that went on."""

import json

import pytest

import tlscale
from tests.jobs.test_choice import CHANGES
from tests.small_runs import as_after, assert_same_bits, exported, last_checkpoint, lines, result, small_recipe, tensors

SELECT, PATIENCE = "loss", 3


def recipe_of(path, idx, patience=PATIENCE, **changes):
    evaluate = {"every": "1 steps", "select": SELECT, "choose": "best"}
    evaluate |= {} if patience is None else {"patience": patience}
    return small_recipe(path, idx, **{**CHANGES, "evaluate": evaluate, **changes})


@pytest.fixture(scope="module")
def patient(idx, tmp_path_factory):
    out = tmp_path_factory.mktemp("patient") / "run"
    tlscale.run(recipe_of(out.parent / "r.yaml", idx), out)
    return out


def test_it_stops_after_so_many_that_are_no_better(idx, patient, tmp_path, capsys):
    whole = tmp_path / "whole"
    tlscale.run(recipe_of(tmp_path / "r.yaml", idx, patience=None), whole)
    figures = {line["step"]: line[SELECT] for line in lines(whole, "evaluate")}
    best = {step: min(range(1, step + 1), key=lambda at: (figures[at], at)) for step in range(1, 17)}
    stop = next(step for step in range(1, 17) if step - best[step] >= PATIENCE)
    assert stop < 16
    found = result(patient)
    stopped = {"step": stop, "of_steps": 16, "best_step": best[stop], "patience": PATIENCE}
    assert found["stopped_early"] == {**stopped, "lr_factor": stop / 16}
    assert (found["steps"], found["best"]["step"], found["last"]["step"]) == (stop, best[stop], stop)
    assert lines(patient, "train") == lines(whole, "train")[:stop]
    assert lines(patient, "evaluate") == lines(whole, "evaluate")[:stop]
    saved = whole / "checkpoints" / f"step_{stop:08}" / "model.safetensors"
    assert_same_bits(tensors(last_checkpoint(patient) / "model.safetensors"), tensors(saved))
    assert "stopped_early" not in result(whole)


@pytest.mark.parametrize("at", [pytest.param(2, marks=pytest.mark.slow), pytest.param(-1, id="its last")])
def test_resumed_it_stops_where_it_did(idx, patient, tmp_path, capsys, at):
    step = at if at > 0 else result(patient)["steps"]
    out = as_after(step, patient, tmp_path / "run")
    tlscale.run(recipe_of(tmp_path / "r.yaml", idx), out, resume=True)
    said = " ".join(capsys.readouterr().out.split())
    stopped = result(patient)["stopped_early"]
    assert result(out)["stopped_early"] == stopped
    assert f"stopped early at step {stopped['step']} of 16" in said
    assert said.count("stopped early at") == 1
    assert lines(out) == lines(patient)
    assert_same_bits(exported(out), exported(patient))
    assert json.loads((out / "run.json").read_text())["total_steps"] == 16


@pytest.mark.slow  # a further run: of several stages
def test_of_several_stages_the_last_one_counts(idx, tmp_path):
    stages = [{"freeze": freeze, "duration": "6 steps", "lr": 1e-12} for freeze in (".*", "patch_embed.*")]
    evaluate = {"every": "1 steps", "patience": 2}
    recipe = small_recipe(tmp_path / "r.yaml", idx, stages=stages, evaluate=evaluate)
    tlscale.run(recipe, tmp_path / "run")
    assert result(tmp_path / "run")["stopped_early"]["step"] == 8
