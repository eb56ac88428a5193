"""Losses of several labels an image: those of PyTorch and of the paper, their weights, and their slopes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight

from tlscale.errors import RecipeError
from tlscale.recipe.schema import LossSection
from tlscale.training.label_set_loss import AsymmetricLoss, BinaryLoss, binary_cross_entropy
from tlscale.training.loss import LOSSES, LossSpec, class_weights, loss_name, refuse_mixed_targets

LOGITS = torch.tensor([[2.0, -1.0, 0.5], [-3.0, 4.0, 0.0]], dtype=torch.float64)
LABELS = torch.tensor([[True, False, True], [False, False, True]])


class Batch:
    def __init__(self, labels_B, partner_labels_B=None, lam_B=None) -> None:
        self.labels_B, self.partner_labels_B, self.lam_B = labels_B, partner_labels_B, lam_B


def test_the_binary_one_is_pytorchs():
    expected_B = F.binary_cross_entropy_with_logits(LOGITS, LABELS.double(), reduction="none").mean(1)
    torch.testing.assert_close(BinaryLoss(LossSection(), None)(LOGITS, Batch(LABELS)), expected_B)
    torch.testing.assert_close(binary_cross_entropy(LOGITS, LABELS), expected_B)
    assert binary_cross_entropy(LOGITS.bfloat16(), LABELS).dtype == torch.float32


@pytest.mark.parametrize(("gamma", "margin"), [(4.0, 0.05), (0.0, 0.0), (1.0, 0.2)])
def test_the_asymmetric_one_is_the_papers(gamma, margin):
    section = LossSection(kind="asymmetric", negative_gamma=gamma, negative_margin=margin)
    p = LOGITS.sigmoid()
    q = (p - margin).clamp_min(0)
    expected = torch.where(LABELS, -p.log(), -(q**gamma) * (1 - q).log()).mean(1)
    torch.testing.assert_close(AsymmetricLoss(section, None)(LOGITS, Batch(LABELS)), expected)
    if gamma == margin == 0.0:
        torch.testing.assert_close(expected, binary_cross_entropy(LOGITS, LABELS))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 4.0])
@pytest.mark.parametrize("margin", [0.0, 0.05])
def test_slopes_are_finite_whatever_the_logits_are(gamma, margin):
    logits = torch.tensor([[-200.0, -20.0, -2.9444, 0.0, 20.0, 200.0]], requires_grad=True)
    loss_fn = AsymmetricLoss(LossSection(kind="asymmetric", negative_gamma=gamma, negative_margin=margin), None)
    for labels in (torch.zeros(1, 6, dtype=torch.bool), torch.ones(1, 6, dtype=torch.bool)):
        loss = loss_fn.losses(logits, labels).sum()
        (slope,) = torch.autograd.grad(loss, logits)
        assert torch.isfinite(loss)
        assert torch.isfinite(slope).all()


def test_labels_that_an_image_lacks_and_is_sure_of_weigh_nothing():
    losses = AsymmetricLoss(LossSection(kind="asymmetric"), None).losses(
        torch.tensor([[-4.0]]), torch.tensor([[False]])
    )
    assert float(losses) == 0.0


def test_mixed_labels_have_the_mixed_loss():
    lam_B, partners = torch.tensor([0.25, 1.0]), LABELS.flip(0)
    found_B = BinaryLoss(LossSection(), None)(LOGITS, Batch(LABELS, partners, lam_B))
    targets = lam_B[:, None] * LABELS.double() + (1 - lam_B[:, None]) * partners.double()
    torch.testing.assert_close(found_B, F.binary_cross_entropy_with_logits(LOGITS, targets, reduction="none").mean(1))
    with pytest.raises(RecipeError, match="mixup cannot be used with the loss 'asymmetric'"):
        refuse_mixed_targets("asymmetric", {"mixup": 0.2})


def labels_NC() -> np.ndarray:
    return np.random.default_rng(0).random((60, 3)) < (0.5, 0.1, 0.9)


def test_balanced_weights_are_scikit_learns():
    labels = labels_NC()
    weights_2C = class_weights(LossSection(class_weights="balanced"), labels, ["a", "b", "c"])
    for label in range(3):
        expected = compute_class_weight("balanced", classes=np.array([False, True]), y=labels[:, label])
        assert weights_2C[:, label].tolist() == pytest.approx(expected.tolist())


@pytest.mark.parametrize("given", ["balanced", {"a": 1.0, "b": 5.0, "c": 0.0}])
def test_weights_have_a_mean_of_one_over_the_training_images(given):
    labels = labels_NC()
    labels[:, 2] = False  # a class that no image has
    weights_2C = class_weights(LossSection(class_weights=given), labels, ["a", "b", "c"]).numpy()
    means_C = np.where(labels, weights_2C[1], weights_2C[0]).mean(axis=0)
    assert means_C == pytest.approx(np.ones(3))
    if given != "balanced":
        assert weights_2C[1, 1] / weights_2C[0, 1] == pytest.approx(5)


def test_weights_are_those_of_the_loss():
    section = LossSection(class_weights={"a": 2.0, "b": 1.0, "c": 0.5})
    weights_2C = class_weights(section, labels_NC(), ["a", "b", "c"])
    built = LOSSES[loss_name(section, None, several=True)].build(LossSpec(section, None, weights_2C, 3))
    plain = F.binary_cross_entropy_with_logits(LOGITS, LABELS.double(), reduction="none")
    expected_B = (torch.where(LABELS, weights_2C[1], weights_2C[0]) * plain).mean(1)
    torch.testing.assert_close(built(LOGITS, Batch(LABELS)), expected_B)


def test_weights_of_classes_that_are_not_there():
    with pytest.raises(RecipeError, match=r"loss.class_weights: there is no class 'x'"):
        class_weights(LossSection(class_weights={"x": 1.0}), labels_NC(), ["a", "b", "c"])
    everyone = np.ones((4, 2), dtype=bool)
    with pytest.raises(RecipeError, match=r"the weight of 'b' is 0, and all training images have that label"):
        class_weights(LossSection(class_weights={"a": 1.0, "b": 0.0}), everyone, ["a", "b"])


@pytest.mark.parametrize(("kind", "row"), [("cross_entropy", "binary_cross_entropy"), ("asymmetric", "asymmetric")])
def test_each_loss_of_several_labels_has_its_row(kind, row):
    assert loss_name(LossSection(kind=kind), None, several=True) == row
    assert LOSSES[row].takes_several
