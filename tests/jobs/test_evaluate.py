"""`tlscale evaluate`: the figures of a finished run again, on its own data and on other."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

import tlscale
from tests.small_runs import put_small_folder, put_small_idx, result, small_recipe
from tlscale.cli import main


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    idx = put_small_idx(folder / "idx")
    tlscale.run(small_recipe(folder / "recipe.yaml", idx, loss={"label_smoothing": 0.1}), folder / "run")
    return folder / "run"


def invoke(*words):
    return CliRunner().invoke(main, ["evaluate", *map(str, words)])


def test_it_gives_the_figures_of_the_run(run_folder):
    done = invoke(run_folder, "--json")
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout)
    expected = result(run_folder)
    for key in ("split", "num_images", "top1", "top5", "confusion", "per_class"):
        assert figures[key] == expected[key], key
    assert figures["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert json.loads((run_folder / "evaluation_test.json").read_text()) == figures


def test_tables_are_printed_without_json(run_folder):
    done = invoke(run_folder, "--split", "validation")
    assert done.exit_code == 0, done.output
    assert "validation images: top1" in done.stdout
    assert (run_folder / "evaluation_validation.json").is_file()


def test_the_classes_are_those_of_the_model_whatever_order_other_data_would_give_them(tmp_path):
    folder, copy = put_small_folder(tmp_path / "folder"), put_small_folder(tmp_path / "copy")
    classes = sorted((path.name for path in (folder / "train").iterdir()), reverse=True)
    data = {"source": "folder", "classes": classes}
    tlscale.run(small_recipe(tmp_path / "recipe.yaml", folder, data=data), tmp_path / "run")
    done = invoke(tmp_path / "run", "data.classes=null", f"data.path={copy}", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["confusion"] == result(tmp_path / "run")["confusion"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--split", "train", "data.path=nowhere"], "nowhere"),
        (["data.validation_fraction=0", "--split", "validation"], "no split"),
    ],
)
def test_what_is_not_there_exits_2(run_folder, words, message):
    done = invoke(run_folder, *words)
    assert done.exit_code == 2
    assert message in done.stderr


def test_a_folder_that_is_no_run_exits_2(tmp_path):
    done = invoke(tmp_path)
    assert done.exit_code == 2
    assert "is not a run folder" in done.stderr
