"""Compute the loss of each image, to be summed and divided by the count over all processes.

Promise: what is trained on is w[y] times the cross-entropy with the smoothed target, averaged over the images of the
batch over all processes; w has a mean of 1 over the training images, so that it changes what an image weighs among
others and not the size of the step. What is reported (`cross_entropy`) has neither weights nor smoothing, and is of the
network's own logits, without what `loss.logit_adjustment` adds to them in training.

To add a loss, write it into a file of its own and add a row to `LOSSES`.

Shapes: B images, C classes, O outputs of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tlscale.data.sources.tables import has_several
from tlscale.errors import RecipeError, sentences, suggestion
from tlscale.recipe.schema import DistillSection, LossSection
from tlscale.training.distillation.loss import DistillationLoss
from tlscale.training.label_set_loss import AsymmetricLoss, BinaryLoss, label_weights


class Batch(Protocol):
    """Give what a loss needs of a batch (of images or of codes), and the numbers of its images in their split."""

    @property
    def labels_B(self) -> Tensor: ...  # noqa: N802
    @property
    def rows_B(self) -> Tensor: ...  # noqa: N802
    @property
    def partner_labels_B(self) -> Tensor | None: ...  # noqa: N802
    @property
    def lam_B(self) -> Tensor | None: ...  # noqa: N802


class Loss(Protocol):
    """Compute what is trained on."""

    @property
    def aux_names(self) -> tuple[str, ...]:
        """The keys of `aux_losses`."""

    def __call__(self, outputs_BO: Tensor, batch: Any) -> Tensor:  # noqa: ANN401 (of images, or of codes)
        """Return the loss of each image, shape (B,)."""

    def logits(self, outputs_BO: Tensor) -> Tensor:
        """Return the logits (B, C) among the outputs."""

    def aux_losses(self, outputs_BO: Tensor, batch: Any) -> dict[str, Tensor]:  # noqa: ANN401
        """Return parts of the loss that are reported at an evaluation, each (B,)."""


def cross_entropy(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """Return the plain cross-entropy of each image, in float32 at least; shape (B,).

    This is the `loss` of every evaluation: weights and smoothing are means of training, and a figure that had them
    could not be compared with that of another recipe.
    """
    return F.cross_entropy(_at_least_float32(logits_BC), labels_B, reduction="none")


def _at_least_float32(logits_BC: Tensor) -> Tensor:
    return logits_BC.float() if logits_BC.dtype in (torch.float16, torch.bfloat16) else logits_BC


class CrossEntropyLoss:
    """Compute cross-entropy with label smoothing, class weights, adjusted logits and mixed labels."""

    aux_names: tuple[str, ...] = ()

    def __init__(
        self, section: LossSection, class_weights_C: Tensor | None, log_priors_C: Tensor | None = None
    ) -> None:
        """`log_priors_C` is the logarithm of each class's share of the training images; None: do not adjust."""
        self._smoothing = section.label_smoothing
        self._class_weights_C = class_weights_C
        self._shifts_C = None if log_priors_C is None else section.logit_adjustment * log_priors_C

    def __call__(self, outputs_BO: Tensor, batch: Batch) -> Tensor:
        if batch.partner_labels_B is None or batch.lam_B is None:
            return self.losses(outputs_BO, batch.labels_B)
        return self.mixed_losses(outputs_BO, batch.labels_B, batch.partner_labels_B, batch.lam_B)

    def logits(self, outputs_BO: Tensor) -> Tensor:
        return outputs_BO

    def aux_losses(self, outputs_BO: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {}

    def losses(self, logits_BC: Tensor, labels_B: Tensor) -> Tensor:
        """Compute w[y] times the smoothed cross-entropy of each image, in float32 at least; shape (B,).

        The weight is that of the image's own label alone. PyTorch's own `weight` with `label_smoothing` weighs each
        class of the smoothed target by the weight of that class, so that an image of a common class is pulled to a
        rare one more than to its own.
        """
        logits_BC = _at_least_float32(logits_BC)
        if self._shifts_C is not None:
            # The network learns what tells the classes apart, not how frequent they are: Menon et al. 2021, eq. 10.
            logits_BC = logits_BC + self._shifts_C.to(logits_BC.dtype)
        losses_B = F.cross_entropy(logits_BC, labels_B, label_smoothing=self._smoothing, reduction="none")
        return self._weighted(losses_B, labels_B)

    def _weighted(self, losses_B: Tensor, labels_B: Tensor) -> Tensor:
        if self._class_weights_C is None:
            return losses_B
        return self._class_weights_C.to(losses_B.dtype)[labels_B] * losses_B

    def mixed_losses(self, logits_BC: Tensor, labels_B: Tensor, partner_labels_B: Tensor, lam_B: Tensor) -> Tensor:
        """Compute the loss of images that are `lam` of one label and 1 - `lam` of another (mixup, cutmix).

        Each of the two labels has its own weight, lam * w[a] * CE(a) + (1 - lam) * w[b] * CE(b): partners are drawn
        evenly, so the mean weight of an image stays 1. Without weights this equals the loss of the mixed target, since
        cross-entropy is linear in it.
        """
        lam_B = lam_B.to(logits_BC.dtype if logits_BC.dtype == torch.float64 else torch.float32)
        own_B = self.losses(logits_BC, labels_B)
        return lam_B * own_B + (1 - lam_B) * self.losses(logits_BC, partner_labels_B)


class FocalLoss(CrossEntropyLoss):
    """Compute w[y] (1 - p)^gamma times the cross-entropy of each image, p the probability of its own class.

    It turns to the images that the network is least sure of (Lin et al. 2017). It is not linear in its target, and so
    has no meaning for images that are mixed of two labels.
    """

    def __init__(self, section: LossSection, class_weights_C: Tensor | None) -> None:
        super().__init__(section, class_weights_C)
        self._gamma = section.focal_gamma

    def losses(self, logits_BC: Tensor, labels_B: Tensor) -> Tensor:
        """Compute the loss of each image, in float32 at least; shape (B,)."""
        losses_B = cross_entropy(logits_BC, labels_B)
        # 1 - p from the loss itself: exact where p is all but 1, where the difference would be rounded to 0.
        missing_B = (-torch.expm1(-losses_B)).clamp_min(torch.finfo(losses_B.dtype).tiny)
        return self._weighted(missing_B**self._gamma * losses_B, labels_B)


# -- the table ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LossSpec:
    """Everything that a loss is built from."""

    section: LossSection
    distill: DistillSection | None
    class_weights_C: Tensor | None
    """Of several labels (2, C), as `label_weights` gives them."""
    num_classes: int
    log_priors_C: Tensor | None = None


@dataclass(frozen=True)
class LossKind:
    """One kind of loss.

    `is_linear_in_target`: the loss of a mixed target is the mixture of the losses of its labels. A loss that is not
    would be another one with mixup and cutmix, which mix two labels, and is refused with them. `takes_several`: it is
    of images with several labels each.
    """

    build: Callable[[LossSpec], Loss]
    is_linear_in_target: bool
    takes_several: bool = False


def _cross_entropy(spec: LossSpec) -> CrossEntropyLoss:
    return CrossEntropyLoss(spec.section, spec.class_weights_C, spec.log_priors_C)


def _distillation(spec: LossSpec) -> DistillationLoss:
    assert spec.distill is not None
    return DistillationLoss(_cross_entropy(spec), spec.distill, spec.num_classes)


LOSSES: dict[str, LossKind] = {
    "cross_entropy": LossKind(_cross_entropy, is_linear_in_target=True),
    "focal": LossKind(lambda spec: FocalLoss(spec.section, spec.class_weights_C), is_linear_in_target=False),
    "distillation": LossKind(_distillation, is_linear_in_target=True),
    "binary_cross_entropy": LossKind(
        lambda spec: BinaryLoss(spec.section, spec.class_weights_C), is_linear_in_target=True, takes_several=True
    ),
    "asymmetric": LossKind(
        lambda spec: AsymmetricLoss(spec.section, spec.class_weights_C), is_linear_in_target=False, takes_several=True
    ),
}


def loss_name(section: LossSection, distill: DistillSection | None, *, several: bool = False) -> str:
    """Return the row of `LOSSES` that a recipe trains with; `several`: of images with several labels each."""
    if several and section.kind == "cross_entropy":
        return "binary_cross_entropy"
    return section.kind if distill is None else "distillation"


def refuse_mixed_targets(name: str, augment: Collection[str]) -> None:
    """Refuse the loss of this row of `LOSSES` where it would be wrong for images with two labels.

    Raises:
        RecipeError: it is not linear in its target, and one of the augmentations mixes images.
    """
    mixed = [kind for kind in ("mixup", "cutmix") if kind in augment]
    if mixed and not LOSSES[name].is_linear_in_target:
        raise RecipeError(
            f"{' and '.join(mixed)} cannot be used with the loss '{name}', which is not linear in its target: "
            "the loss of a mixed image is not that of its two labels",
            key="data.augment",
            remedy=f"Remove {' and '.join(mixed)}, or train with cross_entropy",
        )


def class_weights(section: LossSection, labels_N: np.ndarray, classes: Sequence[str]) -> Tensor | None:
    """Return the weight of each class, shape (C,) float64, scaled to a mean of 1 over the training images.

    Of several labels an image they are those of `label_weights`, (2, C).

    Raises:
        RecipeError: weights for classes that are not there, or classes without one.
    """
    if has_several(labels_N):
        return label_weights(section, labels_N, classes, _weights_by_name)
    if section.class_weights == "none":
        return None
    counts_C = np.bincount(labels_N, minlength=len(classes)).astype(np.float64)
    if section.class_weights == "balanced":
        weights_C = 1.0 / np.maximum(counts_C, 1.0)
    else:
        weights_C = _weights_by_name(section.class_weights, classes)
    mean = float((weights_C * counts_C).sum() / counts_C.sum())
    if mean <= 0:
        problem = "all weights of the training images are 0: there is nothing to learn"
        raise RecipeError(problem, key="loss.class_weights")
    return torch.from_numpy(weights_C / mean)


def weigher(section: LossSection, classes: Sequence[str]) -> Callable[[Tensor], Tensor] | None:
    """Return what gives a probe `class_weights` by the labels that it is fitted to; None of images that weigh the same.

    A weight of 0 is refused: nothing would hold back the bias of such a class.
    """
    if section.class_weights == "none":
        return None
    given = {} if section.class_weights == "balanced" else section.class_weights
    if zero := [name for name, weight in given.items() if not weight]:
        problem = f"{zero[0]!r} weighs 0, and a probe has no best answer for a class that it does not learn"
        raise RecipeError(problem, key="loss.class_weights", remedy="Write a weight above 0, or leave its images out")

    def weigh(labels_N: Tensor) -> Tensor:
        weights_C = class_weights(section, labels_N.cpu().numpy(), classes)
        assert weights_C is not None, "there are some"
        return weights_C

    return weigh


def log_priors(section: LossSection, labels_N: np.ndarray, num_classes: int) -> Tensor | None:
    """Return the logarithm of each class's share of the training images, (C,) float64; None where none is asked for.

    A class without images counts as if it had one.
    """
    if section.logit_adjustment == 0:
        return None
    counts_C = np.maximum(np.bincount(labels_N, minlength=num_classes), 1).astype(np.float64)
    return torch.from_numpy(np.log(counts_C / counts_C.sum()))


def _weights_by_name(weights: dict[str, float], classes: Sequence[str]) -> np.ndarray:
    for name, weight in weights.items():
        if name not in classes:
            remedy = sentences(suggestion(name, classes), f"The classes are: {', '.join(classes)}")
            raise RecipeError(f"there is no class '{name}'", key="loss.class_weights", remedy=remedy)
        if weight < 0:
            raise RecipeError(f"the weight of '{name}' is {weight}; it must be at least 0", key="loss.class_weights")
    missing = [name for name in classes if name not in weights]
    if missing:
        problem = f"no weight for {', '.join(missing)}"
        raise RecipeError(problem, key="loss.class_weights", remedy="Give one for every class")
    return np.array([weights[name] for name in classes], dtype=np.float64)
