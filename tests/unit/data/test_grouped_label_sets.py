"""Draws of whole groups whose images have several labels each: none is cut, and every label has its share."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.data.test_folds import table_of
from tests.unit.data.test_grouped_draws import SEEDS, are_whole, names_of, off_balance
from tlscale.data.sources.folds import draw_folds
from tlscale.data.sources.grouped_draws import Units, grouped_folds, grouped_holdout, grouped_subset
from tlscale.errors import DataError

# For each group the labels of its images, of which there are 3.
TABLES = st.lists(
    st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=6), min_size=2, max_size=24
)


def images_of(table) -> tuple[np.ndarray, Units]:
    labels_NC = np.array([labels for group in table for labels in group], dtype=bool)
    numbers_N = np.repeat(np.arange(len(table)), [len(group) for group in table])
    return labels_NC, Units(numbers_N, [f"g{number}" for number in range(len(table))])


def random_table(draws: np.random.Generator):
    """Groups of unequal sizes whose images have much the same labels, some of them rare."""
    shares_C = draws.choice([0.5, 0.2, 0.1, 0.05], size=int(draws.integers(2, 7)))
    table = []
    for size in draws.integers(1, draws.integers(2, 12), size=draws.integers(12, 60)):
        own_C = draws.random(len(shares_C)) < shares_C
        table.append([own_C ^ (draws.random(len(shares_C)) < 0.05) for _ in range(size)])
    return table


def shares_off(labels_NC: np.ndarray, folds_N: np.ndarray, num_folds: int) -> float:
    """How unequal the shares of the labels in the folds are, and that of all images: `off_balance` of each alone."""
    columns = [*labels_NC.T[labels_NC.any(axis=0)], np.ones(len(labels_NC), dtype=bool)]
    return float(np.mean([off_balance(np.zeros(has_N.sum()), folds_N[has_N], num_folds) for has_N in columns]))


def by_iterative_stratification(labels_NC: np.ndarray, units: Units, num_folds: int, seed: int) -> np.ndarray:
    """The rule of Sechidis, Tsoumakas and Vlahavas (2011, algorithm 1), with groups in place of images."""
    draws, num_groups = np.random.default_rng(seed), len(units.names)
    counts_GC = np.stack([labels_NC[units.numbers_N == unit].sum(axis=0) for unit in range(num_groups)])
    sizes_G, folds_G = units.sizes(), np.full(num_groups, -1)
    lacking_KC = np.tile(counts_GC.sum(axis=0) / num_folds, (num_folds, 1))
    lacking_K = np.full(num_folds, len(labels_NC) / num_folds)
    while (left_G := folds_G < 0).any():
        left_C = counts_GC[left_G].sum(axis=0)
        if left_C.any():
            label = int(np.where(left_C > 0, left_C, np.inf).argmin())
            own, wants_K = np.flatnonzero(left_G & (counts_GC[:, label] > 0)), lacking_KC[:, label]
        else:
            own, wants_K = np.flatnonzero(left_G), np.zeros(num_folds)
        for unit in draws.permutation(own):
            fold = max(range(num_folds), key=lambda k: (wants_K[k], lacking_K[k], draws.random()))
            folds_G[unit] = fold
            lacking_KC[fold] -= counts_GC[unit]
            lacking_K[fold] -= sizes_G[unit]
    return folds_G[units.numbers_N]


@settings(deadline=None, max_examples=40)
@given(TABLES, SEEDS, st.floats(0.001, 0.5))
def test_a_holdout_cuts_no_group_and_leaves_each_label(table, seed, fraction):
    labels_NC, units = images_of(table)
    held = grouped_holdout(labels_NC, units, fraction, seed)
    assert are_whole(units.numbers_N, held)
    assert (np.delete(labels_NC, held, axis=0).any(axis=0) == labels_NC.any(axis=0)).all()
    has_GC = np.array([np.any(group, axis=0) for group in table])
    can_spare = (~(has_GC & (has_GC.sum(axis=0) == 1)).any(axis=1)).any()
    assert bool(len(held)) == can_spare
    assert len(held) < len(labels_NC)


@settings(deadline=None, max_examples=40)
@given(TABLES, SEEDS, st.integers(2, 6))
def test_folds_have_each_image_once_and_cut_no_group(table, seed, num_folds):
    labels_NC, units = images_of(table)
    num_folds = min(num_folds, len(table))
    folds_N = grouped_folds(labels_NC, units, num_folds, seed)
    assert folds_N.shape == (len(labels_NC),)
    assert set(folds_N) <= set(range(num_folds))
    for fold in range(num_folds):
        assert are_whole(units.numbers_N, np.flatnonzero(folds_N == fold))


@settings(deadline=None, max_examples=40)
@given(TABLES, SEEDS, st.floats(0.01, 0.5), st.integers(2, 5), st.integers(0, 99))
def test_no_order_of_the_rows_matters(table, seed, fraction, num_folds, other_order):
    labels_NC, units = images_of(table)
    draws = np.random.default_rng(other_order)
    order_N, numbers_G = draws.permutation(len(labels_NC)), draws.permutation(len(table))
    names_G = [units.names[old] for old in np.argsort(numbers_G)]
    other_NC, others = labels_NC[order_N], Units(numbers_G[units.numbers_N][order_N], names_G)
    held = grouped_holdout(other_NC, others, fraction, seed)
    assert sorted(order_N[held]) == grouped_holdout(labels_NC, units, fraction, seed).tolist()
    names, count = names_of(labels_NC), max(3, len(labels_NC) // 2)
    kept = grouped_subset(other_NC, others, [names[row] for row in order_N], count, seed)
    assert sorted(order_N[kept]) == grouped_subset(labels_NC, units, names, count, seed).tolist()
    num_folds = min(num_folds, len(table))
    folds_N = grouped_folds(labels_NC, units, num_folds, seed)
    assert folds_N[order_N].tolist() == grouped_folds(other_NC, others, num_folds, seed).tolist()


@settings(deadline=None, max_examples=40)
@given(TABLES, SEEDS)
def test_smaller_limits_are_subsets_that_have_every_label(table, seed):
    labels_NC, units = images_of(table)
    before, used_C = set(), labels_NC.any(axis=0)
    for count in range(1, len(labels_NC) + 1):
        kept = grouped_subset(labels_NC, units, names_of(labels_NC), count, seed)
        assert len(kept) == count
        assert before <= set(kept.tolist())
        assert count < used_C.sum() or (labels_NC[kept].any(axis=0) == used_C).all()
        before = set(kept.tolist())


def test_folds_are_better_balanced_than_by_iterative_stratification_of_groups():
    draws, ours, theirs = np.random.default_rng(0), [], []
    for seed in range(40):
        labels_NC, units = images_of(random_table(draws))
        num_folds = int(draws.integers(2, 6))
        ours.append(shares_off(labels_NC, grouped_folds(labels_NC, units, num_folds, seed), num_folds))
        by_paper = by_iterative_stratification(labels_NC, units, num_folds, seed)
        theirs.append(shares_off(labels_NC, by_paper, num_folds))
    assert np.mean(ours) < np.mean(theirs)
    assert np.mean(np.array(ours) <= np.array(theirs) + 1e-12) > 0.9


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5])
def test_a_holdout_of_many_groups_has_each_label_by_its_share(fraction):
    rng = np.random.default_rng(3)
    labels_NC, units = images_of(
        [[rng.random(4) < (0.5, 0.2, 0.1, 0.05)] * int(rng.integers(1, 5)) for _ in range(300)]
    )
    held = grouped_holdout(labels_NC, units, fraction, 1)
    off_C = np.abs(labels_NC[held].sum(axis=0) - fraction * labels_NC.sum(axis=0))
    assert off_C.max() <= 1, off_C
    assert abs(len(held) - fraction * len(labels_NC)) <= 3
    groups = rng.permutation(300)[: round(300 * fraction)]
    by_luck_NC = labels_NC[np.isin(units.numbers_N, groups)]  # which no draw at random has
    assert np.abs(by_luck_NC.sum(axis=0) - fraction * labels_NC.sum(axis=0)).max() > 3


def test_images_without_labels_are_dealt_out_evenly():
    labels_NC, units = images_of([[(True, False, False)] * 2] * 4 + [[(False, False, False)]] * 40)
    folds_N = grouped_folds(labels_NC, units, 4, 0)
    assert np.bincount(folds_N).tolist() == [12] * 4
    assert np.bincount(folds_N[labels_NC[:, 0]]).tolist() == [2] * 4


def test_folds_of_a_table_are_of_whole_groups_and_a_label_of_one_group_is_an_error():
    labels_NC = np.array([[1, 0], [1, 1], [0, 0], [0, 1], [1, 0], [0, 0]], dtype=bool)
    names = ["a", "a", "b", "b", "c", "d"]
    (folds_N,) = draw_folds(table_of(labels_NC, names), np.arange(6), None, 2, 1, 0).folds_RN
    assert len(set(zip(names, folds_N.tolist(), strict=True))) == 4
    labels_NC[3, 1] = False
    with pytest.raises(DataError, match=r"class 1 \(such as data/1.png\) is in one of the groups alone"):
        draw_folds(table_of(labels_NC, names), np.arange(6), None, 2, 1, 0)


def test_draws_are_pinned():
    rng = np.random.default_rng(5)
    labels_NC, units = images_of([rng.random((int(rng.integers(1, 5)), 4)) < 0.3 for _ in range(40)])
    drawn = (
        grouped_holdout(labels_NC, units, 0.2, 0),
        grouped_subset(labels_NC, units, names_of(labels_NC), 20, 0),
        grouped_folds(labels_NC, units, 4, 0),
    )
    digests = [hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()[:16] for rows in drawn]
    assert digests == ["5a0f91fe700f5c1a", "262f8e01d0e387c7", "e56dc1c6865afe88"]
