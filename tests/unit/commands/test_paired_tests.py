"""Paired tests by hand: McNemar's, Holm's correction, and which runs may be paired."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.commands.test_compare_report import outcome
from tlscale.commands.compare_report import against_best, notes, table, to_rows, write_comparison
from tlscale.commands.paired_tests import (
    Pair,
    corrected,
    exact_p,
    exact_p_of_groups,
    paired_test,
    paired_tests,
    read_scored,
)
from tlscale.training.metrics import wilson


def put(folder, is_right, *, labels=None, offset=0, content=None, groups=None):
    """Predictions of images, of which some are right."""
    count = len(is_right)
    labels = labels if labels is not None else ["a"] * count
    folder.mkdir(parents=True, exist_ok=True)
    columns = {
        "path": [f"{number}.png" for number in range(offset, offset + count)],
        "row": list(range(offset, offset + count)),
        "true_label": labels,
        "label": [label if right else "other" for label, right in zip(labels, is_right, strict=True)],
    }
    columns |= {} if groups is None else {"group": pa.array(groups, pa.large_string())}
    pq.write_table(pa.table(columns), folder / "predictions.parquet")
    return read_scored(folder, content)


def by_counts(both, first, second, none):
    """Whether two runs are right, so many images of each kind."""
    return [[True] * (both + first) + [False] * (second + none), [True] * both + [False] * first + [True] * second]


def put_pair(tmp_path, both, first, second, none):
    one, other = by_counts(both, first, second, none)
    return put(tmp_path / "one", one), put(tmp_path / "other", other + [False] * none)


@settings(deadline=None)  # the first call imports scipy.stats
@given(first=st.integers(0, 40), second=st.integers(0, 40))
def test_the_p_value_is_the_share_of_coin_tosses_as_uneven(first, second):
    total = first + second
    as_uneven = [k for k in range(total + 1) if abs(2 * k - total) >= abs(first - second)]
    expected = Fraction(sum(math.comb(total, k) for k in as_uneven), 2**total)
    assert exact_p(first, second) == pytest.approx(float(expected), rel=1e-9)


@settings(deadline=None)  # as above
@given(st.lists(st.integers(-6, 6), max_size=9))
def test_the_p_value_of_groups_is_the_share_of_signs_with_as_large_a_sum(leads):
    signs = list(itertools.product((-1, 1), repeat=len(leads)))
    sums = [sum(sign * lead for sign, lead in zip(some, leads, strict=True)) for some in signs]
    expected = np.mean([abs(total) >= abs(sum(leads)) for total in sums])
    assert exact_p_of_groups(np.array(leads, dtype=np.int64)) == pytest.approx(expected, abs=1e-12)


@settings(deadline=None)  # as above
@given(st.integers(0, 30), st.integers(0, 30))
def test_groups_of_one_image_have_the_p_value_of_images(first, second):
    assert exact_p_of_groups(np.array([1] * first + [-1] * second + [0] * 3)) == exact_p(first, second)


def test_images_of_one_group_count_together(tmp_path):
    one, other = by_counts(10, 24, 0, 0)[0], [True] * 10 + [False] * 24
    plain = paired_test(34, "a", "b", [(put(tmp_path / "1", one), put(tmp_path / "2", other))])
    names = [None] * 10 + [f"patient{number // 8}" for number in range(24)]
    grouped = [put(tmp_path / str(at), right, groups=names) for at, right in enumerate((one, other))]
    pair = paired_test(34, "a", "b", [(grouped[0], grouped[1])])
    assert plain.num_groups is None
    assert plain.p < 1e-6
    assert (pair.num_groups, pair.num_first_only, pair.p) == (13, 24, 0.25)  # three patients, all one way: 2 / 2**3
    # Of seeds that hold out other images as well, and where only one of the two runs knew the groups.
    later = put(tmp_path / "5", one, offset=34, groups=names), put(tmp_path / "6", other, offset=34)
    both = paired_test(34, "a", "b", [(grouped[0], grouped[1]), later])
    assert (both.num_groups, both.num_first_only, both.p) == (23, 48, 0.25)


def test_p_values_at_the_ends():
    assert exact_p(0, 0) == 1.0
    assert exact_p(1, 0) == 1.0


@given(st.lists(st.floats(1e-6, 1.0), max_size=8))
def test_holms_correction(values):
    pairs = [Pair(1, "a", str(number), 10, 1, 2, p, p) for number, p in enumerate(values)]
    found = corrected(pairs)
    assert [pair.second for pair in found] == [pair.second for pair in pairs]
    ordered = sorted(values)
    for pair in found:
        # The largest of those up to it, each times the number of those that are not smaller.
        expected = max(min(1.0, (len(values) - rank) * p) for rank, p in enumerate(ordered) if p <= pair.p)
        assert pair.p_corrected == pytest.approx(expected)


def test_only_the_same_images_are_paired(tmp_path):
    scored = put(tmp_path / "a", [True] * 8 + [False] * 2)
    same = put(tmp_path / "b", [False] * 8 + [True] * 2)
    pair = paired_test(100, "a", "b", [(scored, same)])
    assert (pair.num_first_only, pair.num_second_only, pair.num_images) == (8, 2, 10)
    assert pair.p == pytest.approx(exact_p(8, 2))
    for other in (
        put(tmp_path / "c", [True] * 10, offset=1),
        put(tmp_path / "d", [True] * 10, labels=["a"] * 9 + ["b"]),
        put(tmp_path / "e", [True] * 9),
    ):
        assert paired_test(100, "a", "c", [(scored, other)]) is None
    assert paired_test(100, "a", "c", []) is None
    assert read_scored(tmp_path / "nowhere") is None


def test_images_are_paired_by_content_where_both_runs_noted_it(tmp_path):
    scored = put(tmp_path / "a", [True] * 8 + [False] * 2, content="c")
    copied = put(tmp_path / "b", [False] * 8 + [True] * 2, offset=100, content="c")  # under other names
    pair = paired_test(100, "a", "b", [(scored, copied)])
    assert (pair.num_first_only, pair.num_second_only, pair.num_images) == (8, 2, 10)
    changed = put(tmp_path / "d", [True] * 10, content="d")  # other pixels under the same names
    assert paired_test(100, "a", "d", [(scored, changed)]) is None
    older = put(tmp_path / "e", [True] * 10)
    assert paired_test(100, "a", "e", [(scored, older)]) is not None
    assert paired_test(100, "b", "e", [(copied, older)]) is None


def test_over_seeds_an_image_counts_once(tmp_path):
    """Two seeds are not twice as many images."""
    seeds = [
        (put(tmp_path / f"one{seed}", [True] * 6 + [False]), put(tmp_path / f"other{seed}", [False] * 6 + [True]))
        for seed in range(2)
    ]
    pair = paired_test(100, "a", "b", seeds)
    assert (pair.num_images, pair.num_first_only, pair.num_second_only) == (7, 6, 1)
    # Held-out images of other seeds are others, and some of them the same.
    moved = [(put(tmp_path / "x", [True] * 4, offset=5), put(tmp_path / "y", [False] * 4, offset=5))]
    pair = paired_test(100, "a", "b", [seeds[0], *moved])
    assert (pair.num_images, pair.num_first_only, pair.num_second_only) == (9, 8, 0)  # image 6: one each


# -- in a comparison --------------------------------------------------------------------------------------------------


def outcome_at(folder, variant, is_right, **figures):
    put(folder / variant, is_right)
    hits, count = sum(is_right), len(is_right)
    values = {"interval95": tuple(wilson(hits, count)), "num_images": count, **figures}
    made = outcome(variant, hits / count, **values)
    return type(made)(**{**vars(made), "folder": str(folder / variant)})


def test_overlapping_intervals_do_not_say_that_two_are_alike(tmp_path):
    """3 against 17 images of 200: the intervals overlap widely, and p is 0.0026."""
    one, other = by_counts(150, 17, 3, 30)
    outcomes = [outcome_at(tmp_path, "a", one), outcome_at(tmp_path, "b", other + [False] * 30)]
    assert outcomes[0].interval95[0] < outcomes[1].interval95[1]
    rows = to_rows(outcomes)
    pairs = paired_tests(rows)
    assert [pair.p for pair in pairs] == [pytest.approx(0.00258, rel=1e-2)]
    assert against_best(rows[1], rows, pairs) == "-7.0 points (p 0.0026)"
    figures = write_comparison(tmp_path, "x", outcomes, pairs=pairs)
    assert figures["pairs"][0]["distinguishable"] is True
    assert "-7.0 points (p 0.0026)" in (tmp_path / "compare.md").read_text()


def test_p_values_are_corrected_for_all_pairs_of_a_size(tmp_path):
    rng = np.random.default_rng(0)
    base = rng.random(300) < 0.7
    flips = {"a": 0, "b": 8, "c": 16, "d": 24}
    outcomes = []
    for name, count in flips.items():
        right = base.copy()
        right[np.flatnonzero(base)[:count]] = False
        outcomes.append(outcome_at(tmp_path, name, right.tolist()))
    pairs = paired_tests(to_rows(outcomes))
    assert len(pairs) == 6
    raw = sorted(pair.p for pair in pairs)
    assert min(pair.p_corrected for pair in pairs) == pytest.approx(6 * raw[0])
    # a and b differ by 8 of 8: 0.0078 alone, and not so among six pairs.
    verdict = table(outcomes, pairs)[1][4]
    assert next(pair.p for pair in pairs if pair.joins("a", "b")) == pytest.approx(2 / 2**8)
    assert verdict.startswith("-2.7 points (p ")
    assert float(verdict.rpartition(" ")[2].rstrip(")")) > 2 / 2**8


def test_runs_of_an_older_version_are_compared_without_a_test(tmp_path):
    outcomes = [outcome_at(tmp_path, "a", [True] * 9 + [False]), outcome("b", 0.5, num_images=10)]
    rows = to_rows(outcomes)
    pairs = paired_tests(rows)
    assert pairs == []
    assert against_best(rows[1], rows, pairs) == "-40.0 points, no paired test"
    assert any("runs/b_1000_s0" in note and "predictions.parquet" in note for note in notes(outcomes, pairs))
