"""Cross-validation that skips bad images: it ends, is gone on with, and scores the others once each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import tlscale
from tests.garments import SEVERAL, put_garments
from tests.small_runs import assert_same_bits, exported, result, small_recipe
from tlscale.errors import ResumeError

RESNET = {"name": "test_resnet", "weights": "none"}
PROBE = {"backbone": RESNET, "probe": {"kind": "ridge", "strengths": [1.0]}}
TRAINED = {"duration": "2 steps", "batch_size": 6}
FOLDS = {"evaluate": {"folds": 2}}
SKIP = {"source": "folder", "on_bad_image": "skip", "image_size": 16}


def put_images(folder: Path, count: int, suffix: str = "png") -> list[Path]:
    """Small pictures of noise in two classes, in the order of their rows."""
    rng, files = np.random.default_rng(0), []
    for number in range(count):
        path = folder / "ab"[2 * number // count] / f"{number:02}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels_HW = rng.integers(0, 256, (16, 16), dtype=np.uint8)
        path.write_bytes(dicom(pixels_HW)) if suffix == "dcm" else Image.fromarray(pixels_HW).save(path)
        files.append(path)
    return files


def dicom(pixels_HW: np.ndarray) -> bytes:
    from tests.unit.data.test_dicom import dicom as encoded

    return encoded(pixels_HW)


def go_on(recipe, out: Path, *, without: int = 2) -> dict:
    """Run what a start without one of the folds and the result goes on with; its answers are those of the whole."""
    answers, network = (out / "predictions.parquet").read_bytes(), exported(out)
    (out / "result.json").unlink()
    shutil.rmtree(out / "folds" / str(without))
    tlscale.run(recipe, out, resume=True)
    assert (out / "predictions.parquet").read_bytes() == answers
    assert_same_bits(exported(out), network)
    return result(out)


@pytest.mark.parametrize("changes", [PROBE, pytest.param(TRAINED, marks=pytest.mark.slow)], ids=["probe", "trained"])
def test_every_sound_image_is_answered_once_whatever_is_wrong_with_the_others(changes, tmp_path):
    files = put_images(tmp_path / "images", 20)
    files[0].write_bytes(files[0].read_bytes()[:70])
    files[7].write_bytes(b"")
    files[13].write_text(f"no picture, but {files[13]}\n")
    data = {**SKIP, "path": str(tmp_path / "images"), "max_megapixels": 0.001}
    Image.new("L", (60, 60)).save(files[19])
    recipe, out = small_recipe(tmp_path / "r.yaml", tmp_path, data=data, **FOLDS, **changes), tmp_path / "run"
    figures = tlscale.run(recipe, out)
    assert (figures["num_images"], figures["skipped_images"]) == (16, {"train": 4})
    assert pq.read_table(out / "predictions.parquet")["row"].to_pylist() == sorted({*range(20)} - {0, 7, 13, 19})
    assert json.loads((out / "folds" / "all" / "run.json").read_text())["data"]["num_images"] == {"train": 16}
    assert go_on(recipe, out)["skipped_images"] == {"train": 4}
    assert tlscale.run(recipe, out, resume=True)["num_images"] == 16  # it is complete


def test_of_dicom_too_and_in_a_given_validation_and_test_split(tmp_path):
    pytest.importorskip("pydicom")
    for split, count in (("train", 12), ("validation", 6), ("test", 6)):
        files = put_images(tmp_path / "images" / split, count, "dcm")
        files[1].write_bytes(files[1].read_bytes()[:-40])
    data = {**SKIP, "path": str(tmp_path / "images"), "range": [0, 255], "validation_fraction": 0.0}
    recipe, out = small_recipe(tmp_path / "r.yaml", tmp_path, data=data, **FOLDS, **PROBE), tmp_path / "run"
    figures = tlscale.run(recipe, out)
    assert figures["skipped_images"] == {"train": 1, "validation": 1, "test": 1}
    assert (figures["num_images"], figures["test"]["num_images"]) == (16, 5)
    assert go_on(recipe, out)["test"]["num_images"] == 5


@pytest.mark.slow  # of two settings
def test_of_several_labels_in_groups_and_compared(tmp_path):
    table = put_garments(tmp_path / "data", 48, photos=2)
    (tmp_path / "data" / "5.png").write_bytes((tmp_path / "data" / "5.png").read_bytes()[:70])
    data = {**SEVERAL, "on_bad_image": "skip", "group_column": "patient", "validation_fraction": 0.3}
    probe = {"backbone": RESNET, "probe": {"kind": "logistic", "strengths": [0.1]}}
    recipe, out = small_recipe(tmp_path / "r.yaml", table, data=data, **FOLDS, **probe), tmp_path / "run"
    figures = tlscale.run(recipe, out)
    assert (figures["num_images"], figures["skipped_images"]) == (47, {"train": 1})
    assert go_on(recipe, out)["num_images"] == 47
    other = recipe.with_(name="other", **{"probe.strengths": [1e-4]})
    found = tlscale.compare([recipe, other], out=tmp_path / "compared")
    (pair,) = found["pairs"]
    assert pair["num_images"] == 47


def test_a_run_that_was_moved_goes_on_from_another_folder(tmp_path, monkeypatch):
    files = put_images(tmp_path / "images", 16)
    files[3].write_bytes(files[3].read_bytes()[:70])
    monkeypatch.chdir(tmp_path)  # messages are about places below it
    recipe = small_recipe(Path("r.yaml"), "images", data={**SKIP, "path": "images"}, **FOLDS, **PROBE)
    assert tlscale.run(recipe, "run")["num_images"] == 15
    monkeypatch.chdir(tmp_path / "images")
    assert go_on(recipe, Path(shutil.move(tmp_path / "run", tmp_path / "moved")))["num_images"] == 15


def test_a_part_that_skips_other_images_is_no_part_of_it(tmp_path):
    files = put_images(tmp_path / "images", 16)
    files[3].write_bytes(files[3].read_bytes()[:70])
    data = {**SKIP, "path": str(tmp_path / "images")}
    recipe, out = small_recipe(tmp_path / "r.yaml", tmp_path, data=data, **FOLDS, **PROBE), tmp_path / "run"
    tlscale.run(recipe, out)
    (out / "result.json").unlink()
    place = out / "folds" / "1" / "run.json"
    run_info = json.loads(place.read_text())
    run_info["bad_images"]["train"][0][0] = 4
    place.write_text(json.dumps(run_info))
    with pytest.raises(ResumeError, match=r"folds/1' is no part of .* its labels, or the images that it skips, are"):
        tlscale.run(recipe, out, resume=True)
