"""Hold-outs and limits of images with several labels: every label by its share, and the same for ever."""

from __future__ import annotations

import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tlscale.data.sources.label_set_draws import LabelSetDraw, iterative_holdout, label_set_subset


def labels_of(num_images: int, shares, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((num_images, len(shares))) < np.array(shares)


@st.composite
def label_sets(draw):
    num_images, num_classes = draw(st.integers(1, 40)), draw(st.integers(2, 6))
    rows = st.lists(st.booleans(), min_size=num_classes, max_size=num_classes)
    return np.array(draw(st.lists(rows, min_size=num_images, max_size=num_images)), dtype=bool)


@given(label_sets(), st.sampled_from([0.1, 0.2, 1 / 3, 0.5]), st.integers(0, 5))
def test_no_label_loses_its_last_image(labels_NC, fraction, seed):
    held = iterative_holdout(labels_NC, np.arange(len(labels_NC)), fraction, seed)
    assert held.tolist() == sorted(set(held.tolist()))
    rest_NC = np.delete(labels_NC, held, axis=0)
    assert (rest_NC.any(axis=0) == labels_NC.any(axis=0)).all()
    can_spare = (~(labels_NC & (labels_NC.sum(axis=0) == 1)).any(axis=1)).any() and len(labels_NC) > 1
    assert bool(len(held)) == can_spare


@given(label_sets(), st.integers(0, 5))
def test_smaller_limits_are_subsets_that_have_every_label(labels_NC, seed):
    rows_N, before = np.arange(len(labels_NC)), set()
    used = int(labels_NC.any(axis=0).sum())
    for count in range(1, len(labels_NC) + 1):
        taken = set(label_set_subset(labels_NC, rows_N, count, seed).tolist())
        assert len(taken) == count
        assert before <= taken
        if count >= used:
            assert (labels_NC[sorted(taken)].any(axis=0) == labels_NC.any(axis=0)).all()
        before = taken


def test_every_label_has_its_share():
    labels_NC = labels_of(600, (0.5, 0.2, 0.1, 0.05, 0.02, 0.02))
    held_NC = labels_NC[iterative_holdout(labels_NC, np.arange(600), 0.2, seed=3)]
    assert abs(len(held_NC) - 120) <= 3
    off_C = np.abs(held_NC.sum(axis=0) - 0.2 * labels_NC.sum(axis=0))
    assert (off_C <= 1).all(), off_C  # what no draw at random does:
    at_random = [np.random.default_rng(seed).permutation(600)[:120] for seed in range(20)]
    worst = [np.abs(labels_NC[rows].sum(axis=0) - 0.2 * labels_NC.sum(axis=0)).max() for rows in at_random]
    assert min(worst) > off_C.max()


def test_a_limit_has_the_rare_labels_by_their_share():
    labels_NC = labels_of(600, (0.5, 0.2, 0.05, 0.02))
    taken_NC = labels_NC[label_set_subset(labels_NC, np.arange(600), 150, seed=1)]
    off_C = np.abs(taken_NC.sum(axis=0) - labels_NC.sum(axis=0) / 4)
    assert (off_C[2:] <= 1).all(), off_C


def test_the_draws_are_fixed_for_ever():
    labels_NC = labels_of(300, (0.4, 0.1, 0.03))
    rows_N = np.arange(7, 307)
    held = iterative_holdout(labels_NC, rows_N, 0.1, seed=5)
    taken = label_set_subset(labels_NC, rows_N, 60, seed=5)
    digests = [hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()[:16] for rows in (held, taken)]
    assert digests == ["ace8926710ffa826", "f71937715b80403e"]
    assert iterative_holdout(labels_NC, rows_N, 0.1, seed=6).tolist() != held.tolist()


def test_rows_of_a_file_stay_together():
    labels_NC = labels_of(90, (0.5, 0.3))[np.arange(90) // 3]
    draw = LabelSetDraw(labels_NC, np.arange(90) // 3)
    held = draw.holdout(np.arange(90), 0.2, seed=0)
    assert len(held) % 3 == 0
    assert np.unique(held // 3, return_counts=True)[1].tolist() == [3] * (len(held) // 3)
