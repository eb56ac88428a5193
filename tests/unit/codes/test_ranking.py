"""A ranking holds the places of a class's images alone, and gives what all images in their order give, bit for bit."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tlscale.codes.probes.class_figures import ClassShares, class_rankings, mean_over
from tlscale.codes.probes.ranking import DEFAULT_THRESHOLD, Columns, Ranking, Samples
from tlscale.training.class_scores import error_over_rankings

SCORES = st.sampled_from([-1.0, 0.0, 0.1, 0.3, 0.3000001, 0.5, 0.9, 1.0])
SCORED = st.lists(st.tuples(st.booleans(), SCORES), max_size=40)


class InFull:
    """The same with all images in the descending order of their scores: how figures of older runs were computed."""

    def __init__(self, has_N, scores_N):
        self.order_M = np.argsort(-scores_N, kind="stable")
        self.has_M, sorted_M = has_N[self.order_M], scores_N[self.order_M]
        self.last_T = np.flatnonzero(np.append(sorted_M[1:] != sorted_M[:-1], len(sorted_M) > 0))
        self.scores_T = sorted_M[self.last_T]

    def drawn(self, figure, counts_SN):
        counts_SM = counts_SN[:, self.order_M]
        found_ST, taken_ST = (np.cumsum(some, axis=1)[:, self.last_T] for some in (counts_SM * self.has_M, counts_SM))
        if figure == "auroc":
            others_ST = np.diff(taken_ST - found_ST, prepend=0, axis=1)
            before_ST = np.concatenate([np.zeros_like(found_ST[:, :1]), found_ST[:, :-1]], axis=1)
            twice_S = (others_ST * (found_ST + before_ST)).sum(axis=1)
            return divided(divided(twice_S / 2, found_ST[:, -1:].sum(axis=1)), others_ST.sum(axis=1))
        precision_ST = found_ST / np.maximum(taken_ST, 1)
        shares_ST = divided(np.diff(found_ST, prepend=0, axis=1), found_ST[:, -1:])
        means_S = (shares_ST[:, None, :] @ precision_ST[:, :, None])[:, 0, 0]
        return np.where(found_ST[:, -1:].sum(axis=1) > 0, means_S, np.nan)

    def best_threshold(self):
        answered_T, found_T = self.scores_T >= 0, np.cumsum(self.has_M)[self.last_T]
        if not self.has_M.any() or not answered_T.any():
            return DEFAULT_THRESHOLD
        scores_T = self.scores_T[answered_T]
        lower_T = np.append(scores_T[1:], 0.0)
        f1_T = 2 * found_T[answered_T] / (self.has_M.sum() + (self.last_T + 1)[answered_T])
        middle_T = (scores_T + lower_T) / 2
        best = np.where(middle_T > lower_T, middle_T, scores_T)[f1_T == f1_T.max()]
        return float(best[np.abs(best - DEFAULT_THRESHOLD).argmin()])


def divided(parts, wholes):
    return np.divide(parts, wholes, out=np.full(parts.shape, np.nan), where=wholes > 0)


def counts_of(num_samples, num_images, seed=0):
    draws = np.random.default_rng(seed).integers(num_images, size=(num_samples, num_images))
    return np.stack([np.bincount(drawn, minlength=num_images) for drawn in draws])


def assert_same(has_N, scores_N, counts_SN):
    ranking, in_full = Ranking(has_N, scores_N), InFull(has_N, scores_N)
    once_1N = np.ones((1, len(scores_N)), np.int64)
    for figure, found in (("auroc", ranking.auroc()), ("mean_average_precision", ranking.average_precision())):
        (expected,) = in_full.drawn(figure, once_1N)
        assert (found is None) if np.isnan(expected) else (found == expected)
        for counts in (counts_SN, counts_SN[:1]):
            drawn_S = ranking.drawn(figure, Samples.of(counts), scores_N)
            np.testing.assert_array_equal(drawn_S, in_full.drawn(figure, counts))
    assert ranking.best_threshold() == in_full.best_threshold()


@settings(deadline=None, max_examples=150)
@given(SCORED)
def test_it_gives_the_bits_of_all_images_in_their_order(scored):
    has_N, scores_N = np.array([has for has, _ in scored], bool), np.array([score for _, score in scored], float)
    assert_same(has_N, scores_N, counts_of(5, len(scored)) if scored else np.zeros((5, 0), np.int64))


@pytest.mark.parametrize("share", [0.001, 0.4])
def test_of_many_images_too(share):
    """More than BLAS adds up by one thread: a sum of other numbers of zeros would have other last bits."""
    draws = np.random.default_rng(1)
    has_N = draws.random(12_000) < share
    assert_same(has_N, (draws.random(12_000) + 0.3 * has_N).round(5), counts_of(3, 12_000))


def test_counts_beyond_float32_are_exact():
    counts_SN = np.array([[2**24, 1, 3]])
    assert Samples.of(counts_SN).counts_NS.dtype == np.float64
    assert Samples.of(counts_SN // 2**10).counts_NS.dtype == np.float32
    has_N, scores_N = np.array([False, True, False]), np.array([0.9, 0.5, 0.1])
    (found,) = Ranking(has_N, scores_N).drawn("auroc", Samples.of(counts_SN), scores_N)
    assert found == 3 / (2**24 + 3)


def test_columns_are_those_of_the_matrix_as_often_as_wanted():
    values_NC = np.random.default_rng(0).random((7, 150))
    columns = Columns(values_NC)
    for _ in range(2):
        found = list(columns)
        assert all(column.flags.c_contiguous for column in found)
        np.testing.assert_array_equal(np.stack(found, axis=1), values_NC)


def test_shares_of_a_class_are_the_softmax():
    logits_NC = np.random.default_rng(0).normal(size=(5000, 70)).astype(np.float32)
    exact_NC = np.exp(logits_NC.astype(np.float64) - logits_NC.max(axis=1, keepdims=True))
    np.testing.assert_allclose(
        np.stack(list(ClassShares(logits_NC)), axis=1), exact_NC / exact_NC.sum(axis=1, keepdims=True), rtol=1e-13
    )


def test_many_classes_take_less_memory_than_the_probabilities_of_all():
    num_images, num_classes = 6000, 1000
    draws = np.random.default_rng(0)
    labels_N = draws.integers(num_classes, size=num_images)
    logits_NC = draws.standard_normal((num_images, num_classes), np.float32)
    error_over_rankings(
        "auroc", class_rankings(ClassShares(logits_NC[:9]), labels_N[:9]), ClassShares(logits_NC[:9]), labels_N[:9]
    )
    tracemalloc.start()  # after what is imported at first use
    try:
        shares = ClassShares(logits_NC)
        rankings = class_rankings(shares, labels_N)
        assert mean_over("auroc", rankings) == pytest.approx(0.5, abs=0.02)
        assert error_over_rankings("auroc", rankings, shares, np.arange(num_images)) > 0
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 2 * logits_NC.nbytes  # those would be two times as much, next to what is made of them
