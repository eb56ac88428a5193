"""Comparisons of runs with several labels an image: by mean average precision, and never beside runs with one."""

from __future__ import annotations

import json

import pytest

import tlscale
from tests.coins import put_coins
from tests.garments import PROBE, SEVERAL, put_garments
from tests.small_runs import result, small_recipe
from tlscale.errors import RecipeError


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return put_garments(tmp_path_factory.mktemp("data"), num_test=30, photos=3)


@pytest.fixture(scope="module")
def runs(table, tmp_path_factory):
    """Two probes; the test images are of 10 patients."""
    folder = tmp_path_factory.mktemp("runs")
    for name, layer in (("early", "layer1"), ("late", "layer4")):
        keys = {**PROBE, "name": name, "codes": {"layer": [layer]}, "data": {**SEVERAL, "group_column": "patient"}}
        tlscale.run(small_recipe(folder / f"{name}.yaml", table, **keys), folder / name)
    return [str(folder / "early"), str(folder / "late")]


def test_finished_runs_are_compared_by_map_over_patients(runs, tmp_path):
    found = tlscale.compare(runs, out=tmp_path / "compared")
    maps = {run["variant"]: run["mean_average_precision"] for run in found["runs"]}
    assert maps == {name: result(tmp_path.parent / folder)["mean_average_precision"] for name, folder in zip(
        ("early", "late"), runs, strict=True
    )}  # fmt: skip
    (pair,) = found["pairs"]
    assert (pair["num_images"], pair["num_groups"], pair["num_first_only"]) == (30, 10, None)
    assert pair["difference"] == pytest.approx(maps[pair["first"]] - maps[pair["second"]])
    low, high = pair["difference_interval95"]
    assert low < pair["difference"] < high
    assert pair["distinguishable"] == (pair["p_corrected"] < 0.05)
    assert list(found.table[0]) == [
        *("strategy", "images", "mAP", "95% interval", "against the best", "held-out mAP"),
        *("seconds", "trainable", "steps", "images seen", "layer"),
    ]
    assert float(found.table[0]["mAP"]) == pytest.approx(max(maps.values()), abs=1e-4)
    assert float(found.table[0]["held-out mAP"]) > 0
    assert found.table[2]["strategy"] == "chance"
    assert "a bootstrap with the same draws of groups of images for both" in " ".join(found["notes"])
    assert "normal, by a bootstrap over groups of images" in found["notes"][0]
    assert "has mAP" in repr(found)
    page = (tmp_path / "compared" / "compare.md").read_text()
    assert "top1" not in page
    assert (tmp_path / "compared" / "compare.png").stat().st_size > 0
    assert json.loads((tmp_path / "compared" / "compare.json").read_text())["pairs"] == [pair]


def test_strategies_of_a_recipe_are_compared(table, tmp_path):
    weights = {"backbone": {"name": "resnet10t", "weights": "bundled"}, "data": SEVERAL, "duration": "1 epochs"}
    loss = {"kind": "asymmetric", "negative_gamma": 2.0, "class_weights": "balanced"}
    recipe = small_recipe(tmp_path / "r.yaml", table, loss=loss, **weights)
    found = tlscale.compare(recipe, strategies=["codes", "head"], sizes=[40], min_steps=3, out=tmp_path / "c")
    assert [run["task"] for run in found["runs"]] == ["multi_label"] * 2
    assert {run["variant"] for run in found["runs"]} == {"codes", "head"}
    assert all(run["held_out_mean_average_precision"] is not None for run in found["runs"])
    assert len(found["pairs"]) == 1
    again = tlscale.compare(
        recipe, strategies=["codes", "head"], sizes=[40], min_steps=3, out=tmp_path / "c", resume=True
    )
    assert again["pairs"] == found["pairs"]


def test_runs_of_one_label_are_not_mixed_with_them(runs, table, tmp_path):
    images = put_coins(tmp_path / "images.parquet", {"train": 30, "test": 10})
    single = small_recipe(tmp_path / "one.yaml", images, data={"source": "manifest"}, **{**PROBE, "name": "single"})
    tlscale.run(single, tmp_path / "single")
    several, one = tlscale.compare([*runs, str(tmp_path / "single")]).tables
    assert ("mAP" in several.table[0], "mAP" in one.table[0]) == (True, False)
    assert (len(several["pairs"]), len(one["pairs"])) == (1, 0)
    several = small_recipe(tmp_path / "several.yaml", table, data=SEVERAL, **{**PROBE, "name": "several"})
    with pytest.raises(RecipeError, match=r"data.task: 'several' has several labels an image, and 'single' has one"):
        tlscale.compare([several, single], out=tmp_path / "mixed")
    assert not (tmp_path / "mixed").exists()


def test_folds_are_compared(table, tmp_path):
    rows = [line.split(",") for line in table.read_text().splitlines()]
    at = rows[0].index("split")
    lines = [",".join(row[:at] + row[at + 1 :]) for row in rows]
    (table.parent / "all.csv").write_text("\n".join(lines) + "\n")
    made = []
    for name, layer in (("early", "layer1"), ("late", "layer4")):
        data = {**SEVERAL, "validation_fraction": 0.3}
        keys = {**PROBE, "name": name, "codes": {"layer": [layer]}, "evaluate": {"folds": 2, "repeats": 2}}
        made.append(small_recipe(tmp_path / f"{name}.yaml", table.parent / "all.csv", data=data, **keys))
    found = tlscale.compare(made, out=tmp_path / "c")
    (pair,) = found["pairs"]
    assert (pair["num_images"], pair["num_groups"]) == (90, None)
    assert [run["held_out_mean_average_precision"] for run in found["runs"]] == [None, None]
