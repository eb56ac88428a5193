"""The temperature and the sets of labels: that of the least cross-entropy, and a sober one of few images."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from tlscale.data.sources.tables import joined_labels
from tlscale.models.calibration import Calibration, LabelSets
from tlscale.training.calibration import choose_calibration, choose_temperature, drawn_rows, set_threshold
from tlscale.training.prediction_figures import share_interval


def drawn(count, num_classes, temperature, seed=0):
    """Logits, and labels that occur as often as the softmax with this temperature says."""
    draws = np.random.default_rng(seed)
    logits_NC = draws.normal(0, 3, (count, num_classes)).astype(np.float32)
    return (logits_NC / temperature + draws.gumbel(size=logits_NC.shape)).argmax(1), logits_NC


@pytest.mark.parametrize("temperature", [0.4, 1.0, 2.5])
def test_the_temperature_of_the_labels_is_found(temperature):
    labels_N, logits_NC = drawn(20_000, 5, temperature)
    chosen = choose_calibration(labels_N, logits_NC)
    assert chosen.temperature == pytest.approx(temperature, rel=0.03)
    assert chosen.num_images == 20_000


def test_it_has_the_least_cross_entropy_against_targets_of_a_little_less_than_one():
    labels_N, logits_NC = drawn(50, 4, 1.7)
    targets_NC = np.where(labels_N[:, None] == np.arange(4), 51 / 52, 1 / 52 / 3)

    def loss(log_temperature):
        scaled_NC = logits_NC.astype(float) / np.exp(log_temperature)
        return float(-(targets_NC * (scaled_NC - np.log(np.exp(scaled_NC).sum(1, keepdims=True)))).sum())

    best = float(np.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded", options={"xatol": 1e-10}).x))
    assert choose_temperature(labels_N, logits_NC) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("count", [1, 20])
def test_few_images_that_are_all_right_do_not_make_it_sure_of_all(count):
    _, logits_NC = drawn(count, 3, 1.0)
    temperature = choose_temperature(logits_NC.argmax(1), logits_NC)
    sure_N = (torch.from_numpy(logits_NC) / temperature).softmax(1).amax(1)
    assert 0.5 < float(sure_N.mean()) < (count + 2) / (count + 3)


def test_good_probabilities_stay_what_they_are():
    """Of 100 draws of few images: by chance 5 tell another temperature from 1; of logits twice too large all do."""
    found = {scale: 0 for scale in (1, 2)}
    for seed in range(100):
        labels_N, logits_NC = drawn(180, 10, 1.0, seed)
        for scale in found:
            found[scale] += choose_calibration(labels_N, scale * logits_NC).temperature != 1
    assert found[1] <= 12
    assert found[2] >= 98


def test_labels_that_have_nothing_to_do_with_the_logits_take_all_sureness_away():
    _, logits_NC = drawn(200, 3, 1.0)
    wrong_N = logits_NC.argmin(1)
    assert choose_calibration(wrong_N, logits_NC).temperature == pytest.approx(20, rel=1e-3)
    assert choose_calibration(wrong_N[:0], logits_NC[:0]) is None


def test_numbers_that_are_not_finite_do_no_harm():
    labels_N, logits_NC = drawn(60, 3, 1.0)
    logits_NC[0, 1], logits_NC[1, 2] = np.inf, -np.inf
    chosen = choose_calibration(labels_N, logits_NC)
    shares_NC = chosen.probabilities(torch.from_numpy(logits_NC))
    assert 0.04 < chosen.temperature < 21
    assert bool(torch.isfinite(shares_NC).all())


def test_probabilities_are_those_of_divided_logits_whatever_the_batch():
    logits_NC = torch.randn(40, 7, generator=torch.Generator().manual_seed(0))
    calibration = Calibration(temperature=1.7, num_images=3, sets=LabelSets(level=0.9, threshold=0.1))
    shares_NC = calibration.probabilities(logits_NC)
    assert shares_NC.dtype == torch.float64
    torch.testing.assert_close(shares_NC, (logits_NC.double() / 1.7).softmax(1))
    assert torch.equal(torch.cat([calibration.probabilities(part) for part in logits_NC.split(3)]), shares_NC)


# -- sets of labels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [3, 30])
def test_sets_have_the_true_label_as_often_as_they_say(num_classes):
    """Over draws of 100 images that choose: the mean coverage is 0.9, or more where the label alone has it."""
    labels_N, logits_NC = drawn(60_000, num_classes, 2.0)
    covered = []
    for start in range(0, 50_000, 1000):
        chosen = choose_calibration(labels_N[start : start + 100], logits_NC[start : start + 100])
        rest = slice(start + 100, start + 1000)
        shares_NC = chosen.probabilities(torch.from_numpy(logits_NC[rest])).numpy()
        members_NC = chosen.sets.members(shares_NC, logits_NC[rest].argmax(1))
        covered.append(members_NC[np.arange(900), labels_N[rest]].mean())
    assert 0.9 - 0.012 < np.mean(covered) < 0.9 + 0.02  # standard deviation of a draw 0.03, of 50 of them 0.004


@pytest.mark.parametrize(("count", "rank"), [(8, None), (9, 9), (19, 18), (99, 90), (100, 91)])
def test_the_threshold_has_the_correction_for_few_images(count, rank):
    shares_N = np.random.default_rng(0).uniform(size=count)
    assert set_threshold(shares_N) == (0.0 if rank is None else np.sort(shares_N)[-rank])


def alike(num_groups, draws, sizes=(1, 30)):
    """Shares of the true class of groups of images that are mostly alike, and the groups' numbers."""
    sizes_G = draws.integers(*sizes, num_groups)
    groups_N = np.repeat(np.arange(num_groups), sizes_G)
    scores_N = 2 * draws.normal(size=num_groups)[groups_N] + draws.normal(size=len(groups_N))
    return 1 / (1 + np.exp(-scores_N)), groups_N


@pytest.mark.parametrize(("num_groups", "most"), [(9, 0.99), (20, 0.97), (60, 0.93)])
def test_sets_have_the_true_label_of_new_groups_as_often_as_they_say(num_groups, most):
    """Mean over 2,000 draws of groups that choose, of sizes 1 to 29, each asked about 40 new groups."""
    draws = np.random.default_rng(0)
    covered = {True: [], False: []}
    for _ in range(2000):
        shares_N, groups_N = alike(num_groups, draws)
        new_M, new_groups_M = alike(40, draws)
        for has_groups, of_draws in covered.items():
            is_in_M = new_M >= set_threshold(shares_N, groups_N if has_groups else None)
            of_draws.append(np.mean(np.bincount(new_groups_M, is_in_M) / np.bincount(new_groups_M)))
    error = np.std(covered[True]) / np.sqrt(2000)
    assert 0.9 - 3 * error < np.mean(covered[True]) < most
    assert np.mean(covered[False]) < 0.9 - 3 * error, "images of a group are taken for images that stand alone"


def test_a_threshold_is_by_groups_and_of_single_images_what_it_was():
    draws = np.random.default_rng(1)
    for count in range(1, 60):
        shares_N = draws.uniform(size=count).round(1 if count % 2 else 9)
        rank = math.ceil((count + 1) * 0.9 - 1e-9)
        before = float(np.sort(shares_N)[::-1][rank - 1]) if rank <= count else 0.0
        assert set_threshold(shares_N) == set_threshold(shares_N, draws.permutation(count)) == before
        # Each image several times, with its group, tells no more than once.
        assert set_threshold(np.repeat(shares_N, 7), np.repeat(np.arange(count), 7)) == before
    shares_N, groups_N = alike(8, draws)
    assert set_threshold(shares_N, groups_N) == 0.0 < set_threshold(shares_N)
    # One group in 21 is no more than that, whatever its size.
    large_N, large_groups_N = np.r_[np.full(20, 0.5), np.full(10_000, 0.01)], np.r_[np.arange(20), np.full(10_000, 20)]
    assert (set_threshold(large_N, large_groups_N), set_threshold(large_N)) == (0.5, 0.01)


def test_the_threshold_of_a_model_is_by_the_groups_of_its_images():
    labels_N, logits_NC = drawn(60, 4, 1.0)
    groups_N = np.arange(60) // 10
    assert choose_calibration(labels_N, logits_NC).sets.threshold > 0
    assert choose_calibration(labels_N, logits_NC, groups_N).sets.threshold == 0


def test_the_label_is_in_each_set_and_no_answer_has_none():
    sets = LabelSets(level=0.9, threshold=0.4)
    shares_NC = np.array([[0.3, 0.35, 0.35], [0.5, 0.45, 0.05], [np.nan] * 3])
    members_NC = sets.members(shares_NC, np.array([1, 0, -1]))
    assert members_NC.tolist() == [[False, True, False], [True, True, False], [False] * 3]


def test_mapie_chooses_the_same_threshold_and_sets():
    classification = pytest.importorskip("mapie.classification")
    from sklearn.base import BaseEstimator, ClassifierMixin

    labels_N, logits_NC = drawn(1200, 5, 1.5)
    chosen = choose_calibration(labels_N[:400], logits_NC[:400])

    class Given(ClassifierMixin, BaseEstimator):
        """Gives what it is given."""

        classes_, is_fitted_ = np.arange(5), True

        def fit(self, x, y):
            return self

        def predict_proba(self, x):
            return chosen.probabilities(torch.from_numpy(x)).numpy()

        def predict(self, x):
            return x.argmax(1)

        def __sklearn_is_fitted__(self):
            return True

    theirs = classification.SplitConformalClassifier(Given(), confidence_level=0.9, conformity_score="lac", prefit=True)
    theirs.conformalize(logits_NC[:400], labels_N[:400])
    answers_N, sets_NC1 = theirs.predict_set(logits_NC[400:])
    shares_NC = chosen.probabilities(torch.from_numpy(logits_NC[400:])).numpy()
    ours_NC = shares_NC >= chosen.sets.threshold
    np.testing.assert_array_equal(ours_NC, sets_NC1[:, :, 0])
    at_least_one_NC = chosen.sets.members(shares_NC, answers_N)
    np.testing.assert_array_equal(at_least_one_NC, ours_NC | (answers_N[:, None] == np.arange(5)))


def test_a_set_can_be_read_back_where_a_name_has_a_bar():
    assert joined_labels(["a|b", "c", "d\\"]) == "a\\|b|c|d\\\\"


def test_what_chooses_is_of_all_classes_where_these_take_turns():
    rows = drawn_rows(10_000, 1_000)
    assert np.bincount(rows % 10).min() > 70
    assert (np.diff(rows) > 0).all()
    np.testing.assert_array_equal(drawn_rows(7, 7), np.arange(7))


def test_the_coverage_of_groups_that_agree_is_known_by_their_number():
    covered_N, groups_N = np.repeat([1, 1, 1, 0], 50), np.repeat(np.arange(4), 50)
    low, high = share_interval(covered_N, groups_N)
    alone_low, alone_high = share_interval(covered_N, None)
    assert low < alone_low < alone_high < high
