"""Splits that are spelt otherwise: found, refused with their name, or named in a note; never passed over."""

from __future__ import annotations

from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.recipes.wrong_data import put_folder, put_idx_split, put_image
from tlscale.data.sources.open import ImageData, open_data
from tlscale.data.sources.split_names import role_of, role_within
from tlscale.errors import DataError
from tlscale.recipe.schema import DataSection


def open_source(source: str, path: Path, **keys) -> ImageData:
    return open_data(DataSection.model_validate({"source": source, "path": str(path), **keys}), 0)


def put_rows(folder: Path, column: str, values: list[str]) -> dict[str, list[str]]:
    put_folder(folder, a=len(values))
    paths = [f"a/{row}.png" for row in range(len(values))]
    return {"Path": paths, "Label": ["x", "y"] * (len(values) // 2), column: values}


def put_csv(folder: Path, columns: dict[str, list[str]]) -> Path:
    lines = [",".join(columns), *(",".join(map(str, row)) for row in zip(*columns.values(), strict=True))]
    (folder / "list.csv").write_text("\n".join(lines) + "\n")
    return folder / "list.csv"


def put_parquet(folder: Path, columns: dict[str, list[str]]) -> Path:
    pq.write_table(pa.table(columns), folder / "list.parquet")
    return folder / "list.parquet"


def test_names_of_roles():
    for name in ("test", "Test", " TEST", "testing", "tests", "test_set", "test-2", "testset"):
        assert role_of(name) == "test", name
    for name in ("Validation", "VAL", "valid", "dev", "val_split", "evaluation"):
        assert role_of(name) == "validation", name
    for name in ("contest", "latest", "tester", "valley", "a", "", "0"):
        assert role_of(name) is None, name
        assert role_within(name) is None, name
    for name in ("test_images", "imagesTest", "2-test-b", "my test data"):
        assert role_within(name) == "test", name


@pytest.mark.parametrize("put", [put_csv, put_parquet])
@pytest.mark.parametrize("column", ["split", "Split", "SPLIT", " split", "split "])
def test_the_split_column_is_found_however_it_is_spelt(tmp_path, column, put):
    file = put(tmp_path, put_rows(tmp_path, column, ["train"] * 6 + ["test"] * 4))
    data = open_source("manifest", file)
    assert data.identity["num_images"]["test"] == 4
    assert not any("IGNORED" in note for note in data.notes)


def test_two_spellings_of_the_split_column_must_be_told_apart(tmp_path):
    columns = put_rows(tmp_path, "Split", ["train"] * 6 + ["test"] * 4)
    with pytest.raises(DataError, match=r"columns 'Split', 'SPLIT' may all name the split"):
        open_source("manifest", put_csv(tmp_path, {**columns, "SPLIT": columns["Split"]}))
    both = put_csv(tmp_path, {**columns, "split": ["train"] * 8 + ["test"] * 2})
    data = open_source("manifest", both)
    assert data.identity["num_images"]["test"] == 2
    assert any("column 'Split' is not used" in note for note in data.notes)


@pytest.mark.parametrize("put", [put_csv, put_parquet])
@pytest.mark.parametrize("column", ["set", "subset", "partition", "fold", "phase"])
def test_a_column_that_names_splits_and_is_not_read_is_noted(tmp_path, column, put):
    values = ["Train", "train", "", "train", "VAL", "test"]
    data = open_source("manifest", put(tmp_path, put_rows(tmp_path, column, values)))
    (note,) = [note for note in data.notes if note.startswith("SPLITS IGNORED")]
    assert f"column {column!r} is not used" in note
    assert "'VAL', 'test'" in note


@pytest.mark.parametrize("put", [put_csv, put_parquet])
@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("set", ["train", "test", "extra", "extra"]),
        ("phase", ["unlabeled", "val", "train", "test"]),
        ("is_test", [True, False, False, True]),
        ("is_training_image", [1, 1, 0, 0]),
        ("inVal", ["no", "yes", "no", "yes"]),
    ],
)
def test_flags_and_columns_with_other_values_too_are_noted(tmp_path, column, values, put):
    data = open_source("manifest", put(tmp_path, put_rows(tmp_path, column, values)))
    (note,) = [note for note in data.notes if note.startswith("SPLITS IGNORED")]
    assert f"column {column!r} is not used" in note


@pytest.mark.parametrize("values", [["train"] * 4, ["0", "1", "2", "test"], ["left", "right"] * 2])
def test_other_columns_are_not_noted(tmp_path, values):
    data = open_source("manifest", put_csv(tmp_path, put_rows(tmp_path, "kind", values)))
    assert not any("IGNORED" in note for note in data.notes)


@pytest.mark.parametrize("value", ["Test", "testing", " test"])
def test_values_of_the_split_column_are_refused_by_name(tmp_path, value):
    file = put_csv(tmp_path, put_rows(tmp_path, "split", ["train"] * 4 + [value] * 2))
    with pytest.raises(DataError, match=rf"unknown split '{value}'.*Did you mean 'test'"):
        open_source("manifest", file)
    assert open_source("manifest", file, test_split=value).identity["num_images"]["test"] == 2


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("Test", "test"),
        ("testing", "test"),
        ("test_images", "test"),
        ("Validation", "validation"),
        ("dev", "validation"),
    ],
)
def test_a_folder_that_is_called_like_a_split_is_used_or_refused(tmp_path, name, role):
    put_folder(tmp_path, train__a=4, train__b=4, **{f"{name}__a": 2, f"{name}__b": 2})
    with pytest.raises(DataError, match=rf"unknown split '{name}'. Did you mean '{role}'\? .*data.{role}_split"):
        open_source("folder", tmp_path)
    data = open_source("folder", tmp_path, **{f"{role}_split": name})
    assert data.identity["num_images"][role] == 4


def test_a_folder_beside_splits_that_are_there_is_only_noted(tmp_path):
    put_folder(tmp_path, train__a=4, train__b=4, test__a=2, test_unlabelled__a=3, spare__a=1)
    data = open_source("folder", tmp_path)
    assert data.identity["num_images"]["test"] == 2
    assert any("'spare', 'test_unlabelled'" in note for note in data.notes)


def test_splits_beside_a_nested_training_split(tmp_path):
    put_folder(tmp_path, img__train__a=4, img__train__b=4, img__test__a=2)
    with pytest.raises(DataError, match=r"unknown split 'img/test'"):
        open_source("folder", tmp_path, train_split="img/train")


def test_folders_that_can_only_be_splits_are_no_classes(tmp_path):
    put_folder(tmp_path, train_images__a=2, test_images__a=2)
    with pytest.raises(DataError, match=r"data.train_split: .*no folder 'train'. Its folders are"):
        open_source("folder", tmp_path)
    for name in ("trains", "buses", "test tube"):  # these may well be classes
        put_image(tmp_path / "flat" / name / "0.png")
        put_image(tmp_path / "flat" / name / "1.png")
    assert open_source("folder", tmp_path / "flat").classes == ("buses", "test tube", "trains")


def test_idx_files_of_a_split_that_is_spelt_otherwise(tmp_path):
    put_idx_split(tmp_path, "train", [0, 1] * 4)
    put_idx_split(tmp_path, "Test", [0, 1])
    with pytest.raises(DataError, match=r"unknown split 'Test'"):
        open_source("idx", tmp_path)


def test_data_sets_on_disk(tmp_path):
    raw = put_image(tmp_path / "x.png").read_bytes()

    def rows(count: int, **columns) -> datasets.Dataset:
        images = [{"bytes": raw, "path": None}] * count
        made = datasets.Dataset.from_dict({"image": images, "label": ["x", "y"] * (count // 2), **columns})
        return made.cast_column("image", datasets.Image(decode=False))

    datasets.DatasetDict({"train": rows(6), "Test": rows(2)}).save_to_disk(str(tmp_path / "named"))
    with pytest.raises(DataError, match=r"unknown split 'Test'"):
        open_source("disk", tmp_path / "named")
    whole = rows(6, part=["train"] * 4 + ["test"] * 2, number=[1, 2, 3, 4, 5, 6])
    typed = whole.add_column("kind", ["train"] * 5 + ["val"]).class_encode_column("kind")
    datasets.DatasetDict({"train": typed}).save_to_disk(str(tmp_path / "whole"))
    data = open_source("disk", tmp_path / "whole", label_column="label")
    notes = [note for note in data.notes if note.startswith("SPLITS IGNORED")]
    assert ["'part'" in note for note in notes] == [True, False]
    assert ["'kind'" in note for note in notes] == [False, True]
