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


def put_two_labels(root: Path, split: str = "") -> None:
    """Two of a are there as b, too, and one of a twice."""
    for one, copy in (("a/0", "b/x"), ("a/1", "b/y"), ("a/2", "a/z")):
        shutil.copyfile(root / split / f"{one}.png", root / split / f"{copy}.png")


def names_in(*splits) -> set[str]:
    return {"/".join(Path(split.where(at)).parts[-2:]) for split in splits for at in range(len(split))}


@pytest.mark.parametrize("keys", [{}, {"group_regex": r"\d|[xyz]"}], ids=str)
def test_equal_images_under_two_labels_are_dropped_all(tmp_path, keys):
    put_two_labels(put_images(tmp_path, a=8, b=8))
    for seed in range(3):
        data = open_folder(tmp_path, seed, duplicates="drop", validation_fraction=0.3, **keys)
        both = names_in(data.train, data.validation)
        assert not both & {"a/0.png", "b/x.png", "a/1.png", "b/y.png"}
        assert {"a/2.png", "a/z.png"} <= both
        assert data.num_dropped == {"train": 4}
    (note,) = [note for note in data.notes if note.startswith("DROPPED")]
    assert "4 of 19 images of train are, byte for byte, there under another label too" in note
    assert "a/0.png is 'a' and " in note
    assert "b/x.png is 'b'" in note


def test_equal_images_under_two_labels_are_an_error_on_request(tmp_path):
    put_two_labels(put_images(tmp_path, a=8, b=8))
    with pytest.raises(DataError, match=r"4 of 19 .* under another label too: .*a/0.png is 'a' and .*b/x.png is 'b'"):
        open_folder(tmp_path, duplicates="error")


def test_test_images_under_two_labels_stay_and_are_named(tmp_path):
    put_two_labels(put_images(tmp_path, train__a=8, train__b=8, test__a=3, test__b=3), "test")
    data = open_folder(tmp_path, duplicates="drop")
    assert len(data.test) == 9
    (note,) = [note for note in data.notes if note.startswith("LABELS")]
    assert "4 of 9 images of test" in note


def test_what_is_left_out_puts_no_group_into_two_splits(tmp_path):
    """Dropped or skipped, a photo of a patient of test is not in train."""
    root = put_images(tmp_path, train__a=4, train__b=4, test__a=2, test__b=2)
    for number, path in enumerate(sorted(root.glob("*/*/*.png"))):
        path.rename(path.with_name(f"p{number}.png"))
    keys = {"group_regex": r"p\d+", "validation_fraction": 0.25}
    of_test = sorted((root / "test" / "a").iterdir())
    shutil.copyfile(of_test[0], root / "train" / "a" / of_test[0].name)
    (root / "train" / "a" / of_test[1].name).write_bytes(b"damaged")
    with pytest.raises(DataError, match="2 groups are in both train and test"):
        open_folder(root, **keys)
    with pytest.raises(DataError, match="1 group is in both train and test"):
        open_folder(root, on_bad_image="skip", **keys)
    data = open_folder(root, on_bad_image="skip", duplicates="drop", **keys)
    assert data.num_dropped == {"train": 1}
    assert data.groups.to_plain()["num_groups"] == {"train": 8, "test": 4}
    assert any("train: 8 images in 8 groups" in note for note in data.notes)
