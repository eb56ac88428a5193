"""Comparisons of real runs on a few real images: their table, their files, going on, and what is refused at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

import tlscale
from tests.small_runs import put_small_idx, small_recipe
from tlscale.commands.compare import compare
from tlscale.errors import DataError, RecipeError, RunFolderError, TlscaleError
from tlscale.recipe.load import load_recipe
from tlscale.recipe.schema import Recipe
from tlscale.recipe.strategies import STRATEGIES


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, idx: Path) -> Path:
    """A file of weights to transfer, which have learned a little."""
    folder = tmp_path_factory.mktemp("weights")
    tlscale.run(small_recipe(folder / "first.yaml", idx, backbone={"name": "test_resnet"}), folder / "run")
    return next((folder / "run" / "model").glob("*.safetensors"))


@pytest.fixture
def recipe_file(tmp_path: Path, idx: Path, weights: Path) -> Path:
    """Freezes everything, four epochs at a size."""
    path = tmp_path / "small.yaml"
    small_recipe(path, idx, backbone={"weights": str(weights), "name": "test_resnet"}, freeze=".*", duration="4 epochs")
    return path


def recipe_of(folder: Path) -> Recipe:
    return load_recipe(folder / "recipe.yaml")


def by_variant(figures: dict) -> dict:
    return {(run["variant"], run["size"], run["seed"]): run for run in figures["runs"]}


# -- the strategies ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, idx: Path, weights: Path) -> tuple[Path, dict]:
    """All strategies at 40 and 80 images."""
    folder = tmp_path_factory.mktemp("compared")
    backbone = {"weights": str(weights), "name": "test_resnet"}
    small_recipe(folder / "small.yaml", idx, backbone=backbone, freeze=r"(conv1|bn1)\..*", duration="4 epochs")
    figures = compare([folder / "small.yaml"], run=tlscale.run, sizes=[40, 80], min_steps=12, out=folder / "out")
    return folder / "out", figures


def test_every_strategy_at_every_size_has_figures(compared):
    out, figures = compared
    runs = by_variant(figures)
    assert sorted(runs) == sorted((strategy, size, 0) for strategy in STRATEGIES for size in (40, 80))
    for (strategy, size, _), run in runs.items():
        assert run["error"] is None
        own = json.loads((out / f"{strategy}_{size}" / "result.json").read_text())
        assert (run["top1"], run["wall_s"], own["strategy"]) == (own["top1"], own["wall_s"], strategy)
        assert run["held_out_top1"] is not None
        assert recipe_of(out / f"{strategy}_{size}").data.train_limit == size
    assert len({run["fingerprint"] for run in runs.values()}) == 1
    assert json.loads((out / "compare.json").read_text()) == figures
    for name in ("compare.md", "compare.png", "compare.svg"):
        assert (out / name).stat().st_size > 1000


def test_the_early_layer_is_one_of_the_stages_and_the_other_is_penultimate(compared):
    runs = by_variant(compared[1])
    assert runs["codes", 80, 0]["layer"] == "penultimate"
    # Not layer4, whose mean is the penultimate codes.
    tried = recipe_of(compared[0] / "early_codes_80").codes.layer
    assert tried[-3:] == ["layer1", "layer2", "layer3"]
    assert runs["early_codes", 80, 0]["layer"] in [f"{layer}, avg" for layer in tried]
    assert runs["head", 80, 0]["layer"] is None


def test_trainable_parameters_and_images_seen_are_those_of_the_strategy(compared):
    runs = by_variant(compared[1])
    params = {strategy: runs[strategy, 80, 0]["trainable_params"] for strategy in STRATEGIES}
    assert params["codes"] == params["head"] < params["mlp"] < params["finetune"] < params["scratch"]
    # 32 of 40 images train: two steps an epoch of 16, four epochs, lengthened to twelve steps.
    assert runs["scratch", 40, 0]["steps"] == 12
    assert runs["scratch", 40, 0]["images_seen"] == 6 * 32
    assert runs["scratch", 80, 0]["steps"] == 16
    assert runs["codes", 80, 0]["images_seen"] == 80 + 37
    assert (runs["codes", 40, 0]["images_seen"], runs["codes", 40, 0]["found_codes"]) == (0, True)


def test_going_on_runs_what_is_missing_and_nothing_else(compared, tmp_path):
    out, figures = compared
    again = shutil.copytree(out, tmp_path / "out")
    shutil.rmtree(again / "head_40")
    before = {path: path.stat().st_mtime_ns for path in again.glob("*/result.json")}
    done = compare([out.parent / "small.yaml"], run=tlscale.run, sizes=[40, 80], min_steps=12, out=again, resume=True)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (again / "head_40" / "result.json").is_file()
    tops = [{key: run["top1"] for key, run in by_variant(each).items()} for each in (done, figures)]
    assert tops[0] == tops[1]


# -- training only ----------------------------------------------------------------------------------------------------


def test_set_changes_one_variant_and_seeds_are_apart(recipe_file, tmp_path, capsys):
    changes = ["head.optim.lr=1e-2", "finetune.duration=3 steps"]
    out = tmp_path / "out"
    figures = compare(
        [recipe_file], run=tlscale.run, strategies=["head", "finetune"], seeds=[0, 1], changes=changes, out=out
    )
    assert sorted(by_variant(figures)) == [(name, 96, seed) for name in ("finetune", "head") for seed in (0, 1)]
    assert (recipe_of(out / "head_s1").optim.lr, recipe_of(out / "finetune_s0").optim.lr) == (1e-2, 2e-3)
    assert (recipe_of(out / "head_s1").seed, recipe_of(out / "head_s1").name) == (1, "small_head_s1")
    assert {run["steps"] for run in figures["runs"] if run["variant"] == "finetune"} == {3}
    assert recipe_of(out / "finetune_s0").freeze == ()
    said = capsys.readouterr().out
    assert said.index("optim.lr") < said.index("run 1 of 4")
    assert "chosen for new layers" in said
    assert "Over several seeds" in said


def test_a_run_that_fails_leaves_the_others(recipe_file, tmp_path):
    changes = ["finetune.optim.lr=1e20", "finetune.schedule.warmup=0 steps"]
    out = tmp_path / "out"
    with pytest.raises(TlscaleError, match=r"1 of 2 runs failed[\s\S]*NaN or infinite") as caught:
        compare([recipe_file], run=tlscale.run, strategies=["finetune", "head"], changes=changes, out=out)
    assert caught.value.exit_code == 1
    runs = by_variant(json.loads((out / "compare.json").read_text()))
    errors = {variant: run["error"] for (variant, _, _), run in runs.items()}
    assert errors["head"] is None
    assert "NaN" in errors["finetune"]
    assert f"{out / 'finetune'} failed: the loss or the weights became NaN" in (out / "compare.md").read_text()


def test_several_recipes_are_run_as_they_are(idx, tmp_path):
    files = []
    for name, lr in (("slow", 1e-4), ("fast.v2", 1e-2)):
        files.append(tmp_path / f"{name}.yaml")
        small_recipe(files[-1], idx, name=name, optim={"lr": lr}, duration="2 steps")
    figures = compare(files, run=tlscale.run, changes=["fast.v2.batch_size=8"], out=tmp_path / "out")
    assert sorted(by_variant(figures)) == [("fast.v2", 96, 0), ("slow", 96, 0)]
    assert recipe_of(tmp_path / "out" / "slow") == load_recipe(files[0])
    assert recipe_of(tmp_path / "out" / "fast.v2").batch_size == 8


# -- refused before anything runs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategies": ["head", "fintune"]}, "no strategy 'fintune'. Did you mean 'finetune'"),
        ({"strategies": ["head", "head"]}, "names one twice"),
        ({"changes": ["head.optim.rate=1"]}, r"change of head: optim\.rate=1: optim\.rate: unknown key"),
        ({"changes": ["codes.freeze=.*"]}, r"change of codes: freeze=\.\*: .*no effect with 'probe'"),
        ({"changes": ["haed.optim.lr=1"]}, "no 'haed' in this comparison. Did you mean 'head'"),
        ({"changes": ["head.data.train_limit=10"]}, "on other images"),
        ({"changes": ["head.seed=4"]}, "on other images"),
        ({"min_steps": 5}, "--min-steps: it lengthens runs at the sizes of --sizes"),
        ({"sizes": [100, 0]}, "--sizes: 0 is not a whole number of at least 1"),
        ({"sizes": [40, 100_000]}, "--sizes: 100,000 is more than the 96 training images there are"),
        ({"sizes": [3]}, "--sizes: 3 is less than one image for each of the 10 classes"),
        ({"seeds": [-1]}, "--seeds: -1 is not a whole number of at least 0"),
    ],
    ids=str,
)
def test_what_is_wrong_is_found_before_anything_runs(recipe_file, tmp_path, options, message):
    with pytest.raises((RecipeError, DataError), match=message):
        compare([recipe_file], run=tlscale.run, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_random_weights_transfer_nothing(idx, tmp_path):
    small_recipe(tmp_path / "small.yaml", idx)
    with pytest.raises(RecipeError, match=r"backbone\.weights"):
        compare([tmp_path / "small.yaml"], run=tlscale.run, out=tmp_path / "out")


def test_a_used_folder_is_refused_unless_it_goes_on(recipe_file, tmp_path):
    (tmp_path / "out" / "x").mkdir(parents=True)
    with pytest.raises(RunFolderError, match="--resume"):
        compare([recipe_file], run=tlscale.run, out=tmp_path / "out")


def test_recipes_on_other_images_are_refused(idx, tmp_path):
    other = put_small_idx(tmp_path / "other", test=20)
    small_recipe(tmp_path / "a.yaml", idx, name="a")
    small_recipe(tmp_path / "b.yaml", other, name="b")
    with pytest.raises(DataError, match=r"not about the same images[\s\S]*b: .* 20 test images"):
        compare([tmp_path / "a.yaml", tmp_path / "b.yaml"], run=tlscale.run, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_copy_of_the_images_is_the_same_images(idx, tmp_path):
    copy = shutil.copytree(idx, tmp_path / "copy")
    small_recipe(tmp_path / "a.yaml", idx, name="a", duration="1 steps")
    small_recipe(tmp_path / "b.yaml", copy, name="b", duration="1 steps")
    figures = compare([tmp_path / "a.yaml", tmp_path / "b.yaml"], run=tlscale.run, out=tmp_path / "out")
    assert {run["top1"] for run in figures["runs"]} == {figures["runs"][0]["top1"]}  # all else is the same, too
    assert len({run["scored_sha256"] for run in figures["runs"]}) == len(figures["pairs"]) == 1


def test_two_recipes_of_one_name_or_strategies_of_two_are_refused(recipe_file, tmp_path):
    with pytest.raises(RecipeError, match="of one name"):
        compare([recipe_file, recipe_file], run=tlscale.run)
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump({**yaml.safe_load(recipe_file.read_text()), "name": "other"}))
    with pytest.raises(RecipeError, match="--strategies: it derives them from one recipe"):
        compare([recipe_file, other], run=tlscale.run, strategies=["head"])
    with pytest.raises(RecipeError, match="Name one to compare"):
        compare([], run=tlscale.run)
