"""Ranking figures, curves and the interval of the calibration error: those of scikit-learn, and honest ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from tests.recompute import assert_follows
from tests.unit.training.test_predictions import collected, numbered
from tlscale.codes.probes.ranking import Ranking
from tlscale.training.calibration import calibration_error, calibration_interval
from tlscale.training.prediction_figures import MOST_CURVES, ScoredImages, add_prediction_figures
from tlscale.training.predictions import MOST_LOGITS, write_predictions

SCORED = st.lists(st.tuples(st.booleans(), st.integers(0, 6)), min_size=1, max_size=40).map(
    lambda rows: (np.array([is_class for is_class, _ in rows]), np.array([score / 4 for _, score in rows]))
)


def written(tmp_path, count, num_classes, dtype=torch.float32, wrong=()):
    """Figures and the file of predictions of which some have no answer."""
    split, classes = numbered(count, num_classes), [f"c{number}" for number in range(num_classes)]
    logits_NC = 2 * torch.randn(count, num_classes, generator=torch.Generator().manual_seed(1))
    logits_NC[torch.arange(count), torch.from_numpy(split.labels_N)] += 2
    logits_NC[list(wrong), 0] = torch.nan
    predictions, figures = collected(split, classes, logits_NC.to(dtype), np.arange(count))
    path = tmp_path / "p.parquet"
    write_predictions(path, predictions)
    return figures, path


@settings(deadline=None, max_examples=40)
@given(SCORED)
def test_a_ranking_has_the_figures_of_scikit_learn_where_scores_tie(scored):
    is_class_N, scores_N = scored
    ranking = Ranking(is_class_N, scores_N)
    if is_class_N.any() and not is_class_N.all():
        assert ranking.auroc() == pytest.approx(roc_auc_score(is_class_N, scores_N), abs=1e-12)
    else:
        assert ranking.auroc() is None
    if not is_class_N.any():
        assert ranking.average_precision() is ranking.curve() is None
        return
    assert ranking.average_precision() == pytest.approx(average_precision_score(is_class_N, scores_N), abs=1e-12)
    precision_T, recall_T, score_T = precision_recall_curve(is_class_N, scores_N)
    curve = ranking.curve()
    points = zip(curve["recall"], curve["precision"], curve["score"], strict=True)
    for wanted, point in zip(np.arange(1, 21) / 20, points, strict=True):
        at = np.flatnonzero(recall_T[:-1] >= wanted - 1e-9)[-1]  # the highest score
        assert list(point) == pytest.approx([recall_T[at], precision_T[at], score_T[at]], abs=1e-12)


@pytest.mark.parametrize("num_classes", [2, 5])
def test_all_figures_are_those_of_scikit_learn_on_the_saved_logits(num_classes, tmp_path):
    figures, path = written(tmp_path, 80, num_classes, wrong=(3, 41))
    found = add_prediction_figures(figures, path)
    assert_follows(found, path, rel=1e-5)
    images = ScoredImages.read(path)
    assert len(images.labels_N) == 78
    shares_NC = torch.from_numpy(images.logits_NC).double().softmax(1).numpy()
    truth_NC = images.labels_N[:, None] == np.arange(num_classes)
    assert found["auroc"] == pytest.approx(roc_auc_score(truth_NC, shares_NC, average="macro"), abs=1e-12)
    expected = average_precision_score(truth_NC, shares_NC, average="macro")
    assert found["mean_average_precision"] == pytest.approx(expected, abs=1e-12)
    assert list(found["pr_curves"]) == list(found["per_class"])
    low, high = found["ece_interval95"]
    assert 0 <= low <= found["ece"] <= high


def test_torchmetrics_has_the_same_figures(tmp_path):
    theirs = pytest.importorskip("torchmetrics.functional.classification")
    figures, path = written(tmp_path, 200, 4)
    found, images = add_prediction_figures(figures, path), ScoredImages.read(path)
    shares_NC, labels_N = torch.from_numpy(images.logits_NC).double().softmax(1), torch.from_numpy(images.labels_N)
    assert found["auroc"] == pytest.approx(float(theirs.multiclass_auroc(shares_NC, labels_N, 4)), abs=1e-6)
    precision = float(theirs.multiclass_average_precision(shares_NC, labels_N, 4))
    assert found["mean_average_precision"] == pytest.approx(precision, abs=1e-6)
    error = float(theirs.multiclass_calibration_error(shares_NC.float(), labels_N, 4, n_bins=15))
    assert found["ece"] == pytest.approx(error, abs=1e-6)
    macro_f1 = float(theirs.multiclass_f1_score(shares_NC, labels_N, 4, average="macro"))
    assert found["macro_f1"] == pytest.approx(macro_f1, abs=1e-6)


def test_with_many_classes_only_what_the_file_tells_is_told(tmp_path):
    figures, path = written(tmp_path, 60, MOST_CURVES + 1)
    found = add_prediction_figures(figures, path)
    assert "auroc" in found
    assert "pr_curves" not in found
    (tmp_path / "more").mkdir()
    figures, path = written(tmp_path / "more", 20, MOST_LOGITS + 1)
    assert add_prediction_figures(figures, path).keys() - figures.keys() == {"ece_interval95"}


def test_images_that_differ_in_the_order_of_their_logits_alone_tie(tmp_path):
    split, classes = numbered(60, 5), list("abcde")
    draws = np.random.default_rng(0)
    votes = np.log(np.array([0.1, 0.2, 0.3, 0.7, 0.9], np.float32))
    logits_NC = np.stack([np.append(votes[:1], draws.permutation(votes[1:])) for _ in range(60)])
    predictions, figures = collected(split, classes, torch.from_numpy(logits_NC), np.arange(60))
    write_predictions(tmp_path / "p.parquet", predictions)
    assert add_prediction_figures(figures, tmp_path / "p.parquet")["per_class"]["a"]["auroc"] == 0.5


# -- the interval of the calibration error ----------------------------------------------------------------------------


@pytest.mark.parametrize("excess", [0.0, 0.03, 0.15])
def test_the_interval_of_the_calibration_error_covers_the_truth(excess):
    """Of probabilities that are too high by as much: the error of all possible images is that."""
    draws, covered = np.random.default_rng(0), 0
    for _ in range(40):
        confidence_N = draws.uniform(0.5, 1.0, 300)
        low, high = calibration_interval(confidence_N, draws.uniform(size=300) < confidence_N - excess)
        covered += low <= excess <= high
    assert covered >= 34  # of 38 that are expected; standard deviation 1.4. By percentiles 0, 3 and 35


def test_groups_whose_images_agree_are_as_one_image_each():
    draws = np.random.default_rng(0)
    confidence_N = draws.uniform(0.4, 1.0, 300)
    is_hit_N = draws.uniform(size=300) < confidence_N - 0.2
    once = calibration_interval(confidence_N, is_hit_N)
    repeated = [np.repeat(values, 4) for values in (confidence_N, is_hit_N, np.arange(300))]
    assert calibration_interval(*repeated) == pytest.approx(once, abs=1e-12)
    low, high = calibration_interval(*repeated[:2])
    assert high - low < 0.7 * (once[1] - once[0])
    assert calibration_error(*repeated[:2]) == pytest.approx(calibration_error(confidence_N, is_hit_N))


def test_of_no_image_or_one_there_is_no_interval():
    for count in (0, 1):
        assert calibration_interval(np.full(count, 0.5), np.ones(count, bool)) is None
    assert calibration_error(np.zeros(0), np.zeros(0, bool)) is None
