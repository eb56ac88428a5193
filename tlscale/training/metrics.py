"""Exact classification figures from counts that add up over batches and processes.

Promise: `Tally` keeps only sums (int64 counts, float64 sums), so the figures do not depend on how the images were
split into batches or over processes: sum the two tensors of `state()` over all processes, `load_state` the result, and
`summary` says what one process would have said. Nothing waits for the device before `state`.

What a NaN or a tie means is fixed here. A row of logits that holds a NaN is no answer: it is counted as an image,
never as right. Where classes tie, the first one is the answer (as `argmax` has it).

Letters: B images of a batch, C classes (rows of the confusion matrix: true; columns: answered), M confidence bins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAX_CONFUSION_CLASSES = 2048
"""With more classes than this the confusion matrix (classes x classes) is not kept; all other figures are."""

NUM_BINS = 15
"""Equal-width bins of the confidence for the calibration error."""

_Z95 = 1.959963984540054  # 97.5% point of the normal distribution


class Tally:
    """Hold the sums over images from which all figures follow.

    Args:
        num_classes: C, at least 2.
        device: where the logits are; counts are kept there. Sums in float64 are kept on the CPU for a device that
            has no float64 (mps), which costs a wait per batch there.
        num_bins: M, equal-width bins of the confidence for the calibration error.
    """

    def __init__(self, num_classes: int, device: torch.device | str, num_bins: int = NUM_BINS) -> None:
        assert num_classes >= 2, "a classifier has two classes or more"
        assert num_bins >= 1, "calibration needs a bin"
        self.num_classes = num_classes
        self.num_bins = num_bins
        self.device = torch.device(device)
        self._float_device = torch.device("cpu") if self.device.type == "mps" else self.device

        def counts(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=self.device)

        self.images_C = counts(num_classes)  # images whose true class this is
        self.answers_C = counts(num_classes)  # images for which this was the answer
        self.hits_C = counts(num_classes)  # images for which it was both
        self.top5 = counts()
        self.bin_images_M = counts(num_bins)
        self.bin_hits_M = counts(num_bins)
        side = num_classes if num_classes <= MAX_CONFUSION_CLASSES else 0
        self.confusion_CC = counts(side, side)
        self.loss = torch.zeros((), dtype=torch.float64, device=self._float_device)
        self.loss_squares = torch.zeros((), dtype=torch.float64, device=self._float_device)
        self.bin_confidence_M = torch.zeros(num_bins, dtype=torch.float64, device=self._float_device)

    @torch.no_grad()
    def update(self, logits_BC: Tensor, labels_B: Tensor, losses_B: Tensor) -> None:
        """Add a batch, without waiting for the device.

        Args:
            logits_BC: of any floating dtype; fp16 and bf16 are taken to float32 first.
            labels_B: true classes, int64, 0..C-1.
            losses_B: the loss of each image, not averaged.
        """
        logits_BC = logits_BC if logits_BC.dtype == torch.float64 else logits_BC.float()
        answered_B = ~logits_BC.isnan().any(dim=1)
        # From here on only finite numbers: an infinite logit would make the softmax NaN.
        logits_BC = torch.nan_to_num(logits_BC)
        answers_B, rank_B = logits_BC.argmax(dim=1), _rank_of_label(logits_BC, labels_B)
        hits_B = answered_B & (answers_B == labels_B)

        self.images_C.index_add_(0, labels_B, torch.ones_like(labels_B))
        self.answers_C.index_add_(0, answers_B, answered_B.long())
        self.hits_C.index_add_(0, labels_B, hits_B.long())
        self.top5 += (answered_B & (rank_B < 5)).sum()
        if self.confusion_CC.numel():
            cells_B = labels_B * self.num_classes + answers_B
            self.confusion_CC.view(-1).index_add_(0, cells_B, answered_B.long())
        self._update_bins(logits_BC, answered_B, hits_B)
        losses_B = losses_B.detach().to(self._float_device).double()
        self.loss += losses_B.sum()
        self.loss_squares += losses_B.square().sum()

    def _update_bins(self, logits_BC: Tensor, answered_B: Tensor, hits_B: Tensor) -> None:
        confidence_B = logits_BC.softmax(dim=1).amax(dim=1)
        # Bin m holds (m/M, (m+1)/M], as in the paper, so a confidence of 1 is in the last one.
        bins_B = ((confidence_B * self.num_bins).ceil().long() - 1).clamp(0, self.num_bins - 1)
        self.bin_images_M.index_add_(0, bins_B, answered_B.long())
        self.bin_hits_M.index_add_(0, bins_B, hits_B.long())
        bins_M = torch.arange(self.num_bins, device=bins_B.device)
        member_BM = (bins_B[:, None] == bins_M) & answered_B[:, None]
        # A sum over a dimension, not an index_add_: that one adds floats in no fixed order on a GPU.
        member_BM, confidence_B = member_BM.to(self._float_device), confidence_B.to(self._float_device).double()
        self.bin_confidence_M += torch.where(member_BM, confidence_B[:, None], 0.0).sum(dim=0)

    @property
    def num_images(self) -> int:
        """Images counted so far (waits for the device)."""
        return int(self.images_C.sum())

    def _counts(self) -> list[Tensor]:
        return [
            *(self.images_C, self.answers_C, self.hits_C, self.top5),
            *(self.bin_images_M, self.bin_hits_M, self.confusion_CC),
        ]

    def state(self) -> tuple[Tensor, Tensor]:
        """Return all counts (int64, on the device) and all sums (float64), flat copies, to be summed over processes."""
        counts = torch.cat([tensor.reshape(-1) for tensor in self._counts()])
        return counts, torch.cat([torch.stack([self.loss, self.loss_squares]), self.bin_confidence_M])

    def load_state(self, counts: Tensor, sums: Tensor) -> None:
        """Replace what was counted so far; both as `state` gives them, on any device."""
        mine = self._counts()
        sizes = [tensor.numel() for tensor in mine]
        assert counts.dtype == torch.int64, f"counts are int64, not {counts.dtype}"
        assert sums.dtype == torch.float64, f"sums are float64, not {sums.dtype}"
        assert counts.numel() == sum(sizes), "this state is of another number of classes or bins"
        assert sums.numel() == 2 + self.num_bins, "this state is of another number of bins"
        for tensor, part in zip(mine, torch.split(counts, sizes), strict=True):
            tensor.copy_(part.view(tensor.shape))
        self.loss.copy_(sums[0])
        self.loss_squares.copy_(sums[1])
        self.bin_confidence_M.copy_(sums[2:])


def _rank_of_label(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    """Count the classes that come before the true one; `topk` would not say which of several tied classes it takes."""
    own_B1 = logits_BC.gather(1, labels_B[:, None])
    classes_C = torch.arange(logits_BC.shape[1], device=logits_BC.device)
    tied_before_BC = (logits_BC == own_B1) & (classes_C < labels_B[:, None])
    return ((logits_BC > own_B1) | tied_before_BC).sum(dim=1)


def summary(tally: Tally, class_names: Sequence[str]) -> dict[str, Any]:
    """Return all figures as plain JSON values; fractions 0..1.

    A figure that has no value (a mean over nothing, a loss that is not finite) is None. A class without images has
    None for each of its figures and is not part of `macro_f1`; a class that was never the answer has no precision.

    Returns:
        `num_images`; `top1`; `top1_interval95` (Wilson 1927, [low, high]); `top5` (None with five classes or
        fewer, where it says nothing); `loss` (mean over images); `macro_f1`; `balanced_accuracy` (the mean of
        the classes' accuracies: Brodersen et al. 2010); `ece` (expected calibration error over M equal-width
        bins: Guo et al. 2017, "On Calibration of Modern Neural Networks", eq. 3; over the images that have an
        answer); `num_without_answer` (rows of logits with a NaN); `per_class`: name -> `accuracy` (recall),
        `accuracy_interval95` (Wilson's), `precision`, `f1`, `num_images`; `confusion`: list of rows, one for
        each true class (None above `MAX_CONFUSION_CLASSES`), in which images without an answer are in no
        column.
    """
    assert len(class_names) == tally.num_classes, "a name for each class"
    assert len(set(class_names)) == len(class_names), "class names differ"
    per_class = _per_class(tally, class_names)
    num_images = sum(figures["num_images"] for figures in per_class.values())
    hits = int(tally.hits_C.sum())
    there = [figures for figures in per_class.values() if figures["num_images"]]
    return {
        "num_images": num_images,
        "top1": _ratio(hits, num_images),
        "top1_interval95": wilson(hits, num_images),
        "top5": _ratio(int(tally.top5), num_images) if tally.num_classes > 5 else None,
        "loss": _ratio(float(tally.loss), num_images),
        "macro_f1": _mean([figures["f1"] for figures in there]),
        "balanced_accuracy": _mean([figures["accuracy"] for figures in there]),
        "ece": _ece(tally),
        "num_without_answer": num_images - int(tally.answers_C.sum()),
        "per_class": per_class,
        "confusion": tally.confusion_CC.tolist() if tally.confusion_CC.numel() else None,
    }


def _per_class(tally: Tally, class_names: Sequence[str]) -> dict[str, dict[str, Any]]:
    columns = (tally.images_C.tolist(), tally.answers_C.tolist(), tally.hits_C.tolist())
    return {
        name: {
            "accuracy": _ratio(hits, images),
            "accuracy_interval95": wilson(hits, images),
            "precision": _ratio(hits, answers) if images else None,
            "f1": _ratio(2 * hits, images + answers) if images else None,
            "num_images": images,
        }
        for name, images, answers, hits in zip(class_names, *columns, strict=True)
    }


def majority(train_labels_N: np.ndarray, scored_labels_N: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """Score the answer that learns nothing from an image: always the most frequent class of the training images.

    Returns:
        `label`, the first of equally frequent ones, and `top1`, its share of the scored images.
    """
    label = int(np.bincount(train_labels_N, minlength=len(class_names)).argmax())
    return {"label": class_names[label], "top1": _ratio(int((scored_labels_N == label).sum()), len(scored_labels_N))}


def _ratio(part: float, whole: int) -> float | None:
    return part / whole if whole and math.isfinite(part) else None


def _mean(values: Sequence[float]) -> float | None:
    return _ratio(math.fsum(values), len(values))


def wilson(hits: float, num_images: int) -> list[float] | None:
    """Return the 95% score interval of a share (Wilson 1927); unlike the normal one it stays within 0..1."""
    if not num_images:
        return None
    share, z2 = hits / num_images, _Z95**2
    centre = share + z2 / (2 * num_images)
    half_width = _Z95 * math.sqrt(share * (1 - share) / num_images + z2 / (4 * num_images**2))
    scale = 1 + z2 / num_images
    low, high = (centre - half_width) / scale, (centre + half_width) / scale
    # At the ends the bounds are 0 and 1 exactly; computed, they miss them by a rounding.
    return [low if hits else 0.0, high if hits < num_images else 1.0]


def _ece(tally: Tally) -> float | None:
    """Compute the mean over images of |share right - mean confidence| of their bin, weighed by its images."""
    columns = zip(tally.bin_hits_M.tolist(), tally.bin_confidence_M.tolist(), strict=True)
    return _ratio(math.fsum(abs(hits - confidence) for hits, confidence in columns), int(tally.bin_images_M.sum()))


# -- uncertainty ------------------------------------------------------------------------------------------------------

NUM_RESAMPLED = 200
RESAMPLING_SEED = 20_240


def standard_error(tally: Tally, figure: str) -> float | None:
    """Return the standard error of a figure of `summary`: how far it moves from one draw of such images to another.

    Images in groups have another: `group_error`.

    That of `top1` is binomial, that of `loss` the standard error of a mean, and those of `macro_f1` and
    `balanced_accuracy` a bootstrap over images with a fixed seed, so that a resumed run finds what an unbroken one
    does. None of no image, or of a loss that is not finite.
    """
    num_images = tally.num_images
    if not num_images:
        return None
    if figure == "top1":
        share = int(tally.hits_C.sum()) / num_images
        return math.sqrt(share * (1 - share) / num_images)
    if figure == "loss":
        return error_of_mean(float(tally.loss), float(tally.loss_squares), num_images)
    kinds, counts_K = _kinds(tally)
    generator = np.random.default_rng(RESAMPLING_SEED)
    draws = (generator.multinomial(num_images, counts_K / num_images) for _ in range(NUM_RESAMPLED))
    return error_over_draws(draws, kinds, BY_CLASS[figure], tally.num_classes)


def error_of_mean(total: float, total_squares: float, count: int) -> float | None:
    """Return the standard error of the mean of `count` values by their sum and that of their squares."""
    if count < 2 or not math.isfinite(total_squares):
        return None
    return math.sqrt(max(total_squares / count - (total / count) ** 2, 0.0) / (count - 1))


OfClasses = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
BY_CLASS: dict[str, OfClasses] = {
    "macro_f1": lambda images_C, answers_C, hits_C: 2 * hits_C / (images_C + answers_C),
    "balanced_accuracy": lambda images_C, answers_C, hits_C: hits_C / images_C,
}
"""Figures that are means over classes: by images of a class, times that it was the answer, and both."""


Kinds = tuple[np.ndarray, np.ndarray, np.ndarray]
"""True class, answer (C: none), and whether that is right, of each kind of images."""


def error_over_draws(draws: Iterable[np.ndarray], kinds: Kinds, of_class: OfClasses, num_classes: int) -> float:
    """Compute the standard deviation, over draws of so many images of each kind, of a mean over classes."""
    labels_K, answers_K, is_hit_K = kinds
    found = []
    for drawn_K in draws:
        images_C = np.bincount(labels_K, drawn_K, num_classes)
        answers_C = np.bincount(answers_K, drawn_K, num_classes + 1)[:num_classes]
        hits_C = np.bincount(labels_K, drawn_K * is_hit_K, num_classes)
        there_C = images_C > 0
        found.append(float(of_class(images_C[there_C], answers_C[there_C], hits_C[there_C]).mean()))
    return float(np.std(found, ddof=1))


def _kinds(tally: Tally) -> tuple[Kinds, np.ndarray]:
    """Give the kinds of images that occur, and the number of each.

    Where there is no confusion matrix, wrong answers are given to the images without a right one in the order of the
    classes: each class has its own numbers, and only which one is taken for which is made up.
    """
    num_classes = tally.num_classes
    images_C, hits_C = tally.images_C.cpu().numpy(), tally.hits_C.cpu().numpy()
    if tally.confusion_CC.numel():
        table_CC = tally.confusion_CC.cpu().numpy()
        table_CA = np.concatenate([table_CC, (images_C - table_CC.sum(1))[:, None]], axis=1)
        labels_K, answers_K = table_CA.nonzero()
        return (labels_K, answers_K, labels_K == answers_K), table_CA[labels_K, answers_K]
    classes_C = np.arange(num_classes)
    missed_M = np.repeat(classes_C, images_C - hits_C)
    wrong_M = np.full(len(missed_M), num_classes)
    given_M = np.repeat(classes_C, tally.answers_C.cpu().numpy() - hits_C)
    wrong_M[: len(given_M)] = given_M
    labels_K, answers_K = np.concatenate([classes_C, missed_M]), np.concatenate([classes_C, wrong_M])
    is_hit_K = np.arange(len(labels_K)) < num_classes
    return (labels_K, answers_K, is_hit_K), np.concatenate([hits_C, np.ones_like(missed_M)])
