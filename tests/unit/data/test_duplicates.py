"""Images that two splits have, byte for byte: found by content, dropped or refused on request."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.recipes.wrong_data import put_image
from tlscale.data.content import digest_array
from tlscale.data.sources.duplicates import _equal
from tlscale.data.sources.open import ImageData, open_data
from tlscale.errors import DataError
from tlscale.recipe.schema import DataSection


def put_images(folder: Path, **classes: int) -> Path:
    """Different images, `train__a=3` of them in train/a."""
    for number, (name, count) in enumerate(classes.items()):
        for row in range(count):
            put_image(folder / name.replace("__", "/") / f"{row}.png", grey=number * 30 + row)
    return folder


def open_folder(path: Path, seed: int = 0, **keys) -> ImageData:
    return open_data(DataSection.model_validate({"source": "folder", "path": str(path), **keys}), seed)


def contents(split) -> set[bytes]:
    return {split.read(at) for at in range(len(split))}


@settings(deadline=None)
@given(st.lists(st.integers(0, 6), max_size=12), st.lists(st.integers(0, 6), max_size=12), st.data())
def test_equal_images_are_those_with_equal_known_contents(own, theirs, data):
    digests = [digest_array([bytes([value]) * 32 for value in values]) for values in (own, theirs)]
    known = [
        np.array(data.draw(st.lists(st.booleans(), min_size=len(some), max_size=len(some))), bool)
        for some in (own, theirs)
    ]
    positions, others = _equal(digests[0], known[0], digests[1], known[1])
    there = [value for value, is_known in zip(theirs, known[1], strict=True) if is_known]
    assert positions.tolist() == [at for at, value in enumerate(own) if known[0][at] and value in there]
    first = [
        next(at for at, other in enumerate(theirs) if known[1][at] and other == own[position]) for position in positions
    ]
    assert others.tolist() == first


@pytest.fixture
def copied(tmp_path):
    """Train has 2 images of test and 1 of validation, validation 1 of test; under other names."""
    root = put_images(tmp_path, train__a=6, train__b=6, val__a=3, val__b=3, test__a=2, test__b=2)
    for place, copy in (
        ("test/a/0", "train/a/x"),
        ("test/b/1", "train/a/y"),
        ("val/b/2", "train/b/x"),
        ("test/a/1", "val/a/x"),
    ):
        shutil.copyfile(root / f"{place}.png", root / f"{copy}.png")
    return root


def test_they_are_dropped_from_train_and_validation_and_never_from_test(copied):
    plain = open_folder(copied)
    assert [len(split) for split in plain.splits.values()] == [15, 7, 4]
    data = open_folder(copied, duplicates="drop")
    assert [len(split) for split in data.splits.values()] == [12, 6, 4]
    assert data.num_dropped == {"train": 3, "validation": 1}
    names = {data.train.where(at) for at in range(12)} | {data.validation.where(at) for at in range(6)}
    assert not [name for name in names if name.endswith(("x.png", "y.png"))]
    assert "DROPPED: 2 of 15 images of train are, byte for byte, in test too" in " ".join(data.notes)
    assert data.train.noted_digests()[1].all(), "and need not be read again"


def test_on_request_they_are_an_error(copied):
    with pytest.raises(DataError, match=r"2 of 4 images of test .* in train too, such as .*0.png = .*x.png") as caught:
        open_folder(copied, duplicates="error")
    assert caught.value.key == "data.duplicates"


@pytest.mark.parametrize("duplicates", ["drop", "error"])
@pytest.mark.parametrize("keys", [{}, {"train_limit": 20}, {"group_regex": r"\d+"}], ids=str)
def test_a_drawn_holdout_keeps_equal_images_together(tmp_path, duplicates, keys):
    root = put_images(tmp_path, a=16, b=16)
    for name in "ab":
        for row in range(0, 16, 2):
            shutil.copyfile(root / name / f"{row}.png", root / name / f"{row + 100}.png")
    crossing = 0
    for seed in range(5):
        plain = open_folder(root, seed, validation_fraction=0.4, **keys)
        crossing += bool(contents(plain.train) & contents(plain.validation))
        data = open_folder(root, seed, validation_fraction=0.4, duplicates=duplicates, **keys)
        assert not contents(data.train) & contents(data.validation)
        assert len(data.train) + len(data.validation) == keys.get("train_limit", 48)
        assert data.num_dropped == {}
    assert crossing


def test_bad_images_are_not_taken_for_equal_ones(tmp_path):
    root = put_images(tmp_path, train__a=6, train__b=6, test__a=1, test__b=1)
    for path in (root / "train" / "a" / "1.png", root / "train" / "b" / "2.png", root / "test" / "a" / "0.png"):
        path.write_bytes(b"damaged")
    put_image(root / "test" / "a" / "1.png", grey=200)
    keys = {"on_bad_image": "skip", "duplicates": "drop", "group_regex": r"(\d)\.png", "groups_across_splits": "allow"}
    data = open_folder(root, validation_fraction=0.3, **keys)
    assert data.num_dropped == {}
    # Rows of two bad images are no reason to keep their groups together.
    held = {Path(data.validation.where(at)).name for at in range(len(data.validation))}
    assert len(held) in (1, 2)


def test_a_train_split_of_copies_alone_is_an_error(tmp_path):
    root = put_images(tmp_path, test__a=2, test__b=2)
    shutil.copytree(root / "test", root / "train")
    with pytest.raises(DataError, match=r"data.duplicates: all 4 images of train are in other splits"):
        open_folder(root, duplicates="drop")


def test_a_plan_reads_nothing_to_compare_it(copied):
    section = DataSection.model_validate({"source": "folder", "path": str(copied), "duplicates": "drop"})
    data = open_data(section, 0, tries_images=False)
    assert len(data.train) == 15
    assert not data.train.noted_digests()[1].any()
    assert any("images are compared when a run begins" in note for note in data.notes)


def test_a_file_that_is_dropped_is_no_leak(tmp_path):
    root = put_images(tmp_path, train__a=4, train__b=4, test__a=2, test__b=2)
    (root / "train/a/x.png").hardlink_to(root / "test/a/0.png")
    told = [note for note in open_folder(root).notes if note.startswith("LEAK")]
    assert len(told) == 1
    assert "1 file in both train and test" in told[0]
    dropped = open_folder(root, duplicates="drop")
    assert dropped.num_dropped == {"train": 1}
    assert not [note for note in dropped.notes if note.startswith("LEAK")]
