"""Folders as people have them: which folder is the class, which are splits, and what has no place."""

from pathlib import Path

import pytest

from tlscale.data.folder_layout import lay_out
from tlscale.data.sources.excluded import write_excluded
from tlscale.data.sources.open import open_data
from tlscale.errors import DataError
from tlscale.recipe.schema import DataSection


def made(root: Path, *files: str) -> Path:
    for number, name in enumerate(files):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir(exist_ok=True)
        else:
            path.write_bytes(b"%d" % number)
    return root


def classes_of(root: Path, **keys) -> dict[str, int]:
    layout = lay_out(root)
    write_excluded(root.parent / "out.csv", layout.left_out.items())
    if layout.left_out:
        keys["exclude"] = str(root.parent / "out.csv")
    keys |= {f"{role}_split": name for role, name in layout.splits.items()}
    section = DataSection(
        source="folder", path=str(root), class_folder=layout.class_folder, validation_fraction=0, **keys
    )
    data = open_data(section, 0)
    counts = dict.fromkeys(data.classes, 0)
    for label in data.train.labels_N:
        counts[data.classes[label]] += 1
    return counts


CASES = {
    "plain": (("ash/1.jpg", "ash/2.jpg", "oak/1.jpg"), None, {"ash": 2, "oak": 1}),
    "folders in a class": (("ash/1.jpg", "ash/young/2.jpg", "oak/old/x/1.jpg"), "top", {"ash": 2, "oak": 1}),
    "by year": (
        ("2023/ash/1.jpg", "2024/ash/2.jpg", "2023/oak/1.jpg", "2024/oak/9.jpg"),
        "parent",
        {"ash": 2, "oak": 2},
    ),
    "all in one folder": (("all/ash/1.jpg", "all/oak/1.jpg"), "parent", {"ash": 1, "oak": 1}),
    "an old copy beside": (("ash/1.jpg", "oak/2.jpg", "old/ash/3.jpg"), "parent", {"ash": 2, "oak": 1}),
    "by tree": (("ash/tree1/1.jpg", "ash/tree2/2.jpg", "oak/tree7/1.jpg"), "top", {"ash": 2, "oak": 1}),
    "one deeper than the other": (("ash/1.jpg", "oak/in/2.jpg"), "top", {"ash": 1, "oak": 1}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_class_is_the_folder_that_people_mean(case, tmp_path):
    files, class_folder, counts = CASES[case]
    root = made(tmp_path / "photos", *files)
    layout = lay_out(root)
    assert (layout.class_folder, layout.left_out, layout.splits) == (class_folder, {}, {})
    assert classes_of(root) == counts


def test_what_has_no_place_is_listed_with_its_reason(tmp_path):
    root = made(
        tmp_path / "photos",
        *("ash/1.jpg", "ash/notes.txt", "ash/README", "oak/1.jpg", "lost.jpg", "labels.xml", "empty/", ".hidden/1.jpg"),
    )
    (root / "oak" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    layout = lay_out(root)
    assert set(layout.left_out) == {"ash/notes.txt", "ash/README", "lost.jpg", "labels.xml", "empty", "oak/gone.jpg"}
    assert "ending .txt" in layout.left_out["ash/notes.txt"]
    assert "no class folder" in layout.left_out["lost.jpg"]
    assert classes_of(root) == {"ash": 1, "oak": 1}


@pytest.mark.parametrize("names", [("train", "test"), ("Training", "Testing"), ("train_images", "test_images")])
def test_splits_are_found_however_they_are_spelt(names, tmp_path):
    train, test = names
    root = made(
        tmp_path / "photos",
        *(f"{train}/ash/1.jpg", f"{train}/oak/1.jpg", f"{test}/ash/2.jpg", f"{test}/oak/2.jpg", f"{train}/lost.jpg"),
    )
    layout = lay_out(root)
    assert layout.splits == {"train": train, "test": test}
    assert set(layout.left_out) == {f"{train}/lost.jpg"}
    assert classes_of(root) == {"ash": 1, "oak": 1}


def test_a_folder_in_no_split_is_left_out(tmp_path):
    root = made(tmp_path / "p", "train/a/1.jpg", "train/b/1.jpg", "test/a/2.jpg", "extra/a/3.jpg")
    assert lay_out(root).left_out == {"extra": "a folder that is none of the splits train, test"}


WRONG = {
    "no images": (("notes.txt",), "no image in it"),
    "no folders": (("1.jpg", "2.jpg"), "none of them in a class folder"),
    "only a test split": (("test/ash/1.jpg", "test/oak/1.jpg"), "nothing to train on"),
    "classes beside a test split": (("ash/1.jpg", "oak/1.jpg", "test/ash/2.jpg"), "into a folder 'train'"),
    "two test splits": (("train/a/1.jpg", "test/a/1.jpg", "testing/a/1.jpg"), "may both be the test split"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_layout_that_cannot_be_told_says_what_to_do(case, tmp_path):
    files, words = WRONG[case]
    with pytest.raises(DataError) as caught:
        lay_out(made(tmp_path / "photos", *files))
    assert words in str(caught.value)


def test_links_in_a_circle_end(tmp_path):
    root = made(tmp_path / "photos", "ash/1.jpg", "oak/1.jpg")
    (root / "ash" / "again").symlink_to(root / "ash", target_is_directory=True)
    assert lay_out(root).class_folder is None
    section = DataSection(source="folder", path=str(root), class_folder="top")
    with pytest.raises(DataError, match="round in a circle"):
        open_data(section, 0)


def test_masks_and_originals_beside_pictures_are_no_images(tmp_path):
    root = made(tmp_path / "photos", "ash/1.jpg", "oak/1.jpg", "ash/1.npy", "masks/1.npy")
    assert lay_out(root).left_out == {
        "ash/1.npy": "arrays next to pictures",
        "masks/1.npy": "arrays next to pictures",
        "masks": "a folder without an image",
    }
    assert classes_of(root) == {"ash": 1, "oak": 1}
    with pytest.raises(DataError, match=r"several kinds by their endings: pictures, such as 'ash/1.jpg'; arrays, such"):
        open_data(DataSection(source="folder", path=str(root)), 0)
    arrays = made(tmp_path / "arrays", "ash/1.npy", "oak/2.NPY", "oak/3.npy")
    assert classes_of(arrays) == {"ash": 1, "oak": 2}
