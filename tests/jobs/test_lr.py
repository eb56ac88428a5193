"""`tlscale lr`: a short training in which the learning rate grows."""

import math
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

import tlscale
from tests.small_runs import small_recipe
from tlscale.cli import main
from tlscale.commands.lr import lr
from tlscale.distributed.processes import start_processes
from tlscale.errors import RecipeError
from tlscale.tracking.console import Console
from tlscale.tracking.metrics_log import read_metrics
from tlscale.training.lr_range import lr_range


def test_its_first_steps_are_those_of_a_run(idx, tmp_path):
    """At rates that change nothing the losses are those of a run with such a rate: its images, its dropout."""
    small = {"head": [{"dropout": 0.3}, "linear"], "log_every": "1 steps", "data": {"augment": ["flip"]}}
    recipe = small_recipe(tmp_path / "r.yaml", idx, **small)
    with closing(start_processes(recipe.compute)) as processes:
        found = lr_range(recipe, processes, Console(enabled=False), steps=20, low=1e-12, high=2e-12)
    slow = {"duration": "20 steps", "optim": {"lr": 1e-12}, "schedule": {"decay": "constant"}}
    tlscale.run(small_recipe(tmp_path / "s.yaml", idx, **small, **slow), tmp_path / "run")
    lines = [line["loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "train"]
    assert found.losses == pytest.approx(lines[: len(found.losses)], rel=1e-5)
    assert len(found.losses) == 20
    with pytest.raises(RecipeError, match="never fell"):
        lr(recipe, tmp_path / "lr.png", steps=20, low=1e4, high=2e4)
    assert (tmp_path / "lr.png").exists()


@pytest.mark.parametrize("changes", [{}, {"freeze": ".*"}])
def test_it_stops_where_the_loss_is_beyond_all_measure(changes, idx, tmp_path):
    recipe = small_recipe(tmp_path / "r.yaml", idx, **changes)
    found = lr(recipe, tmp_path / "lr.png", steps=60, low=1e-5, high=1e4)
    assert 5 < len(found.losses) < 60
    assert found.lrs[0] == pytest.approx(1e-5)
    ratios = [b / a for a, b in zip(found.lrs, found.lrs[1:], strict=False)]
    assert ratios == pytest.approx([1e9 ** (1 / 59)] * len(ratios))
    assert found.lrs[0] / 10 < found.suggestion < found.lrs[-1]
    average = 0.0
    for number, (loss, smooth) in enumerate(zip(found.losses, found.smoothed, strict=True), start=1):
        average = 0.9 * average + 0.1 * loss
        assert smooth == pytest.approx(average / (1 - 0.9**number))
    assert all(map(math.isfinite, found.losses))
    assert Image.open(tmp_path / "lr.png").size[0] > 500
    assert not (tmp_path / "run").exists()


def test_the_command_line(idx, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_recipe(tmp_path / "r.yaml", idx)
    done = CliRunner().invoke(main, ["lr", "r.yaml", "--steps", "20", "--from", "1e-4", "--to", "10"])
    assert done.exit_code == 0, done.output
    assert "suggestion: optim.lr=" in done.output
    (picture,) = Path().glob("lr_*.png")
    assert picture.name in done.output


@pytest.mark.parametrize(
    ("changes", "options", "key"),
    [({"probe": {"kind": "ridge"}}, {}, "probe"), ({}, {"low": 1.0, "high": 0.1}, "lr"), ({}, {"steps": 3}, "lr")],
)
def test_what_has_no_rates_is_named(changes, options, key, idx, tmp_path):
    with pytest.raises(RecipeError) as caught:
        lr(small_recipe(tmp_path / "r.yaml", idx, **changes), tmp_path / "lr.png", **options)
    assert caught.value.key == key
    assert not (tmp_path / "lr.png").exists()
