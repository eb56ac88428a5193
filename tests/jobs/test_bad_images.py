"""`data.on_bad_image: skip`: in every split, before anything is drawn, by content; and the crop of all images."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import tlscale
from tests.small_runs import as_after, put_small_folder, result, small_recipe
from tlscale.cli import main
from tlscale.data.sources.open import BadImages, ImageData, open_data
from tlscale.errors import DataError, ResumeError
from tlscale.recipe.schema import DataSection
from tlscale.training.setup import set_up

SKIP = {"source": "folder", "on_bad_image": "skip"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Findings of this test alone."""
    monkeypatch.setenv("TLSCALE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "checked"


def put_bad(folder: Path, split: str, *rows: int) -> list[Path]:
    """Cut images of the folder short, a different way each, headers left whole."""
    paths = sorted((folder / split).glob("*/*.png"))
    for row in rows:
        paths[row].write_bytes(paths[row].read_bytes()[: 60 + row])
    return [paths[row] for row in rows]


def open_folder(folder: Path, seed: int = 0, bad_images: BadImages | None = None, **keys) -> ImageData:
    section = DataSection.model_validate({**SKIP, "path": str(folder), "validation_fraction": 0.2, **keys})
    return open_data(section, seed, bad_images=bad_images)


def places(data: ImageData) -> list[str]:
    return [s.where(i) for s in (data.train, data.validation, data.test) if s is not None for i in range(len(s))]


@pytest.mark.parametrize("limit", [None, 40])
def test_bad_images_are_in_no_split_and_draws_are_from_the_others(tmp_path, limit):
    folder = put_small_folder(tmp_path / "images")
    bad = [*put_bad(folder, "train", 3, 20, 21), *put_bad(folder, "test", 0)]
    for seed in range(3):
        data = open_folder(folder, seed, train_limit=limit)
        assert not {str(path) for path in bad} & set(places(data))
        assert len(data.train) + len(data.validation) == (limit or 57)
        assert len(data.validation) == round(0.2 * (limit or 57))  # a bad image takes no other's place
        assert len(data.test) == 19
        assert data.bad_images.counts == {"train": 3, "test": 1}
        assert any(note.startswith("SKIPPED: 1 of 20 images of test") for note in data.notes)


def test_a_split_without_a_sound_image_is_an_error(tmp_path):
    folder = put_small_folder(tmp_path / "images")
    put_bad(folder, "test", *range(20))
    with pytest.raises(DataError, match=r"all 20 images of the test split are bad; the first is .*png"):
        open_folder(folder)


def test_findings_are_kept_by_content(tmp_path, cache):
    folder = put_small_folder(tmp_path / "images")
    (bad,) = put_bad(folder, "train", 7)
    assert open_folder(folder).bad_images.counts == {"train": 1}
    (file,) = cache.glob("*/*.sha256")
    contents = {path.read_bytes() for path in folder.rglob("*.png") if path != bad}
    assert len(file.read_bytes()) == 32 * len(contents)
    # The same images elsewhere are nothing new, and what is written there is believed.
    open_folder(shutil.copytree(folder, tmp_path / "copy"))
    assert list(cache.glob("*/*.sha256")) == [file]
    file.write_bytes(file.read_bytes() + hashlib.sha256(bad.read_bytes()).digest())
    assert open_folder(folder).bad_images.counts == {}
    # It goes by content, not by name: the same file with another content is tried.
    bad.write_bytes(bad.read_bytes() + b"x")
    assert open_folder(folder).bad_images.counts == {"train": 1}
    assert open_folder(folder, max_megapixels=60).bad_images.counts == {"train": 1}


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TLSCALE_CACHE", str(tmp_path / "file"))
    folder = put_small_folder(tmp_path / "images")
    put_bad(folder, "train", 7)
    assert open_folder(folder).bad_images.counts == {"train": 1}


def test_a_run_counts_what_it_skipped_and_evaluate_sees_the_same(tmp_path):
    folder = put_small_folder(tmp_path / "images")
    put_bad(folder, "train", 3, 20)
    put_bad(folder, "test", 5)
    tlscale.run(small_recipe(tmp_path / "recipe.yaml", folder, data=SKIP), tmp_path / "run")
    figures, record = result(tmp_path / "run"), json.loads((tmp_path / "run" / "run.json").read_text())
    assert figures["skipped_images"] == {"train": 2, "test": 1}
    assert (figures["num_bad_images"], figures["num_images"]) == (3, 19)
    assert [row for row, _ in record["bad_images"]["train"]] == [3, 20]
    done = CliRunner().invoke(main, ["evaluate", str(tmp_path / "run"), "--json"])
    assert json.loads(done.stdout)["num_images"] == 19


def test_a_probe_counts_them_too(tmp_path):
    folder = put_small_folder(tmp_path / "images")
    put_bad(folder, "test", 5, 6)
    recipe = small_recipe(tmp_path / "recipe.yaml", folder, data=SKIP, probe={"kind": "ridge"})
    assert tlscale.run(recipe, tmp_path / "run")["skipped_images"] == {"test": 2}


def test_plan_decodes_nothing_and_says_so(tmp_path):
    folder = put_small_folder(tmp_path / "images")
    put_bad(folder, "train", *range(60))
    small_recipe(tmp_path / "recipe.yaml", folder, data=SKIP)
    done = CliRunner().invoke(main, ["plan", str(tmp_path / "recipe.yaml")])
    assert done.exit_code == 0, done.output
    assert "all images are taken as sound" in " ".join(done.output.split())
    assert not (tmp_path / "cache" / "checked").exists()


def test_a_run_of_an_older_version_sees_the_rows_that_it_saw(tmp_path):
    folder = put_small_folder(tmp_path / "images")
    whole = open_folder(folder)
    put_bad(folder, "train", 3, 20)
    put_bad(folder, "test", 5)
    old = [[4, "why"], [9, "why"]]  # positions in train, after the hold-out was drawn
    data = open_folder(folder, bad_images=BadImages.from_plain(old))
    assert np.array_equal(data.train.rows_N, np.delete(whole.train.rows_N, [4, 9]))
    assert np.array_equal(data.validation.rows_N, whole.validation.rows_N)
    assert len(data.test) == 20
    assert data.bad_images.to_plain() == old
    assert open_folder(folder, bad_images=BadImages.from_plain([])).identity["num_images"]["train"] == 48


def test_what_a_run_skips_is_settled_when_it_begins(tmp_path):
    folder = put_small_folder(tmp_path / "images")
    put_bad(folder, "train", 3, 20)
    first = open_folder(folder).bad_images
    put_bad(folder, "train", 30)  # what goes bad later is no reason to draw anew
    again = open_folder(folder, bad_images=BadImages.from_plain(json.loads(json.dumps(first.to_plain()))))
    assert again.bad_images == first
    assert len(again.train) + len(again.validation) == 58


def put_sizes(folder: Path, small: int, large: int) -> Path:
    for name in "ab":
        (folder / name).mkdir(parents=True)
        for number in range(small + large):
            side = 40 if number < small else 120
            Image.new("L", (side, side + 3), number).save(folder / name / f"{number:02}.png")
    return folder


def crop_pct(tmp_path: Path, folder: Path, seed: int = 0, **keys) -> float:
    data = {"source": "folder", "image_size": 64, **keys}
    recipe = small_recipe(tmp_path / "recipe.yaml", folder, data=data, seed=seed)
    return set_up(recipe, world_size=1).spec.crop_pct


def test_the_crop_is_that_of_the_data_set_and_not_of_the_first_image(tmp_path):
    mostly_large = put_sizes(tmp_path / "large", small=4, large=9)
    seen = {crop_pct(tmp_path, mostly_large, seed, train_limit=limit) for seed in range(4) for limit in (4, 20)}
    assert len(seen) == 1
    assert seen.pop() < 1
    assert crop_pct(tmp_path, put_sizes(tmp_path / "small", small=9, large=4)) == 1


def test_an_unfinished_run_that_would_see_its_images_in_another_way_is_refused(tmp_path):
    folder = put_small_folder(tmp_path / "images")
    recipe = small_recipe(tmp_path / "recipe.yaml", folder, data={"source": "folder"}, checkpoint={"keep": 9})
    tlscale.run(recipe, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000006", ignore_errors=True)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    record["input"]["crop_pct"] = 0.8125
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    out = as_after(3, tmp_path / "run", tmp_path / "unfinished")
    with pytest.raises(ResumeError, match=r"crop_pct: 0.8125 -> .*median size.*data.crop_pct=0.8125"):
        tlscale.run(recipe, out, resume=True)
    # A finished one is evaluated with the input that is stored with its model.
    assert CliRunner().invoke(main, ["evaluate", str(tmp_path / "run")]).exit_code == 0


@pytest.mark.parametrize("in_chans", [3, 5])
def test_an_image_of_other_channels_than_the_network_takes_is_left_out(tmp_path, in_chans):
    for name, image in [(name, image) for name in ("a", "b") for image in range(6)]:
        channels = 8 - in_chans if (name, image) == ("a", 2) else in_chans
        (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(image).integers(0, 256, (8, 8, channels), dtype=np.uint8)
        np.save(tmp_path / "data" / name / f"{image}.npy", pixels)
    backbone = {"name": "test_resnet", "weights": "none", "in_chans": in_chans}
    recipe = small_recipe(tmp_path / "recipe.yaml", tmp_path / "data", data=SKIP, backbone=backbone)
    for _ in range(2):  # by the pixels, and by what was found then
        found = set_up(recipe, world_size=1).data.bad_images.found["train"]
        assert [row for row, _ in found] == [2]
        assert f"the network takes {in_chans}" in found[0][1] or in_chans == 3
    output = CliRunner().invoke(main, ["plan", str(tmp_path / "recipe.yaml"), "--check-images"]).output
    assert "1 of 12 images cannot be read" in output
