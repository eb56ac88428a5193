"""Draws of whole groups: none is cut, no order of rows matters, and classes are as balanced as by scikit-learn."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import StratifiedGroupKFold

from tlscale.data.sources.grouped_draws import Units, grouped_folds, grouped_holdout, grouped_subset

SEEDS = st.integers(0, 2**63 - 5)
# For each group the classes of its images.
TABLES = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=9), min_size=2, max_size=30)


def images_of(table: list[list[int]]) -> tuple[np.ndarray, Units]:
    labels_N = np.array([label for group in table for label in group], dtype=np.int64)
    numbers_N = np.repeat(np.arange(len(table)), [len(group) for group in table])
    return labels_N, Units(numbers_N, [f"g{number}" for number in range(len(table))])


def names_of(labels_N: np.ndarray) -> list[str]:
    return [f"{row}.png" for row in range(len(labels_N))]


def shuffled(table: list[list[int]], seed: int) -> tuple[np.ndarray, np.ndarray, Units]:
    """The same images in another order, with other numbers for the same groups; and where each came from."""
    labels_N, units = images_of(table)
    draws = np.random.default_rng(seed)
    order_N, numbers_G = draws.permutation(len(labels_N)), draws.permutation(len(table))
    names = [""] * len(table)
    for old, new in enumerate(numbers_G):
        names[new] = units.names[old]
    return order_N, labels_N[order_N], Units(numbers_G[units.numbers_N][order_N], names)


def are_whole(numbers_N: np.ndarray, chosen: np.ndarray) -> bool:
    return not set(numbers_N[chosen].tolist()) & set(np.delete(numbers_N, chosen).tolist())


@settings(deadline=None, max_examples=40)
@given(TABLES, SEEDS, st.floats(0.001, 0.5))
def test_a_holdout_cuts_no_group_and_leaves_each_class(table, seed, fraction):
    labels_N, units = images_of(table)
    held = grouped_holdout(labels_N, units, fraction, seed)
    assert are_whole(units.numbers_N, held)
    assert set(np.delete(labels_N, held)) == set(labels_N)
    single = [label for label in set(labels_N) if sum(label in group for group in table) == 1]
    spare = [group for group in table if not set(group) & set(single)]
    assert bool(len(held)) == bool(spare)


@settings(deadline=None, max_examples=40)
@given(TABLES, SEEDS, st.floats(0.01, 0.5), st.integers(2, 5), st.integers(0, 99))
def test_no_order_of_the_rows_matters(table, seed, fraction, num_folds, other_order):
    labels_N, units = images_of(table)
    order_N, other_labels_N, other_units = shuffled(table, other_order)
    held = grouped_holdout(labels_N, units, fraction, seed)
    other_held = grouped_holdout(other_labels_N, other_units, fraction, seed)
    assert sorted(order_N[other_held]) == held.tolist()
    names, count = names_of(labels_N), max(len(set(labels_N)), len(labels_N) // 2)
    kept = grouped_subset(labels_N, units, names, count, seed)
    other_names = [names[row] for row in order_N]
    assert sorted(order_N[grouped_subset(other_labels_N, other_units, other_names, count, seed)]) == kept.tolist()
    if num_folds <= len(table):
        folds_N = grouped_folds(labels_N, units, num_folds, seed)
        assert folds_N[order_N].tolist() == grouped_folds(other_labels_N, other_units, num_folds, seed).tolist()


@settings(deadline=None, max_examples=40)
@given(TABLES, SEEDS, st.integers(2, 6))
def test_folds_have_each_image_once_and_cut_no_group(table, seed, num_folds):
    labels_N, units = images_of(table)
    if num_folds > len(table):
        return
    folds_N = grouped_folds(labels_N, units, num_folds, seed)
    assert folds_N.shape == labels_N.shape
    assert set(folds_N) <= set(range(num_folds))
    for fold in range(num_folds):
        assert are_whole(units.numbers_N, np.flatnonzero(folds_N == fold))


@settings(deadline=None, max_examples=40)
@given(TABLES, SEEDS, st.data())
def test_a_subset_is_nested_has_all_classes_and_few_cut_groups(table, seed, data):
    labels_N, units = images_of(table)
    num_classes = len(set(labels_N))
    small = data.draw(st.integers(num_classes, len(labels_N)))
    large = data.draw(st.integers(small, len(labels_N)))
    chosen, more = (grouped_subset(labels_N, units, names_of(labels_N), count, seed) for count in (small, large))
    assert len(chosen) == small
    assert np.array_equal(chosen, np.unique(chosen))
    assert set(chosen) <= set(more)
    assert set(labels_N[chosen]) == set(labels_N)
    numbers, counts = np.unique(units.numbers_N[chosen], return_counts=True)
    cut = int((counts < units.sizes()[numbers]).sum())
    assert cut <= num_classes + 1  # the first image of each class, and the last group


def off_balance(labels_N: np.ndarray, folds_N: np.ndarray, num_folds: int) -> float:
    """How unequal the classes' shares in the folds are: the figure that scikit-learn's rule keeps low."""
    classes = np.unique(labels_N)
    shares = [[np.mean(folds_N[labels_N == label] == fold) for fold in range(num_folds)] for label in classes]
    return float(np.mean(np.std(shares, axis=1)))


def by_scikit_learn(labels_N: np.ndarray, units: Units, num_folds: int, seed: int) -> np.ndarray:
    folds_N = np.full(len(labels_N), -1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes with fewer images than folds
        splitter = StratifiedGroupKFold(num_folds, shuffle=True, random_state=seed % 2**32)
        for fold, (_, held) in enumerate(splitter.split(labels_N, labels_N, units.numbers_N)):
            folds_N[held] = fold
    return folds_N


@settings(deadline=None, max_examples=40)
@given(TABLES, SEEDS, st.integers(2, 5))
def test_folds_are_about_as_balanced_as_scikit_learns(table, seed, num_folds):
    labels_N, units = images_of(table)
    if num_folds > len(table) or np.bincount(labels_N).max() < num_folds:
        return
    ours = off_balance(labels_N, grouped_folds(labels_N, units, num_folds, seed), num_folds)
    theirs = off_balance(labels_N, by_scikit_learn(labels_N, units, num_folds, seed), num_folds)
    largest = max(group.count(label) / np.sum(labels_N == label) for group in table for label in set(group))
    assert ours <= theirs + largest / 2  # on no table far from it, and on average better:


def test_folds_are_better_balanced_than_scikit_learns_on_average():
    draws, ours, theirs, held = np.random.default_rng(0), [], [], []
    for seed in range(40):
        num_classes, num_folds = draws.integers(2, 6), int(draws.integers(2, 6))
        sizes = draws.integers(1, draws.integers(2, 15), size=draws.integers(8, 50))
        pure = draws.random() < 0.5
        table = [
            ([draws.integers(num_classes)] * size if pure else draws.integers(num_classes, size=size)) for size in sizes
        ]
        labels_N, units = images_of([list(map(int, group)) for group in table])
        if np.bincount(labels_N).max() < num_folds:
            continue
        ours.append(off_balance(labels_N, grouped_folds(labels_N, units, num_folds, seed), num_folds))
        theirs.append(off_balance(labels_N, by_scikit_learn(labels_N, units, num_folds, seed), num_folds))
        # A hold-out of one part in K, and the first of scikit-learn's folds.
        by_rule = grouped_holdout(labels_N, units, 1 / num_folds, seed)
        first = np.flatnonzero(by_scikit_learn(labels_N, units, num_folds, seed) == 0)
        totals_C = np.bincount(labels_N)
        held.append(
            [
                np.mean(
                    np.abs(
                        np.bincount(labels_N[some], minlength=len(totals_C)) / np.maximum(totals_C, 1) - 1 / num_folds
                    )
                )
                for some in (by_rule, first)
            ]
        )
    assert len(ours) > 30
    assert np.mean(held, axis=0)[0] < np.mean(held, axis=0)[1]
    assert np.mean(ours) < np.mean(theirs)
    assert np.mean(np.array(ours) <= np.array(theirs) + 1e-12) > 0.8


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.2, 0.3, 0.5])
def test_a_holdout_of_many_groups_is_of_its_size_and_stratified(fraction):
    labels_N, units = images_of([[group % 10 // 7] * (1 + group % 6) for group in range(200)])
    held = grouped_holdout(labels_N, units, fraction, 3)
    shares = np.bincount(labels_N[held]) / np.bincount(labels_N)
    assert np.abs(shares - fraction).max() < 0.01


def test_one_large_group_is_not_held_out_and_seeds_draw_others():
    labels_N, units = images_of([[0, 1] * 40, *[[0, 1]] * 20])
    draws = {tuple(grouped_holdout(labels_N, units, 0.1, seed)) for seed in range(0, 80, 8)}
    assert len(draws) > 5
    assert all(min(held) >= 80 and 8 <= len(held) <= 16 for held in draws)


def test_groups_that_stay_are_not_held_out():
    labels_N, units = images_of([[0, 1]] * 12)
    for fraction in (0.1, 0.3, 0.5):
        held = grouped_holdout(labels_N, units, fraction, 1, stay=range(8))
        assert len(held)
        assert set(units.numbers_N[held]) <= set(range(8, 12))


def test_draws_are_pinned():
    # Another choice in another version would silently be another data set.
    labels_N, units = images_of([[group % 3] * (1 + group % 4) for group in range(24)])
    names = names_of(labels_N)
    assert grouped_holdout(labels_N, units, 0.2, 0).tolist() == [3, 4, 5, 20, 30, 43, 44, 45, 46, 47, 48, 49]
    assert grouped_subset(labels_N, units, names, 9, 0).tolist() == [0, 3, 10, 11, 12, 21, 22, 31, 32]
    assert grouped_folds(labels_N, units, 4, 0)[units.numbers_N.searchsorted(range(24))].tolist() == [
        0,
        3,
        0,
        0,
        1,
        1,
        2,
        1,
        2,
        2,
        3,
        2,
        1,
        2,
        1,
        1,
        0,
        0,
        3,
        0,
        3,
        3,
        2,
        3,
    ]
