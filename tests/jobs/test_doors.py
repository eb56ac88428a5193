"""What a person meets at the front door: examples in each help page, and Python that never speaks of the shell."""

from __future__ import annotations

import inspect
import io
import json
import re
import shutil
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console as RichConsole

import tlscale
from tests.jobs.test_documented_commands import check_words, parts_of
from tests.small_runs import put_small_folder, small_recipe
from tlscale.cli import main
from tlscale.commands.run_result import RunResult
from tlscale.data.sources.tables import label_text
from tlscale.distributed.host import num_cores
from tlscale.distributed.settings import cpu_threads
from tlscale.errors import EXIT_BAD_INPUT, TlscaleError
from tlscale.tracking.console import Console
from tlscale.training.run_path import RunFacts, computing

OF_THE_SHELL = re.compile(r"--|command line|tlscale (?:run|plan|probe|predict|evaluate|export|compare|new)\b")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("door")
    data = put_small_folder(folder / "data", train=40, test=20)
    changes = {"data": {"source": "folder"}, "probe": {"kind": "knn"}, "backbone": {"name": "test_resnet"}}
    small_recipe(folder / "r.yaml", data, **changes)
    tlscale.run(folder / "r.yaml", folder / "run")
    return folder / "run"


# -- help -------------------------------------------------------------------------------------------------------------


def pages(command: click.Command, words: tuple[str, ...]) -> dict[tuple[str, ...], click.Command]:
    """Every command below one, by its words; a group that does nothing by itself is none."""
    found = {words: command} if words and not (isinstance(command, click.Group) and command.no_args_is_help) else {}
    for name, below in command.commands.items() if isinstance(command, click.Group) else ():
        found |= pages(below, (*words, name))
    return found


PAGES = pages(main, ())


@pytest.mark.parametrize("words", PAGES, ids=" ".join)
def test_each_help_page_has_two_examples_that_parse(words):
    said = CliRunner().invoke(main, [*words, "--help"], env={"COLUMNS": "200"}).output
    block = said.partition("Examples:\n")[2].partition("\n\n")[0]
    lines = [line.strip() for line in block.splitlines() if line.startswith("    ")]
    assert len(lines) >= 2, said
    verb = words if words != ("codes", "compute") else ("codes",)
    for line in lines:
        assert f"tlscale {' '.join(verb)}" in line
        for part in parts_of(line):
            if part[:1] == ["tlscale"]:
                check_words(part)


def test_the_pages_are_those_of_all_commands():
    assert {words[0] for words in PAGES} == set(main.commands)
    assert ("codes", "prune") in PAGES
    assert ("recipes", "copy") in PAGES


# -- results ----------------------------------------------------------------------------------------------------------


def test_what_a_result_has_not_is_an_attribute_error_that_names_what_it_has():
    several = {"task": "multi_label", "mean_average_precision": 0.5, "mean_average_precision_interval95": [0.4, 0.6]}
    figures = RunResult(several, Path("x"))
    assert (hasattr(figures, "top1"), hasattr(figures, "per_class")) == (False, False)
    assert getattr(figures, "top1", None) is None
    with pytest.raises(AttributeError, match="no 'top1'; there is 'mean_average_precision'"):
        _ = figures.top1
    assert (figures.mean_average_precision, figures.interval) == (0.5, (0.4, 0.6))
    one = RunResult({"top1": 0.5, "top1_interval95": None}, Path("x"))
    assert not hasattr(one, "mean_average_precision")
    with pytest.raises(AttributeError, match="no 'mean_average_precision'; there is 'top1'"):
        _ = one.mean_average_precision
    nothing = RunResult({**several, "mean_average_precision": None}, Path("x"))
    assert not hasattr(nothing, "mean_average_precision")
    assert RunResult({}, Path("x")).interval is None


# -- messages ---------------------------------------------------------------------------------------------------------

WRONG = {
    ("new", "data"): {"data": "nowhere"},
    ("new", "backbone"): {"data": "DATA", "backbone": "no_such_net"},
    ("new", "out"): {"data": "DATA", "out": "RECIPE"},
    ("load_recipe", "path"): {"path": "nowhere.yaml"},
    ("load_recipe", "overrides"): {"path": "RECIPE", "overrides": ["optim.lrr=1"]},
    ("load_recipe", "resumed"): {"path": "nowhere.yaml", "resumed": True},
    ("plan", "recipe"): {"recipe": "nowhere.yaml"},
    ("plan", "processes"): {"recipe": "RECIPE", "processes": -1},
    ("plan", "check_images"): {"recipe": "BROKEN", "check_images": True},
    ("run", "recipe"): {"recipe": "nowhere.yaml"},
    ("run", "out"): {"recipe": "RECIPE", "out": "RUN"},
    ("run", "resume"): {"recipe": "OTHER", "out": "RUN", "resume": True},
    ("run", "overwrite"): {"recipe": "RECIPE", "out": "RUN", "resume": True, "overwrite": True},
    ("load", "run"): {"run": "nowhere"},
    ("evaluate", "run"): {"run": "nowhere"},
    ("evaluate", "data"): {"run": "RUN", "data": "nowhere"},
    ("evaluate", "split"): {"run": "RUN", "split": "dev"},
    ("evaluate", "overrides"): {"run": "RUN", "overrides": ["compute.precison=bf16"]},
    ("evaluate", "name"): {"run": "RUN", "name": "../x"},
    ("evaluate", "out"): {"run": "RUN", "out": "RUN"},
    ("predict", "run"): {"run": "nowhere", "images": "DATA"},
    ("predict", "images"): {"run": "RUN", "images": "nomatch*.jpg"},
    ("predict", "out"): {"run": "RUN", "images": "DATA", "out": "x.txt"},
    ("predict", "top_k"): {"run": "RUN", "images": "DATA", "out": "x.csv", "top_k": 99},
    ("predict", "all_probabilities"): {"run": "RUN", "images": "DATA", "all_probabilities": True},
    ("predict", "resume"): {"run": "RUN", "images": "DATA", "resume": True},
    ("export", "run"): {"run": "nowhere", "to": "onnx", "out": "x"},
    ("export", "to"): {"run": "RUN", "to": "tflite", "out": "x"},
    ("export", "out"): {"run": "RUN", "to": "onnx", "out": "DATA", "with_training_codes": True},
    ("export", "images"): {
        **{"run": "RUN", "to": "onnx", "out": "x"},
        **{"images": ["nowhere.png"], "with_training_codes": True},
    },
    ("export", "licence"): {"run": "RUN", "to": "hub", "out": "x", "licence": "a <b>", "with_training_codes": True},
    ("export", "with_training_codes"): {"run": "RUN", "to": "onnx", "out": "x"},
    ("compare", "recipes"): {"recipes": ["nowhere"]},
    ("compare", "strategies"): {"recipes": "RECIPE", "strategies": ["codez"]},
    ("compare", "backbones"): {"recipes": "RECIPE", "backbones": ["no_such_net"]},
    ("compare", "sizes"): {"recipes": "RECIPE", "sizes": [0]},
    ("compare", "seeds"): {"recipes": "RECIPE", "seeds": [-1]},
    ("compare", "changes"): {"recipes": "RECIPE", "strategies": ["scratch"], "changes": ["x.y=1"]},
    ("compare", "min_steps"): {"recipes": "RECIPE", "min_steps": 3},
    ("compare", "out"): {"recipes": "RECIPE", "strategies": ["scratch"], "out": "DATA"},
    ("compare", "resume"): {"recipes": ["RUN"], "resume": True},
}
"""By function and argument: a call in which this argument is wrong. Words in capitals are places of the fixture."""
PUBLIC = [getattr(tlscale, name) for name in tlscale.__all__ if name not in ("TlscaleError", "__version__")]


@pytest.fixture
def places(run, tmp_path, monkeypatch) -> dict[str, Path]:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, tmp_path / "run")
    data, here = run.parent / "data", tmp_path / "broken"
    shutil.copytree(data, here)
    next(here.glob("train/*/*.png")).write_bytes(b"\x89PNG\r\n\x1a\n cut")
    recipe = tlscale.load_recipe(run.parent / "r.yaml")
    for name, one in {"broken": recipe.with_(**{"data.path": str(here)}), "other": recipe.with_(seed=7)}.items():
        (tmp_path / f"{name}.yaml").write_text(str(one))
    names = {"BROKEN": "broken.yaml", "OTHER": "other.yaml", "RUN": "run"}
    return {"DATA": data, "RECIPE": run.parent / "r.yaml", **{key: tmp_path / name for key, name in names.items()}}


def test_there_is_a_wrong_call_for_each_argument():
    every = {(one.__name__, name) for one in PUBLIC for name in inspect.signature(one).parameters}
    assert every == set(WRONG)


METHODS = {
    "predict": lambda model, images: model.predict(images, batch_size=0),
    "predict_nothing": lambda model, _: model.predict("nomatch*.jpg"),
    "features_layer": lambda model, images: model.features(images, layer="layerX"),
    "features_pool": lambda model, images: model.features(images, layer="layer3", pool="mean"),
    "features_batch": lambda model, images: model.features(images, batch_size=0),
    "to_csv_folder": lambda model, images: model.predict(images).to_csv("nodir/x.csv"),
    "to_csv_is_folder": lambda model, images: model.predict(images).to_csv("."),
    "to_csv_top_k": lambda model, images: model.predict(images).to_csv("x.csv", top_k=99),
    "to_pandas_top_k": lambda model, images: model.predict(images).to_pandas(top_k=99),
}


def placed(value: object, places: dict[str, Path]) -> object:
    if isinstance(value, list):
        return [placed(one, places) for one in value]
    return places.get(value, value) if isinstance(value, str) else value


def check_words_of(error: TlscaleError) -> None:
    for text in (str(error), error.problem, error.remedy or "", error.key or ""):
        assert not OF_THE_SHELL.search(text), text
    assert error.key is None or re.fullmatch(r"[\w.]+", error.key), "a name alone"
    assert error.exit_code == EXIT_BAD_INPUT


@pytest.mark.parametrize("name", METHODS)
def test_what_methods_tell_names_arguments(name, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TlscaleError) as caught:
        METHODS[name](tlscale.load(run), [next((run.parent / "data").rglob("*.png"))])
    check_words_of(caught.value)
    if "top_k" in name:
        assert caught.value.key == "top_k"
    if name == "to_csv_folder":
        assert (caught.value.key, caught.value.problem) == ("path", "there is no folder 'nodir'")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("case", WRONG, ids=".".join)
def test_what_python_is_told_names_arguments(case, places):
    function, argument = case
    given = {name: placed(value, places) for name, value in WRONG[case].items()}
    with pytest.raises(TlscaleError) as caught:
        getattr(tlscale, function)(**given)
    check_words_of(caught.value)
    assert caught.value.key in (None, argument) or "." in caught.value.key, "or a key of the recipe"


@pytest.mark.parametrize("verb", ["run", "probe"])
def test_both_front_doors_refuse_to_resume_and_to_replace(verb, places):
    words = [verb, str(places["RECIPE"]), "--out", str(places["RUN"]), "--resume", "--overwrite"]
    done = CliRunner().invoke(main, words)
    assert (done.exit_code, done.stderr) == (
        EXIT_BAD_INPUT,
        "tlscale: --resume resumes a run, --overwrite replaces it. Give one of them\n",
    )
    with pytest.raises(TlscaleError, match=r"^resume=True resumes a run, overwrite=True replaces it"):
        tlscale.run(places["RECIPE"], places["RUN"], resume=True, overwrite=True)
    assert (places["RUN"] / "result.json").is_file()


# -- predict ----------------------------------------------------------------------------------------------------------


def test_what_matches_nothing_is_told_once_and_one_image_is_one(run, tmp_path):
    image = next((run.parent / "data").rglob("*.png"))
    done = CliRunner().invoke(main, ["predict", str(run), str(tmp_path / "no*.jpg")])
    assert done.exit_code == EXIT_BAD_INPUT
    assert done.stderr.count("nothing matches") == 1
    done = CliRunner().invoke(main, ["predict", str(run), str(tmp_path / "no*.jpg"), str(image)])
    assert done.exit_code == 0
    assert done.stderr.count("nothing matches") == 1
    assert re.search(r"^1 image[,;]", done.stderr, re.MULTILINE)


@pytest.mark.parametrize(("file", "reader"), [("model.onnx", "ONNX Runtime"), ("model.pt2", "torch")])
def test_an_export_for_other_programs_is_told_as_such(file, reader, tmp_path):
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(TlscaleError, match=f"is an export, .*which {reader} reads.*Name the run") as caught:
        tlscale.load(tmp_path)
    assert "Has the run ended" not in str(caught.value)


# -- names of classes -------------------------------------------------------------------------------------------------


def test_labels_that_are_joined_can_be_told_apart():
    assert label_text([True, True], ("a|b", "c")) == r"a\|b|c"
    assert label_text([True, True], ("a\\", "c")) == "a\\\\|c"
    assert label_text(1, ("a|b", "c|d")) == "c|d"


def test_a_tab_in_a_name_does_not_break_a_table():
    screen = io.StringIO()
    Console(console=RichConsole(file=screen, width=80)).table("T", ("class", "n"), [("a\tb", 1), ("c", 2)])
    said = screen.getvalue()
    assert r"a\tb" in said
    assert "\t" not in said


# -- threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(num_cores() < 2, reason="a run of two threads takes two cores")
@pytest.mark.parametrize("own", [None, 1])
def test_predict_computes_with_the_threads_of_the_run(own, run, tmp_path):
    """As `OMP_NUM_THREADS=1` has it begin; else the last bits of some networks differ from those of the run."""
    recipe = tlscale.load_recipe(run.parent / "r.yaml").with_(**{"compute.threads": own})
    with cpu_threads(2):
        tlscale.run(recipe, tmp_path / "run")
    with cpu_threads(1):
        with computing(RunFacts.of(tmp_path / "run")):
            assert torch.get_num_threads() == (own or 2)
        assert torch.get_num_threads() == 1
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps({**info, "threads": num_cores() + 1}))
    with cpu_threads(1), computing(RunFacts.of(tmp_path / "run")):
        assert torch.get_num_threads() == 1
