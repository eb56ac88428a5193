"""Batch codes for a stage that trains on them instead of images, in the very order that the images would come in.

Promise: step s has the images that it would have without codes. With k views, epoch e sees what it would see in epoch
e modulo k: the same augmentation, the same partners of mixup.

Shape letters: B images of a batch.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from tlscale.codes.reader import Codes
from tlscale.data.sampler import (
    BatchSplit,
    DataOrder,
    Ints,
    MicroBatch,
    Stream,
    eval_rows,
    image_keys,
    micro_batches,
)
from tlscale.data.transforms import Augmenter
from tlscale.data.workers import load_in_order
from tlscale.distributed.device import TensorBatch


@dataclass(slots=True)
class CodeBatch(TensorBatch):
    """Carry codes to the device; rows from `num_real` on are padding and weigh nothing."""

    codes: tuple[Tensor, ...]  # each (B, ...)
    labels_B: Tensor  # int64
    rows_B: Tensor  # int64: which image of its split
    num_real: int
    # Of the images that mixup or cutmix put in, before the codes were computed; both or none.
    partner_labels_B: Tensor | None = None
    lam_B: Tensor | None = None


@dataclass(frozen=True)
class CodeViews:
    """Hold the codes of a split's images by view, positions as in the split.

    In epoch e, which may be an image's own, view e modulo `num_views` is seen.
    """

    views: Mapping[int, Codes]
    labels_N: Ints
    num_views: int = 1
    augmenter: Augmenter | None = None  # where it mixes images
    seed: int = 0

    def by_name(self, split: str) -> dict[str, Codes]:
        """Return each view under a name for tables."""
        return {f"{split}, view {view}" if len(self.views) > 1 else split: codes for view, codes in self.views.items()}

    def batch(self, micro_batch: MicroBatch) -> CodeBatch:
        """Take the codes of a micro-batch, of the view of its epoch."""
        view, rows_B = micro_batch.epoch % self.num_views, micro_batch.rows_B
        batch = CodeBatch(
            self.views[view].take(rows_B) if isinstance(view, int) else self._take_each(view, rows_B),
            torch.from_numpy(self.labels_N[rows_B]),
            torch.from_numpy(rows_B),
            micro_batch.num_real,
        )
        if self.augmenter is not None and self.augmenter.mixes:
            keys_B = image_keys(self.seed, view, rows_B, Stream.MIX)
            mixes = self.augmenter.draw_mixes(keys_B, len(self.labels_N))
            batch.partner_labels_B = torch.from_numpy(self.labels_N[mixes.partners_B])
            batch.lam_B = torch.from_numpy(mixes.lam_B)
        return batch

    def _take_each(self, views_B: Ints, rows_B: Ints) -> tuple[Tensor, ...]:
        """Take each image's codes of its own view."""
        if (views_B == views_B[0]).all():
            return self.views[int(views_B[0])].take(rows_B)
        groups = [(view, np.flatnonzero(views_B == view)) for view in np.unique(views_B).tolist()]
        order_B = torch.from_numpy(np.argsort(np.concatenate([here for _, here in groups])))
        taken = zip(*(self.views[view].take(rows_B[here]) for view, here in groups), strict=True)
        return tuple(torch.cat(parts).index_select(0, order_B) for parts in taken)


def train_code_batches(
    codes: CodeViews,
    order: DataOrder,
    split: BatchSplit,
    rank: int,
    *,
    start_step: int,
    stop_step: int,
    pin_memory: bool = False,
) -> Generator[list[CodeBatch], None, None]:
    """Yield this process's micro-batches for each step from `start_step` to before `stop_step`."""
    steps = range(start_step, stop_step)
    wanted = (micro_batch for step in steps for micro_batch in micro_batches(order, step, split, rank))
    batches = load_in_order(codes.batch, wanted, 0, pin_memory)
    for step in steps:
        yield list(islice(batches, split.num_micro_batches(order.num_images_in(step))))


def eval_code_batches(
    codes: CodeViews, rank: int, world_size: int, batch_size: int, pin_memory: bool = False
) -> Generator[CodeBatch, None, None]:
    """Yield this process's share of all images, each once over all processes."""
    wanted = (
        MicroBatch(0, rows_B, len(rows_B)) for rows_B in eval_rows(len(codes.labels_N), rank, world_size, batch_size)
    )
    return load_in_order(codes.batch, wanted, 0, pin_memory)
