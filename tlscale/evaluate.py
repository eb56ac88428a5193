"""Evaluation: every image once, whatever the number of processes, and the count is asserted.

Shapes: B images, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tlscale.data.loaders import ImageStore, eval_batches
from tlscale.data.transforms import ImageBatch, InputSpec, to_input
from tlscale.dist import Processes
from tlscale.metrics import Tally, summary
from tlscale.objective import Objective


@dataclass(frozen=True)
class InputPath:
    """How a batch of uint8 images becomes the network's input on this process's device."""

    spec: InputSpec
    dtype: torch.dtype
    device: torch.device
    channels_last: bool

    def __call__(self, batch: ImageBatch) -> Tensor:
        images_BCHW = to_input(batch.to(self.device, non_blocking=True), self.spec, self.dtype)
        return images_BCHW.contiguous(memory_format=torch.channels_last) if self.channels_last else images_BCHW


def evaluate(
    network: nn.Module,
    store: ImageStore,
    *,
    input_path: InputPath,
    objective: Objective,
    classes: Sequence[str],
    batch_size: int,
    workers: int,
    processes: Processes,
) -> dict[str, Any]:
    """Figures of `network` on all images of `store`, over all processes.

    The network is the bare one: a wrapped forward pass may talk to the other processes, and they have not the same
    number of batches. It is left in the mode it came in.

    Args:
        network: images to logits (B, C).
        store: the images of one split.
        input_path: from batch to input.
        objective: gives the loss of each image.
        classes: names of the C classes.
        batch_size: images per process and forward pass.
        workers: processes that read images.
        processes: this process among all.

    Returns:
        The dict of `metrics.summary`, the same on every process.
    """
    tally = Tally(len(classes), processes.device)
    was_training = network.training
    network.eval()
    try:
        with torch.inference_mode(), processes.accelerator.autocast():
            for batch in eval_batches(store, processes.rank, processes.world_size, batch_size, workers=workers):
                logits_BC = network(input_path(batch))
                labels_B = batch.labels_B.to(logits_BC.device)
                tally.update(logits_BC, labels_B, objective.losses(logits_BC, labels_B))
    finally:
        network.train(was_training)
    counts, sums = tally.state()
    tally.load_state(processes.sum(counts), processes.sum(sums))
    figures = summary(tally, classes)
    assert figures["num_images"] == len(store), f"evaluated {figures['num_images']} of {len(store)} images"
    return figures


def scalars(figures: dict[str, Any]) -> dict[str, float]:
    """The plain numbers among some figures: what a curve can be drawn of."""
    return {
        key: value for key, value in figures.items() if isinstance(value, int | float) and not isinstance(value, bool)
    }
