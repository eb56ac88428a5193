"""A cross-validation with the real W&B, offline: its runs are one group, and the figures of the whole one run of it."""

from __future__ import annotations

import json

import pytest

from tests.coins import put_coins
from tests.small_runs import result, small_recipe, start
from tests.wandb_records import offline_runs

pytestmark = pytest.mark.slow  # W&B starts a service


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wandb")
    images = put_coins(folder / "images.parquet", {"train": 24}, classes=tuple("ab"))
    keys = {"backbone": {"name": "test_resnet", "weights": "none"}, "probe": {"kind": "ridge", "strengths": [1.0]}}
    data = {"source": "manifest", "path": str(images), "validation_fraction": 0.2}
    small_recipe(folder / "recipe.yaml", images, data=data, evaluate={"folds": 2}, track=["wandb"], **keys)
    return folder / "recipe.yaml"


def run(recipe, out, **variables):
    done = start("run", str(recipe), "--out", str(out), "--resume", log=recipe.parent / "log", **variables)
    assert done.wait(120) == 0, (recipe.parent / "log").read_text()
    return {name: offline_runs(out / name) for name in (".", "folds/1", "folds/2", "folds/all")}


@pytest.fixture(scope="module")
def tracked(recipe):
    return run(recipe, recipe.parent / "run")


def test_the_runs_are_one_group(recipe, tracked):
    run_id = json.loads((recipe.parent / "run" / "run.json").read_text())["id"]
    ((whole,), *parts) = tracked.values()
    assert [(one.run.display_name, one.run.job_type) for (one,) in parts] == [
        ("small-fold-1", "fold"), ("small-fold-2", "fold"), ("small-all", "model")
    ]  # fmt: skip
    assert (whole.run.display_name, whole.run.job_type, whole.run.run_id) == ("small", "cross-validation", run_id)
    assert {one.run.run_group for (one,) in tracked.values()} == {f"small-{run_id}"}
    assert {one.exit_code for (one,) in tracked.values()} == {0}


def test_the_figures_of_the_whole_are_the_summary_of_one_run(recipe, tracked):
    figures, summary = result(recipe.parent / "run"), tracked["."][0].summary
    assert summary["top1"] == figures["top1"]
    assert [summary["interval95/low"], summary["interval95/high"]] == figures["top1_interval95"]
    for key in ("top1_mean", "top1_sd", "num_folds", "num_repeats"):
        assert summary[f"folds/{key}"] == figures["folds"][key]
    assert tracked["."][0].rows() == []
    assert tracked["."][0].config["evaluate"]["folds"] == 2


def test_finished_again_it_is_the_same_run_and_complete_folds_get_no_other(recipe, tracked):
    (recipe.parent / "run" / "result.json").unlink()
    again = run(recipe, recipe.parent / "run")
    assert [len(runs) for runs in again.values()] == [2, 1, 1, 1]
    assert len({one.run.run_id for one in again["."]}) == 1


def test_a_group_and_job_type_of_the_user_hold(recipe):
    runs = run(recipe, recipe.parent / "own", WANDB_RUN_GROUP="mine", WANDB_JOB_TYPE="study")
    assert {(one.run.run_group, one.run.job_type) for (one,) in runs.values()} == {("mine", "study")}
