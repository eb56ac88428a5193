"""Folds hold each image once a repeat, cut no group, keep the classes' shares, and hang on no order of rows."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tlscale.data.sources.folds import draw_folds
from tlscale.data.sources.stores import FileStore
from tlscale.data.sources.tables import LabelledTable
from tlscale.errors import DataError

SEEDS = st.integers(0, 2**63 - 1)


def table_of(labels, groups=None, order=None) -> LabelledTable:
    """Files 0.png, 1.png, ... listed in some order."""
    order = np.arange(len(labels)) if order is None else order
    paths_N = pa.array([f"{row}.png" for row in order], pa.large_string())
    store = FileStore("data", paths_N, "content", np.zeros((len(labels), 5), np.int64), 0)
    groups_N = None if groups is None else pa.array([groups[row] for row in order], pa.large_string())
    return LabelledTable(store, np.array(labels, dtype=np.int64)[order], groups_N)


def rows_of(labels) -> np.ndarray:
    return np.arange(len(labels), dtype=np.int64)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=40), SEEDS, st.integers(2, 5), st.integers(1, 3), st.randoms())
def test_without_groups_folds_are_as_even_as_they_can_be(labels, seed, num_folds, num_repeats, random):
    labels = labels + sorted(set(labels)) + [0] * num_folds  # two or more of each
    folds_RN = draw_folds(table_of(labels), rows_of(labels), None, num_folds, num_repeats, seed).folds_RN
    assert folds_RN.shape == (num_repeats, len(labels))
    assert set(folds_RN.ravel()) <= set(range(num_folds))
    for folds_N in folds_RN:
        for label in set(labels):
            counts = np.bincount(folds_N[np.array(labels) == label], minlength=num_folds)
            assert counts.max() - counts.min() <= 1
        sizes = np.bincount(folds_N, minlength=num_folds)
        assert sizes.max() - sizes.min() <= len(set(labels))
    order = list(range(len(labels)))
    random.shuffle(order)
    other = draw_folds(table_of(labels, order=np.array(order)), rows_of(labels), None, num_folds, num_repeats, seed)
    assert np.array_equal(other.folds_RN, folds_RN[:, order])


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(1, 6)), min_size=3, max_size=15), SEEDS, st.integers(2, 5))
def test_with_groups_each_image_is_held_once_and_no_group_is_cut(groups, seed, num_folds):
    groups = [*groups, (0, 2), (1, 2), (0, 1), (1, 1)]
    labels = [label for label, size in groups for _ in range(size)]
    names = [f"patient{number}" for number, (_, size) in enumerate(groups) for _ in range(size)]
    folds_RN = draw_folds(table_of(labels, names), rows_of(labels), None, num_folds, 2, seed).folds_RN
    for folds_N in folds_RN:
        assert len(set(zip(names, folds_N.tolist(), strict=True))) == len(groups)
        held = [np.flatnonzero(folds_N == fold) for fold in range(num_folds)]
        assert sorted(np.concatenate(held).tolist()) == rows_of(labels).tolist()


def test_rows_of_one_file_are_in_one_fold_and_some_rows_may_be_missing():
    labels, files_N = [0, 1] * 10, np.arange(20) // 2
    (folds_N,) = draw_folds(table_of(labels), np.arange(2, 20), files_N, 3, 1, 0).folds_RN
    assert folds_N.shape == (18,)
    assert all(len(set(folds_N[start : start + 2])) == 1 for start in range(0, 18, 2))


def test_repeats_are_draws_of_their_own():
    labels = [0, 1] * 20
    folds_RN = draw_folds(table_of(labels), rows_of(labels), None, 4, 3, 7).folds_RN
    assert len({tuple(folds_N) for folds_N in folds_RN}) == 3
    assert np.array_equal(draw_folds(table_of(labels), rows_of(labels), None, 4, 1, 7).folds_RN[0], folds_RN[0])


def test_folds_that_cannot_be_had_are_an_error():
    labels, names = [0, 0, 1, 1, 1], ["a", "b", "c", "c", "c"]
    with pytest.raises(DataError, match=r"evaluate.folds: 4 is more than the 3 groups"):
        draw_folds(table_of(labels, names), rows_of(labels), None, 4, 1, 0)
    with pytest.raises(DataError, match=r"class 1 \(such as data/2.png\) is in one of the groups alone"):
        draw_folds(table_of(labels, names), rows_of(labels), None, 2, 1, 0)
