"""Labels drawn at random: whatever is fitted to them, the score of every strategy is that of a guesser."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tlscale
from tests.coins import chance, put_coins
from tests.recompute import assert_follows
from tests.small_runs import put_teacher, small_recipe
from tlscale.commands.compare import compare
from tlscale.commands.evaluate import evaluate_run
from tlscale.errors import DataError
from tlscale.recipe.strategies import STRATEGIES

WITH_TEST = {"train": 80, "validation": 40, "test": 120}
FOLDS = {f"fold{number}": 60 for number in range(3)}


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return put_teacher(tmp_path_factory.mktemp("weights") / "weights.safetensors", in_chans=1)


def compared(folder: Path, manifest: Path, weights: Path, probe: dict | None = None, **options) -> dict:
    data = {"source": "manifest", "path": str(manifest), "validation_fraction": 0.1, **options.pop("data", {})}
    changes = {"probe": probe} if probe is not None else {"duration": "4 epochs", "freeze": r"(conv1|bn1)\..*"}
    backbone = {"name": "test_resnet", "weights": str(weights)}
    folder.mkdir(exist_ok=True)
    small_recipe(folder / "coins.yaml", manifest, data=data, backbone=backbone, **changes)
    return compare([folder / "coins.yaml"], run=tlscale.run, out=folder / "out", **options)


def assert_chance(figures: dict, split: str, num_classes: int = 2, num_tables: int = 1) -> None:
    """Each run is within chance's interval, by its result.json, its predictions and the table."""
    assert len(figures["runs"]) >= 1
    for run in figures["runs"]:
        folder = Path(run["folder"])
        result = json.loads((folder / "result.json").read_text())
        assert run["error"] is None
        assert (result["split"], run["top1"]) == (split, result["top1"])
        assert_follows(result, folder / "predictions.parquet")
        # Where the scored images chose, the best of so many was taken.
        looks = 1
        if result["selected_on"] is not None:
            assert result["selected_on"] == split == "validation"
            tried = result["probe"]["tried"].values() if "probe" in result else [range(4)]
            looks = sum(map(len, tried))
        low, high = chance(result["num_images"], 1 / num_classes, looks * len(figures["runs"]) * num_tables)
        assert low <= result["top1"] <= high, (run["variant"], result["top1"], (low, high))
        assert result["majority"]["top1"] == pytest.approx(1 / num_classes, abs=0.02)


def assert_chance_again(figures: dict, tmp_path: Path, num_classes: int = 2) -> None:
    """So says `evaluate`, of the run's own split and of other labels, drawn anew; or that it has nothing to score."""
    classes = ("heads", "tails", "edge")[:num_classes]
    other = put_coins(tmp_path / "other.parquet", {"train": 90}, seed=9, classes=classes)
    looks = len(figures["runs"])
    for run in figures["runs"]:
        if run["scored_model"] == "before_refit":
            with pytest.raises(DataError, match=r"its own data have no image left to score it on"):
                evaluate_run(run["folder"])
        else:
            again = evaluate_run(run["folder"])
            assert again.get("selected_on") == run["selected_on"]
            # From images, where the run may have had codes: rounding may turn an answer that is nearly even.
            assert again["top1"] == pytest.approx(run["top1"], abs=1.5 / again["num_images"])
        found = evaluate_run(run["folder"], data=str(other))
        low, high = chance(90, 1 / num_classes, looks)
        assert found["num_images"] == 90
        assert low <= found["top1"] <= high, run["variant"]


def test_with_a_test_split_by_a_column(weights, tmp_path):
    manifest = put_coins(tmp_path / "coins.parquet", WITH_TEST)
    figures = compared(tmp_path, manifest, weights)
    assert {run["variant"] for run in figures["runs"]} == set(STRATEGIES)
    assert_chance(figures, "test")
    # Nor is any two of them told apart, and all of them were compared.
    assert len(figures["pairs"]) == len(STRATEGIES) * (len(STRATEGIES) - 1) // 2
    assert not any(pair["distinguishable"] for pair in figures["pairs"])
    assert all(run["selected_on"] is None and run["scored_model"] == "exported" for run in figures["runs"])
    assert_chance_again(figures, tmp_path)


def test_without_a_test_split(weights, tmp_path):
    manifest = put_coins(tmp_path / "coins.parquet", {"train": 240})
    # So weak that a fit to all images would know them by heart.
    changes = [f"{name}.probe.strengths=[0.001]" for name in ("codes", "early_codes")]
    figures = compared(tmp_path, manifest, weights, data={"validation_fraction": 0.5}, changes=changes)
    assert {run["variant"] for run in figures["runs"]} == set(STRATEGIES)
    assert_chance(figures, "validation")
    by_name = {run["variant"]: run for run in figures["runs"]}
    # One layer and one strength leave nothing to choose.
    assert {name for name, run in by_name.items() if run["selected_on"] is None} == {"codes"}
    for name, run in by_name.items():
        assert run["scored_model"] == ("before_refit" if name in ("codes", "early_codes") else "exported")
    assert_chance_again(figures, tmp_path)
    assert any("codes top1 is that of the classifier before it was fitted again" in note for note in figures["notes"])


@pytest.mark.parametrize("kind", ["ridge", "knn", "sklearn"])
def test_every_kind_of_probe_without_a_test_split(kind, weights, tmp_path):
    """The logistic one is that of the strategies; with three classes, and over seeds."""
    manifest = put_coins(tmp_path / "coins.parquet", {"train": 240}, classes=("heads", "tails", "edge"))
    data = {"validation_fraction": 0.5}
    figures = compared(tmp_path, manifest, weights, {"kind": kind}, data=data, strategies=["codes"], seeds=[0, 1])
    assert [run["seed"] for run in figures["runs"]] == [0, 1]
    assert_chance(figures, "validation", num_classes=3)
    assert_chance_again(figures, tmp_path, num_classes=3)


def test_folds_by_a_split_column(weights, tmp_path):
    manifest = put_coins(tmp_path / "coins.parquet", FOLDS, seed=1)
    for number in range(2):
        train, validation, test = (f"fold{(number + place) % 3}" for place in range(3))
        data = {"train_split": train, "validation_split": validation, "test_split": test}
        strategies = STRATEGIES if number == 0 else ["codes", "head"]
        figures = compared(tmp_path / test, manifest, weights, data=data, strategies=strategies)
        assert {run["variant"] for run in figures["runs"]} == set(strategies)
        assert_chance(figures, "test", num_tables=2)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("split", ["test", "validation"])
def test_over_many_draws_the_mean_is_chance(split, weights, tmp_path):
    """Six strategies, five draws of labels and seeds: what one draw hides, the sum does not."""
    sums: dict[str, list[float]] = {}
    num_images = 300
    for seed in range(5):
        sizes = {"train": 150, "validation": 60, "test": num_images} if split == "test" else {"train": 2 * num_images}
        manifest = put_coins(tmp_path / f"{seed}" / "coins.parquet", sizes, seed)
        data = {} if split == "test" else {"validation_fraction": 0.5}
        figures = compared(tmp_path / f"{seed}", manifest, weights, data=data, seeds=[seed])
        assert_chance(figures, split, num_tables=5)
        for run in figures["runs"]:
            sums.setdefault(run["variant"], []).append(run["top1"])
    assert set(sums) == set(STRATEGIES)
    for tops in sums.values():
        # Of the best of many settings the mean is above one half by what the choice is worth, at most 3 errors.
        low, high = chance(5 * num_images, 0.5, 12)
        assert low <= sum(tops) / 5 <= high + (0 if split == "test" else 3 * 0.5 / num_images**0.5)
