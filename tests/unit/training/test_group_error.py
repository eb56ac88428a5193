"""The standard error of a figure over groups: wider where images of a group agree, the same however it is counted."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
import torch

from tlscale.training.group_error import GroupError, error_of_ratio, num_error_groups
from tlscale.training.loss import cross_entropy
from tlscale.training.metrics import Tally, standard_error, summary

FIGURES = ("top1", "loss", "macro_f1", "balanced_accuracy")


def names_of(groups_N):
    return pa.array([f"g{group}" for group in groups_N], pa.large_string())


def drawn(num_groups, generator, most=6, num_classes=3):
    """Groups of 1 to `most` images with a label and an answer each; the logits have small noise."""
    groups_N = np.repeat(np.arange(num_groups), generator.integers(1, most + 1, num_groups))
    labels_G = generator.integers(num_classes, size=num_groups)
    answers_G = np.where(generator.random(num_groups) < 0.6, labels_G, generator.integers(num_classes, size=num_groups))
    logits_NC = 2.0 * torch.nn.functional.one_hot(torch.from_numpy(answers_G[groups_N]), num_classes).double()
    noise_NC = torch.from_numpy(generator.normal(0, 0.3, logits_NC.shape))
    return groups_N, torch.from_numpy(labels_G[groups_N]), logits_NC + noise_NC


def error_of(figure, groups_N, labels_N, logits_NC, parts=1, total=lambda values: values):
    made = GroupError(names_of(groups_N), figure, logits_NC.shape[1])
    for rows in torch.randperm(len(labels_N)).chunk(parts):
        losses_B = cross_entropy(logits_NC[rows], labels_N[rows])
        made.add(rows, labels_N[rows], logits_NC[rows], {"loss": losses_B, "other": 2 * losses_B})
    return made.error(total)


def figures_of(labels_N, logits_NC):
    tally = Tally(logits_NC.shape[1], "cpu")
    tally.update(logits_NC, labels_N, cross_entropy(logits_NC, labels_N))
    return tally, summary(tally, list("abc"))


@pytest.mark.parametrize("figure", FIGURES)
def test_it_is_how_far_the_figure_moves_from_draw_to_draw_of_groups(figure):
    found = []
    for seed in range(100):
        groups_N, labels_N, logits_NC = drawn(60, np.random.default_rng(seed))
        found.append(figures_of(labels_N, logits_NC)[1][figure])
    moves = float(np.std(found))
    groups_N, labels_N, logits_NC = drawn(60, np.random.default_rng(1000))
    ours = error_of(figure, groups_N, labels_N, logits_NC)
    assert ours == pytest.approx(moves, rel=0.25)
    assert standard_error(figures_of(labels_N, logits_NC)[0], figure) < 0.75 * moves, "the error over images is not"


@pytest.mark.parametrize("figure", [*FIGURES, "other"])
def test_batches_and_processes_change_nothing(figure):
    groups_N, labels_N, logits_NC = drawn(20, np.random.default_rng(0))
    whole = error_of(figure, groups_N, labels_N, logits_NC)
    assert error_of(figure, groups_N, labels_N, logits_NC, parts=4) == whole
    half = len(labels_N) // 2
    one, other = (GroupError(names_of(groups_N), figure, 3) for _ in range(2))
    for made, rows in ((one, torch.arange(half)), (other, torch.arange(half, len(labels_N)))):
        losses_B = cross_entropy(logits_NC[rows], labels_N[rows])
        made.add(rows, labels_N[rows], logits_NC[rows], {"loss": losses_B, "other": 2 * losses_B})
    seen = []
    other.error(lambda values: seen.append(values) or values)
    assert one.error(lambda values: values + seen[0]) == whole


def test_of_groups_of_one_image_it_is_that_over_images():
    _, labels_N, logits_NC = drawn(80, np.random.default_rng(3), most=1)
    groups_N = np.arange(80)
    assert num_error_groups(names_of(groups_N)) is None
    tally, _ = figures_of(labels_N, logits_NC)
    for figure, close in (("loss", 1e-12), ("top1", 0.01), ("macro_f1", 0.1), ("balanced_accuracy", 0.1)):
        by_images = standard_error(tally, figure)
        assert error_of(figure, groups_N, labels_N, logits_NC) == pytest.approx(by_images, rel=close)


def test_what_tells_nothing_has_no_error():
    labels_N, logits_NC = torch.tensor([0, 1, 1]), torch.eye(3).double()
    assert error_of("top1", [0, 0, 0], labels_N, logits_NC) is None
    assert error_of("loss", [0, 0, 1], labels_N, logits_NC * math.nan) is None
    assert error_of("top1", [0, 0, 1], labels_N, logits_NC * math.nan) == 0.0
    assert num_error_groups(names_of([0, 0, 1])) == 2
    assert num_error_groups(None) is None
    assert error_of_ratio(np.array([2.0, 1.0]), np.array([2, 1])) == 0.0
