"""A cross-validation shows a line a fold and the figures of the whole: what is the same in each fold is not shown."""

from __future__ import annotations

import io
import re

import pytest
from click.testing import CliRunner
from rich.console import Console as RichConsole

import tlscale
from tests.jobs.test_documented_commands import put_pictures
from tests.small_runs import small_recipe
from tlscale.cli import main
from tlscale.tracking.console import Console

TERMINAL = {"FORCE_COLOR": "1", "TERM": "xterm"}
TINY = {"backbone": {"name": "test_resnet", "weights": "none"}, "data": {"source": "folder"}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of 12 pictures, without a test split."""
    photos = tmp_path_factory.mktemp("data") / "photos"
    put_pictures(photos, 0)
    return photos


def run(recipe, out, **variables):
    done = CliRunner(env={"COLUMNS": "120", **variables}).invoke(main, ["run", str(recipe), "--out", str(out)])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_five_folds_of_a_new_recipe_are_forty_lines(folder, tmp_path):
    recipe = tlscale.new(folder, out=tmp_path / "r.yaml")
    assert recipe.evaluate.folds == 5
    lines = run(tmp_path / "r.yaml", tmp_path / "run").splitlines()
    assert len(lines) <= 40
    of_folds = [line for line in lines if line.startswith("fold ")]
    pattern = r"fold {} of 5: top1 [01]\.\d{{4}}  loss \S+  [78] images, by [^,]+, [0-9.]+, in \S+"
    assert len(of_folds) == 5
    for number, line in enumerate(of_folds, start=1):
        assert re.fullmatch(pattern.format(number), line), line
    assert sum(line.startswith("the model of all images: ") for line in lines) == 1
    assert sum(line.startswith("mean of the folds: top1 ") for line in lines) == 1
    assert not [line for line in lines if line.startswith(("codes of", "probe: "))]


def test_folds_that_train_have_bars_on_a_terminal_alone(folder, tmp_path):
    changes = {**TINY, "duration": "2 epochs", "evaluate": {"folds": 2}, "batch_size": 8}
    small_recipe(tmp_path / "r.yaml", folder, **changes)
    plain = run(tmp_path / "r.yaml", tmp_path / "run").splitlines()
    assert len([line for line in plain if line.startswith("fold ")]) == 2
    assert not [line for line in plain if re.match(r"step |validation|first step", line)]
    assert [line for line in plain if re.search(r"by step \d of \d, in", line)]
    shown = run(tmp_path / "r.yaml", tmp_path / "other", **TERMINAL)
    assert "━" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") > 0


def test_notes_that_differ_are_shown_behind_their_part_and_the_same_ones_once():
    now, screen = [0.0], io.StringIO()
    console = Console(console=RichConsole(file=screen, width=80), clock=lambda: now[0])
    for name in ("fold 1", "fold 2"):
        with console.part(name):
            console.say("the same")
            console.say(f"of {name}")
            console.say("WARNING: wrong", style="bold red")
            console.table("Not shown", ("a",), [(1,)])
            console.detail("too soon")
            now[0] += 31
            console.detail("still at work")
            console.detail("too soon again")
    console.say("the same")
    console.detail("a detail")
    assert screen.getvalue().splitlines() == [
        *("fold 1: the same", "fold 1: of fold 1", "fold 1: WARNING: wrong", "fold 1: still at work"),
        *("fold 2: of fold 2", "fold 2: WARNING: wrong", "fold 2: still at work"),
        *("the same", "a detail"),
    ]
