"""Evaluate: every image once, whatever the number of processes, and the count is asserted.

Shapes: B images, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from tlscale.data.sources.tables import GroupNames
from tlscale.distributed.processes import Processes
from tlscale.distributed.signals import check_stop
from tlscale.storage import faults
from tlscale.tracking.progress import Pace
from tlscale.training.class_scores import ClassScores
from tlscale.training.group_error import GroupError
from tlscale.training.label_set_loss import binary_cross_entropy
from tlscale.training.label_set_metrics import LabelScores
from tlscale.training.loss import Batch, Loss, cross_entropy
from tlscale.training.metrics import Tally, error_of_mean, standard_error, summary
from tlscale.training.predictions import Predictions

B = TypeVar("B", bound=Batch)


@dataclass(frozen=True)
class SeveralLabels:
    """Tell what is to be done with the probabilities of several labels an image."""

    thresholds: Sequence[float] | Literal["best"] | None = None
    """From which on an image has a class; None: a half; `best`: those of the best F1 on the very images."""
    groups_N: GroupNames | None = None
    """Of all images of the split, in its order, where errors and intervals are over groups; None: over images."""


def evaluate(
    network: nn.Module,
    batches: Iterable[B],
    *,
    inputs: Callable[[B], tuple[Tensor, ...]],
    num_images: int,
    loss_fn: Loss,
    classes: Sequence[str],
    processes: Processes,
    error_of: str | None = None,
    of_all: GroupError | ClassScores | None = None,
    predictions: Predictions | None = None,
    several: SeveralLabels | None = None,
) -> dict[str, Any]:
    """Compute the figures of `network` on all images of a split, over all processes.

    The network is the bare one, as a wrapped forward pass may talk to the other processes, and they do not have the
    same number of batches. One that is sharded over them they have to call equally often: a process that has no more
    batches repeats its last one, which is not counted. It is left in the mode it came in.

    Args:
        network: inputs to logits (B, C).
        batches: this process's share of the split.
        inputs: from a batch to what the network takes, on its device.
        num_images: of the split, over all processes.
        loss_fn: tells logits from auxiliary losses; the `loss` is plain cross-entropy, whatever is trained on.
        error_of: the figure whose standard error is wanted, too: one of `standard_error`, or an auxiliary loss.
        of_all: computes that error, of images in groups, or that figure as well, where it hangs on all images at once.
        predictions: takes this process's logits, image by image.
        several: images have several labels each, with these thresholds; None: they have one.

    Returns:
        The dict of `metrics.summary` (with `predictions` of data with groups the interval is over these), or for
        several labels that of `LabelFigures.summary`; the means of the auxiliary losses, and `<error_of>_se`; the same
        on every process, as is an image's error, or `Stopped`.
    """
    counting = _Counting(len(classes), loss_fn, processes, of_all, predictions, several)
    was_training = network.training
    network.eval()

    def count() -> None:
        for batch, args in _passes(batches, inputs, processes):
            processes.watchdog.beat()
            faults.at("evaluate")
            outputs_BO = network(*args)
            if batch is None:
                continue
            counting.add(outputs_BO, batch)
            processes.local.mark_step()
            pace.add(len(batch.labels_B) * processes.world_size)  # they have about equal shares

    try:
        with Pace(num_images, "evaluating") as pace, processes.without_gradients(), processes.accelerator.autocast():
            # One that cannot read an image must not leave the others waiting for its counts.
            processes.run_on_all(count)
    finally:
        network.train(was_training)
    figures = counting.over_all(classes, error_of)
    assert figures["num_images"] == num_images, f"evaluated {figures['num_images']} of {num_images} images"
    return figures


class _Counting:
    """Count what the network gives for this process's images."""

    def __init__(
        self,
        num_classes: int,
        loss_fn: Loss,
        processes: Processes,
        of_all: GroupError | ClassScores | None,
        predictions: Predictions | None,
        several: SeveralLabels | None,
    ) -> None:
        self._tally = Tally(num_classes, processes.device) if several is None else LabelScores(num_classes)
        self._plain_loss = cross_entropy if several is None else binary_cross_entropy
        self._aux = _Sums(loss_fn.aux_names, processes.device)
        self._loss_fn, self._processes, self._several = loss_fn, processes, several
        self._of_all, self._predictions = of_all, predictions

    def add(self, outputs_BO: Tensor, batch: Batch) -> None:
        logits_BC = self._loss_fn.logits(outputs_BO)
        labels_B = batch.labels_B.to(outputs_BO.device, non_blocking=True)
        losses_B, aux_losses = self._plain_loss(logits_BC, labels_B), self._loss_fn.aux_losses(outputs_BO, batch)
        self._tally.update(logits_BC, labels_B, losses_B)
        self._aux.add(aux_losses)
        if isinstance(self._of_all, GroupError):
            self._of_all.add(batch.rows_B, labels_B, logits_BC, {"loss": losses_B, **aux_losses})
        elif self._of_all is not None:
            self._of_all.add(batch.rows_B, labels_B, logits_BC)
        if self._predictions is not None:
            self._predictions.add(batch.rows_B, logits_BC)

    def over_all(self, classes: Sequence[str], error_of: str | None) -> dict[str, Any]:
        """Compute the figures of what all processes counted."""
        processes = self._processes
        figures, error_of_figure = figures_of(self._tally, classes, self._several, processes)
        num_images = figures["num_images"]
        figures |= self._aux.means(num_images, processes)
        figures = figures if self._predictions is None else self._predictions.over_groups(figures, processes.sum)
        if isinstance(self._of_all, ClassScores):
            figures |= self._of_all.over_all(processes.gather)
        elif error_of is not None and self._of_all is not None:
            figures[f"{error_of}_se"] = self._of_all.error(processes.sum)
        elif error_of is not None:
            is_aux = error_of in self._loss_fn.aux_names
            error = self._aux.error(error_of, num_images, processes) if is_aux else error_of_figure(error_of)
            figures[f"{error_of}_se"] = error
        return figures


def figures_of(
    tally: Tally | LabelScores,
    classes: Sequence[str],
    several: SeveralLabels | None = None,
    processes: Processes | None = None,
) -> tuple[dict[str, Any], Callable[[str], float | None]]:
    """Return the figures of what all processes counted (None: this one alone), and a look-up of standard errors."""
    if isinstance(tally, LabelScores):
        several = several or SeveralLabels()
        found = tally.over_all(processes.gather if processes is not None else lambda own: [own], several.groups_N)
        thresholds = several.thresholds
        least = found.best_thresholds() if thresholds == "best" else thresholds
        assert not isinstance(least, str)
        return found.summary(classes, least), found.standard_error
    if processes is not None:
        counts, sums = (processes.sum(part) for part in tally.state())
        tally = Tally(len(classes), "cpu")  # whose figures are read one by one
        tally.load_state(counts, sums)
    return summary(tally, classes), partial(standard_error, tally)


class _Sums:
    """Sum auxiliary losses over images, by name; in float64."""

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        device = torch.device("cpu") if device.type == "mps" else device  # which has no float64
        self._sums = {name: torch.zeros((), dtype=torch.float64, device=device) for name in names}
        self._squares = dict(self._sums)

    def add(self, losses: Mapping[str, Tensor]) -> None:
        for name, losses_B in losses.items():
            losses_B = losses_B.to(self._sums[name].device).double()
            self._sums[name] = self._sums[name] + losses_B.sum()
            self._squares[name] = self._squares[name] + losses_B.square().sum()

    def means(self, num_images: int, processes: Processes) -> dict[str, float | None]:
        """Return the means over all images of all processes; None where one is not finite."""
        means = {name: float(processes.sum(total)) / num_images for name, total in self._sums.items()}
        return {name: mean if math.isfinite(mean) else None for name, mean in means.items()}

    def error(self, name: str, num_images: int, processes: Processes) -> float | None:
        """Return the standard error of a mean."""
        total, squares = (float(processes.sum(parts[name])) for parts in (self._sums, self._squares))
        return error_of_mean(total, squares, num_images)


Pass = tuple[B | None, tuple[Tensor, ...]]  # a batch, and what the network takes for it


def _passes(batches: Iterable[B], inputs: Callable[[B], tuple[Tensor, ...]], processes: Processes) -> Iterator[Pass[B]]:
    """Give one for each batch; of a sharded network equally many on every process, without a batch for the others'."""
    if not processes.engine.shards:
        for own_batch in batches:
            check_stop("evaluating")
            yield own_batch, inputs(own_batch)
        return
    own = iter(batches)

    def following() -> B | None:
        check_stop("evaluating")
        return next(own, None)

    batch = processes.run_on_all(following)
    args = None if batch is None else inputs(batch)
    looks = processes.gather(None if args is None else [(arg.shape, arg.dtype) for arg in args])
    if args is None:  # fewer images than processes
        look = next((look for look in looks if look is not None), [])
        args = tuple(torch.zeros(shape, dtype=dtype, device=processes.device) for shape, dtype in look)
    while processes.any(batch is not None):
        yield batch, args
        batch = processes.run_on_all(following)
        args = args if batch is None else inputs(batch)


def scalars(figures: dict[str, Any]) -> dict[str, float]:
    """Return the plain numbers among some figures: what a curve can be drawn of."""
    return {
        key: value for key, value in figures.items() if isinstance(value, int | float) and not isinstance(value, bool)
    }
