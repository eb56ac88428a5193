"""Figures of several labels an image are scikit-learn's; thresholds are those of the best F1."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, precision_score, recall_score

from tlscale.training.label_set_loss import binary_cross_entropy
from tlscale.training.label_set_metrics import LabelFigures, LabelScores, labels_from, probabilities

CLASSES = ["a", "b", "c", "d"]


def made(num_images: int = 83, *, decimals: int = 8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that tell something of the labels; with few decimals many of them are equal."""
    draws = np.random.default_rng(seed)
    labels_NC = draws.random((num_images, 4)) < (0.5, 0.3, 0.1, 0.04)
    logits_NC = np.round(draws.normal(size=(num_images, 4)) * 2 + labels_NC, decimals)
    return torch.from_numpy(logits_NC).float(), torch.from_numpy(labels_NC)


def figures_of(logits_NC, labels_NC, parts=((0, None),), groups_N=None) -> LabelFigures:
    """Of the images of several processes, each with its part."""
    owns = []
    for part in parts:
        scores = LabelScores(labels_NC.shape[1])
        for batch in torch.split(torch.arange(len(labels_NC))[slice(*part)], 17):
            losses_B = binary_cross_entropy(logits_NC[batch], labels_NC[batch])
            scores.update(logits_NC[batch], labels_NC[batch], losses_B)
        owns.append(scores.own())
    return LabelScores(labels_NC.shape[1]).over_all(lambda own: owns, groups_N)


@pytest.mark.parametrize("decimals", [8, 0])
def test_figures_are_scikit_learns(decimals):
    logits_NC, labels_NC = made(decimals=decimals)
    thresholds = [0.5, 0.3, 0.7, 0.2]
    found = figures_of(logits_NC, labels_NC).summary(CLASSES, thresholds)
    shares, truth = torch.sigmoid(logits_NC.double()).numpy(), labels_NC.numpy()
    given = shares >= np.array(thresholds)
    each = {
        "average_precision": average_precision_score(truth, shares, average=None),
        "f1": f1_score(truth, given, average=None),
        "precision": precision_score(truth, given, average=None, zero_division=0),
        "recall": recall_score(truth, given, average=None),
    }
    for key, expected_C in each.items():
        np.testing.assert_allclose([found["per_class"][name][key] for name in CLASSES], expected_C, rtol=1e-12)
    assert found["mean_average_precision"] == pytest.approx(
        average_precision_score(truth, shares, average="macro"), rel=1e-12
    )
    assert found["macro_f1"] == pytest.approx(f1_score(truth, given, average="macro"), rel=1e-12)
    assert found["micro_f1"] == pytest.approx(f1_score(truth, given, average="micro"), rel=1e-12)
    assert found["subset_accuracy"] == accuracy_score(truth, given)
    assert found["chance"]["mean_average_precision"] == pytest.approx(truth.mean(axis=0).mean())
    assert [row["threshold"] for row in found["per_class"].values()] == thresholds
    low, high = found["mean_average_precision_interval95"]
    assert 0 <= low < found["mean_average_precision"] < high <= 1


def test_processes_change_no_figure():
    logits_NC, labels_NC = made()
    one = figures_of(logits_NC, labels_NC).summary(CLASSES, None)
    assert figures_of(logits_NC, labels_NC, [(0, 30), (30, 31), (31, 31), (31, 83)]).summary(CLASSES, None) == one


def test_errors_of_twins_in_a_group_are_those_of_one_of_each():
    logits_NC, labels_NC = made(60)
    alone = figures_of(logits_NC, labels_NC)
    twins = [part.repeat_interleave(2, dim=0) for part in (logits_NC, labels_NC)]
    names = pa.array([f"patient{image // 2}" for image in range(120)], pa.large_string())
    grouped = figures_of(*twins, parts=[(0, 51), (51, 120)], groups_N=names)
    for figure in ("mean_average_precision", "loss"):
        assert grouped.standard_error(figure) == pytest.approx(alone.standard_error(figure), rel=1e-9)
        assert figures_of(*twins).standard_error(figure) < 0.9 * grouped.standard_error(figure)
    found = grouped.summary(CLASSES, None)
    assert found["mean_average_precision_interval95_by"] == {"groups": 60}
    key = "mean_average_precision_interval95"
    assert found[key] == pytest.approx(alone.summary(CLASSES, None)[key])
    assert f"{key}_by" not in alone.summary(CLASSES, None)
    one_group = figures_of(*twins, groups_N=pa.array(["a"] * 120, pa.large_string()))
    assert one_group.standard_error("mean_average_precision") is one_group.standard_error("loss") is None


@pytest.mark.parametrize("decimals", [8, 0])
def test_thresholds_have_the_best_f1(decimals):
    logits_NC, labels_NC = made(40, decimals=decimals)
    shares, truth = torch.sigmoid(logits_NC.double()).numpy(), labels_NC.numpy()
    best = figures_of(logits_NC, labels_NC).best_thresholds()
    found = f1_score(truth, shares >= np.array(best), average=None)
    for label, threshold in enumerate(best):
        all_of_them = [f1_score(truth[:, label], shares[:, label] >= one) for one in np.unique(shares[:, label])]
        assert found[label] == pytest.approx(max(all_of_them))
        assert 0 < threshold < 1


def test_equally_good_thresholds_are_near_to_a_half():
    shares = torch.tensor([[0.9, 0.02], [0.3, 0.01], [0.1, 0.3]])
    labels = torch.tensor([[True, False], [False, False], [False, False]])
    assert figures_of(torch.logit(shares), labels).best_thresholds() == [pytest.approx(0.6), 0.5]  # b: no image


def test_two_neighbouring_numbers_are_told_apart():
    low = 0.3
    high = np.nextafter(low, 1)
    scores = LabelFigures(np.array([[high], [low]]), np.array([[True], [False]]), np.zeros(2))
    assert labels_from(torch.from_numpy(scores.probabilities_NC), scores.best_thresholds()).tolist() == [
        [True],
        [False],
    ]


def test_a_class_without_images_is_in_no_mean():
    logits_NC, labels_NC = made()
    labels_NC[:, 3] = False
    figures = figures_of(logits_NC, labels_NC)
    found = figures.summary(CLASSES, None)
    assert {key: found["per_class"]["d"][key] for key in ("average_precision", "f1", "num_images")} == {
        "average_precision": None,
        "f1": None,
        "num_images": 0,
    }
    assert found["mean_average_precision"] == pytest.approx(
        np.mean([found["per_class"][name]["average_precision"] for name in "abc"])
    )
    labels_NC[:] = False
    found = figures_of(logits_NC, labels_NC).summary(CLASSES, None)
    assert (
        found["mean_average_precision"],
        found["mean_average_precision_interval95"],
        found["macro_f1"],
        found["micro_f1"],
    ) == (None, None, None, 0.0)


def test_nan_is_no_answer_and_ranks_last():
    logits_NC, labels_NC = made(20)
    logits_NC[3, 1] = np.nan
    found = figures_of(logits_NC, labels_NC).summary(CLASSES, [0.0] * 4)
    assert found["num_without_answer"] == 1
    assert not labels_from(probabilities(logits_NC), [0.0] * 4)[3].any()
    shares = np.nan_to_num(probabilities(logits_NC).numpy(), nan=-1)
    expected = average_precision_score(labels_NC.numpy(), shares, average=None)
    assert [row["average_precision"] for row in found["per_class"].values()] == pytest.approx(expected.tolist())


def test_the_standard_error_is_that_of_other_draws():
    """Of map, against its spread over many data sets of the same kind."""
    over_sets = [figures_of(*made(150, seed=seed)).mean_average_precision() for seed in range(1, 120)]
    errors = [figures_of(*made(150, seed=seed)).standard_error("mean_average_precision") for seed in (200, 201, 202)]
    assert np.mean(errors) == pytest.approx(np.std(over_sets), rel=0.35)


def test_no_images():
    figures = figures_of(torch.zeros(0, 4), torch.zeros(0, 4, dtype=torch.bool))
    assert figures.summary(CLASSES, None)["mean_average_precision"] is None
    assert figures.standard_error("loss") is None
