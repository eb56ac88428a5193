"""AUROC and average precision of validation images: scikit-learn's, however the images are dealt out."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from tlscale.training.class_scores import ClassScores

FIGURES = ("auroc", "mean_average_precision")


def drawn(num_images=90, num_classes=4, seed=0, classes=None):
    """Logits that tell something, with ties, and labels."""
    generator = np.random.default_rng(seed)
    labels_N = generator.choice(classes if classes is not None else num_classes, num_images)
    logits_NC = generator.normal(size=(num_images, num_classes)).round(1) + np.eye(num_classes)[labels_N]
    return torch.from_numpy(labels_N), torch.from_numpy(logits_NC)


def figures_of(figure, labels_N, logits_NC, processes=1, groups_N=None, seed=0):
    """Over several processes, each with batches of a few images in any order."""
    order_N = torch.randperm(len(labels_N), generator=torch.Generator().manual_seed(seed))
    parts = []
    for rows in order_N.tensor_split(processes):
        scores = ClassScores(figure, len(labels_N), groups_N)
        for some in rows.split(7):
            scores.add(some, labels_N[some], logits_NC[some])
        scores.over_all(lambda own: parts.append(own) or [own])
    return ClassScores(figure, len(labels_N), groups_N).over_all(lambda own: [*parts, own])


def by_scikit_learn(figure, labels_N, logits_NC):
    shares_NC, is_class_NC = logits_NC.softmax(1).numpy(), np.eye(logits_NC.shape[1])[labels_N]
    score = roc_auc_score if figure == "auroc" else average_precision_score
    there = is_class_NC.any(axis=0)
    return score(is_class_NC[:, there], shares_NC[:, there], average="macro")


@pytest.mark.parametrize("classes", [None, [0, 2, 3]], ids=["all classes", "one without images"])
@pytest.mark.parametrize("figure", FIGURES)
def test_it_is_the_mean_over_the_classes_that_are_there(figure, classes):
    labels_N, logits_NC = drawn(classes=classes)
    found = figures_of(figure, labels_N, logits_NC)
    assert found[figure] == pytest.approx(by_scikit_learn(figure, labels_N, logits_NC), abs=1e-12)


@pytest.mark.parametrize("figure", FIGURES)
def test_processes_and_batches_change_nothing(figure):
    labels_N, logits_NC = drawn(num_images=41)
    groups_N = pa.array([f"g{row // 3}" for row in range(41)], pa.large_string())
    for groups in (None, groups_N):
        one = figures_of(figure, labels_N, logits_NC, groups_N=groups)
        for processes in (2, 3, 60):  # of 60 some have no image
            assert figures_of(figure, labels_N, logits_NC, processes, groups, seed=processes) == one


@pytest.mark.parametrize("figure", FIGURES)
def test_the_error_is_how_far_the_figure_moves(figure):
    moves = np.std([by_scikit_learn(figure, *drawn(120, seed=seed)) for seed in range(100)])
    labels_N, logits_NC = drawn(120, seed=1000)
    error = figures_of(figure, labels_N, logits_NC)[f"{figure}_se"]
    assert error == pytest.approx(moves, rel=0.35)
    # Three copies of each image, in a group: no more is known than of one.
    of_groups = pa.array([f"g{row // 3}" for row in range(360)], pa.large_string())
    copies = labels_N.repeat_interleave(3), logits_NC.repeat_interleave(3, dim=0)
    assert figures_of(figure, *copies, groups_N=of_groups)[f"{figure}_se"] == pytest.approx(error, rel=0.2)
    assert figures_of(figure, *copies)[f"{figure}_se"] < 0.75 * error


def test_an_image_without_an_answer_is_in_no_figure():
    labels_N, logits_NC = drawn(50)
    with_one = torch.cat([logits_NC, torch.full((1, 4), torch.nan)])
    found = figures_of("auroc", torch.cat([labels_N, labels_N[:1]]), with_one)
    assert found["auroc"] == figures_of("auroc", labels_N, logits_NC)["auroc"]


def test_one_class_alone_has_no_pairs():
    labels_N, logits_NC = drawn(classes=[2])
    assert figures_of("auroc", labels_N, logits_NC) == {"auroc": None, "auroc_se": None}
