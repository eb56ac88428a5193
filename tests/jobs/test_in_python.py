"""The verbs as Python functions: recipes or their files, results that a notebook shows, errors that speak Python."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest

import tlscale
from tests.small_runs import put_small_folder, result, small_recipe
from tlscale.commands.run_result import RunResult
from tlscale.errors import RecipeError, RunFolderError

EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunResult]:
    """A folder with a recipe file, its run, and its images, one class of which is named as a tag."""
    folder = tmp_path_factory.mktemp("made")
    data = put_small_folder(folder / "data", train=40, test=20)
    for role in ("train", "test"):
        (data / role / "Bag").rename(data / role / EVIL)
    changes = {"data": {"source": "folder"}, "probe": {"kind": "ridge"}, "backbone": {"name": "test_resnet"}}
    small_recipe(folder / "photos.yaml", data, **changes)
    return folder, tlscale.run(str(folder / "photos.yaml"), folder / "run")


def test_every_name_is_there_and_none_is_made_up():
    for name in tlscale.__all__:
        assert getattr(tlscale, name) is not None
    assert {"compare", "evaluate", "load", "new", "plan", "predict", "run"} < set(dir(tlscale))


def test_a_result_is_the_mapping_on_disk_with_attributes(made):
    folder, figures = made
    assert figures == result(folder / "run")
    assert json.loads(json.dumps(dict(figures))) == figures
    assert (figures.top1, list(figures.interval)) == (figures["top1"], figures["top1_interval95"])
    assert figures.per_class.keys() == figures["per_class"].keys()
    assert figures.folder == folder / "run"
    again = pickle.loads(pickle.dumps(figures))
    assert (again, again.folder) == (figures, figures.folder)


def test_a_result_is_shown_in_a_line_and_as_a_page_without_tags_of_others(made):
    _, figures = made
    assert repr(figures).startswith("RunResult('")
    assert f"top1 {figures.top1:.4f} (" in repr(figures)
    assert "\n" not in repr(figures)
    page = figures._repr_html_()
    assert "&lt;img src=x" in page
    assert "<img" not in page
    assert page.count("<tr>") == 1 + sum(row["num_images"] > 0 for row in figures.per_class.values())
    assert "\x1b" not in repr(RunResult({**figures, "majority": {"label": "a\x1b[2J\n", "top1": 0.5}}, Path("x")))


def test_a_result_without_an_interval_is_shown():
    """Of several labels an image, with all of them in one group."""
    figures = {"task": "multi_label", "mean_average_precision": 0.5, "mean_average_precision_interval95": None}
    figures |= {"mean_average_precision_interval95_by": {"groups": 1}, "chance": {"mean_average_precision": 0.3}}
    made = RunResult({**figures, "split": "test", "num_images": 6, "per_class": {}}, Path("x"))
    assert made.interval is None
    assert "mAP 0.5000 (no interval: too few images) on 6 test images, 0.3000 by chance" in repr(made)


def test_a_recipe_file_is_a_recipe_everywhere(made, capsys):
    folder, _ = made
    tlscale.plan(folder / "photos.yaml")
    from_file = capsys.readouterr().out
    tlscale.plan(tlscale.load_recipe(folder / "photos.yaml"))
    assert "test_resnet" in from_file
    assert capsys.readouterr().out.splitlines()[:10] == from_file.splitlines()[:10]
    with pytest.raises(RecipeError, match=r"there is no file '.*fotos.yaml'.*Did you mean '.*photos.yaml'"):
        tlscale.run(folder / "fotos.yaml", folder / "other")


def test_evaluate_gives_figures_like_those_of_a_run(made, tmp_path):
    folder, figures = made
    own = tlscale.evaluate(folder / "run")
    assert own.top1 == figures.top1
    assert own.folder == folder / "run" / "evaluations" / "test"
    other = tlscale.evaluate(folder / "run", data=folder / "data" / "train", out=tmp_path / "figures")
    assert json.loads((tmp_path / "figures" / "figures.json").read_text()) == other
    assert (other["num_images"], other.folder) == (40, tmp_path / "figures")
    assert repr(other).count("on 40 images") == 1


@pytest.mark.slow
def test_compare_gives_a_table(made, tmp_path):
    folder, _ = made
    recipe = tlscale.load_recipe(folder / "photos.yaml")
    found = tlscale.compare(recipe, strategies=["scratch"], sizes=[20, None], min_steps=1, out=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "compare.json").read_text()) == found
    assert [row["strategy"] for row in found.table if row["strategy"] == "scratch"] == ["scratch"] * 2
    assert found.folder == tmp_path / "out"
    assert repr(found).startswith("Comparison(2 runs; 'scratch' has top1 0.")
    assert found._repr_html_().count("<table>") == 1


# -- errors -----------------------------------------------------------------------------------------------------------


def test_errors_name_arguments_and_no_options(made, tmp_path):
    folder, _ = made
    with pytest.raises(RunFolderError) as caught:
        tlscale.run(folder / "photos.yaml", folder / "run")
    assert caught.value.remedy == "resume=True resumes it, overwrite=True replaces it, out=DIR writes elsewhere"
    assert "--" not in str(caught.value)
    shutil.copytree(folder / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    for use in (tlscale.load, lambda run: tlscale.predict(run, folder / "data" / "test")):
        with pytest.raises(RunFolderError, match=r"tlscale\.run\(\.\.\., resume=True\)") as caught:
            use(tmp_path / "run")
        assert "--" not in str(caught.value)
    with pytest.raises(RecipeError, match=r"^name: '../x' is not the name"):
        tlscale.evaluate(folder / "run", name="../x")
    with pytest.raises(RecipeError, match=r"^min_steps: it lengthens runs at the sizes of sizes"):
        tlscale.compare(folder / "photos.yaml", min_steps=3)
