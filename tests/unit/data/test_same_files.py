"""Rows that are one and the same file: one label, one side of the hold-out, and a warning across splits."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.recipes.wrong_data import put_folder
from tlscale.data.sources.open import ImageData, open_data
from tlscale.data.sources.splits import choose_splits, number_source
from tlscale.data.sources.stores import ArrayStore
from tlscale.data.sources.tables import Source, SourceSplit
from tlscale.errors import EXIT_BAD_INPUT, DataError
from tlscale.recipe.schema import DataSection


def open_source(source: str, path: Path, seed: int = 0, **keys) -> ImageData:
    return open_data(DataSection.model_validate({"source": source, "path": str(path), **keys}), seed)


def put_list(folder: Path, rows: list[str], head: str = "path,label") -> Path:
    (folder / "list.csv").write_text("\n".join([head, *rows]) + "\n")
    return folder / "list.csv"


def files(split) -> set[str]:
    return {os.path.realpath(split.where(i)) for i in range(len(split))}


def spellings(folder: Path) -> list[str]:
    """Names of a/0.png: as it is, otherwise, absolute, by a link to it and by one to its folder."""
    (folder / "a" / "link.png").symlink_to(folder / "a" / "0.png")
    (folder / "alias").symlink_to(folder / "a")
    return ["a/0.png", "./a//0.png", "b/../a/0.png", str(folder / "a" / "0.png"), "a/link.png", "alias/0.png"]


@pytest.mark.parametrize("number", range(6))
def test_one_file_with_two_labels_is_an_error_with_an_example(tmp_path, number):
    put_folder(tmp_path, a=4, b=4)
    name = spellings(tmp_path)[number]
    rows = ["a/0.png,cat", "a/1.png,cat", "b/0.png,dog", "b/1.png,dog"]
    with pytest.raises(DataError, match=r"1 file has two labels: .*0.png is 'cat' and .* is 'dog'") as caught:
        open_source("manifest", put_list(tmp_path, [*rows, f"{name},dog"]))
    assert caught.value.exit_code == EXIT_BAD_INPUT
    assert "two labels" not in str(open_source("manifest", put_list(tmp_path, [*rows, f"{name},cat"])).notes)


def test_one_file_in_two_class_folders_is_an_error(tmp_path):
    put_folder(tmp_path, a=2, b=2)
    (tmp_path / "b" / "far.png").symlink_to(tmp_path / "a" / "0.png")
    with pytest.raises(DataError, match=r"two labels: .*/a/0.png is 'a' and .*/b/far.png is 'b'"):
        open_source("folder", tmp_path)


@pytest.mark.parametrize("number", range(6))
def test_one_file_in_two_splits_is_said_loudly(tmp_path, number):
    put_folder(tmp_path, a=4, b=4)
    name = spellings(tmp_path)[number]
    rows = ["a/0.png,x,train", "b/0.png,y,train", "b/1.png,y,test", f"{name},x,test"]
    data = open_source("manifest", put_list(tmp_path, rows, "path,label,split"), validation_fraction=0.0)
    (note,) = [note for note in data.notes if note.startswith("LEAK")]
    assert "1 file in both train and test" in note


def test_a_file_in_train_and_test_folders_is_said_loudly(tmp_path):
    put_folder(tmp_path, train__a=2, train__b=2, test__a=1)
    os.link(tmp_path / "train" / "a" / "0.png", tmp_path / "test" / "a" / "again.png")
    assert any(note.startswith("LEAK") for note in open_source("folder", tmp_path).notes)


@pytest.mark.parametrize("limit", [None, 30])
@pytest.mark.parametrize("seed", range(3))
def test_rows_of_one_file_stay_on_one_side(tmp_path, seed, limit):
    put_folder(tmp_path, a=20, b=20)
    rows = [f"{name}/{row}.png,{name}" for name in "ab" for row in range(20)]
    again = [f"./{row}" for row in rows[::2]]
    data = open_source("manifest", put_list(tmp_path, rows + again), seed, validation_fraction=0.3, train_limit=limit)
    assert data.validation is not None
    assert not files(data.train) & files(data.validation)
    assert len(data.train) + len(data.validation) == (limit or 60)
    assert len(data.validation) > 4
    assert any("20 rows name a file that another row names too" in note for note in data.notes)


@given(st.lists(st.integers(0, 3), min_size=8, max_size=60), st.integers(0, 2**40))
def test_draws_are_as_they_were_where_no_file_comes_twice(labels, seed):
    labels_N = np.array([0, 0, 1, 1, *labels], dtype=np.int64)
    store = ArrayStore("x.idx", np.zeros((len(labels_N), 2, 2), np.uint8), "sum")
    section = DataSection.model_validate({"source": "folder", "path": "p", "train_limit": len(labels_N) - 2})
    plain, with_numbers = (
        choose_splits(
            section,
            number_source(
                section, Source("p", {"train": SourceSplit("train", store, tuple("abcd"), labels_N, files_N)})
            ),
            seed,
        )
        for files_N in (None, np.random.default_rng(seed).permutation(len(labels_N)).astype(np.int64))
    )
    for role in ("train", "validation"):
        assert np.array_equal(plain.splits[role].rows_N, with_numbers.splits[role].rows_N)
