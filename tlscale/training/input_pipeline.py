"""Feed a stage's network: images through all of it, or codes (cached features) through the part that is trained.

Promise: both pipelines give the same steps, the same images in the same order, in the same augmented views, and the
same weights in the end.

Shapes: B images.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from tlscale.codes.batches import CodeBatch, CodeViews, eval_code_batches, train_code_batches
from tlscale.codes.cache import CodesCache
from tlscale.codes.parts import partition_parts
from tlscale.codes.reader import Codes
from tlscale.data.loader import ImageCache, ImageStore, eval_batches, train_batches
from tlscale.data.sampler import BatchSplit, DataOrder
from tlscale.data.sources.open import ImageData, ImageSplit
from tlscale.data.sources.tables import Ints
from tlscale.data.transforms import ImageBatch, InputPath
from tlscale.data.views import PLAIN, View
from tlscale.data.workers import default_workers
from tlscale.distributed.processes import Processes
from tlscale.errors import TlscaleError
from tlscale.models.classifier import Classifier
from tlscale.models.partition.partition import Partition
from tlscale.models.unknown import pooled_codes
from tlscale.recipe.schema import DataSection
from tlscale.training.cache_decision import CacheSpec, Choice, agree_on_partition
from tlscale.training.distillation.targets import TeacherTargets


@dataclass(frozen=True)
class PipelineSpec:
    """Everything that the batches of a run depend on, next to the network and what is cached."""

    data: ImageData
    section: DataSection
    order: DataOrder
    split: BatchSplit
    seed: int
    augment: dict[str, float | None]
    eval_batch_size: int
    inputs: InputPath
    views: tuple[View, ...] = (PLAIN,)
    """That an evaluation averages over."""


class InputPipeline(Protocol):
    """Make batches, and what the network takes of them."""

    module: nn.Module
    """What Accelerate wraps and the loop trains; it shares its parameters with the run's network."""
    workers: int | None
    """Processes that read images for this one in training; None: more of them would not help."""

    def steps(self, start: int, stop: int) -> Generator[list[Any], None, None]:
        """Give this process's micro-batches of each step."""

    def inputs(self, batch: Any) -> tuple[Tensor, ...]:  # noqa: ANN401 (of the pipeline's own kind)
        """Return what `module` takes, on its device."""

    def eval_batches(self, split: ImageSplit) -> Iterable[Any]:
        """Give this process's share of a split."""

    def eval_inputs(self, batch: Any) -> tuple[Tensor, ...]:  # noqa: ANN401 (of the pipeline's own kind)
        """Return what `module` takes of each view, one after the other, of a batch of `eval_batches`."""


class ImagePipeline:
    """Feed images to the whole network, next to a teacher's targets where there is one."""

    def __init__(
        self,
        spec: PipelineSpec,
        processes: Processes,
        network: nn.Module,
        images: ImageCache,
        targets: TeacherTargets | None = None,
        views: int | None = None,
        num_seen: int | None = None,
        last_split: ImageSplit | None = None,
    ) -> None:
        """Open the training and the validation split, and `last_split`, as `open_pipeline` takes it.

        `views` are the augmented views of each training image, None: a new one in each epoch; `num_seen` is as
        `ImageCache.train` takes it.
        """
        self.module = network
        self._spec, self._processes, self._images, self._targets = spec, processes, images, targets
        self._views = views
        # Opened now, on all processes or on none: a bad image must not leave a half-begun run.
        self._train = processes.run_on_all(images.train, num_seen)
        for split in (spec.data.validation, last_split):
            if split is not None:
                processes.run_on_all(images.of, split)
        workers = self._workers(self._train, augmented=bool(spec.augment))
        # On a CPU the network has all cores at work.
        self.workers = workers if workers or processes.device.type != "cpu" else None

    def steps(self, start: int, stop: int) -> Generator[list[ImageBatch], None, None]:
        spec, processes, store = self._spec, self._processes, self._train
        batches = train_batches(
            store,
            spec.order,
            spec.split,
            processes.rank,
            seed=spec.seed,
            augment=spec.augment,
            start_step=start,
            stop_step=stop,
            views=self._views,
            workers=self.workers or 0,
            pin_memory=processes.pins_memory,
        )
        if processes.world_size > 1 and not store.cached:
            batches = _in_step(batches, processes)
        return batches if self._targets is None else self._taught(batches, start, stop, self._targets)

    def _taught(
        self, batches: Generator[list[ImageBatch], None, None], start: int, stop: int, targets: TeacherTargets
    ) -> Generator[list[ImageBatch], None, None]:
        with closing(batches):
            for step in range(start, stop):
                epoch = self._spec.order.epoch(step)
                yield [targets.of_training(batch, epoch) for batch in next(batches)]

    def inputs(self, batch: ImageBatch) -> tuple[Tensor, ...]:
        return self._spec.inputs(batch)

    def eval_inputs(self, batch: ImageBatch) -> tuple[Tensor, ...]:
        return self._spec.inputs.of_views(batch, self._spec.views)

    def eval_batches(self, split: ImageSplit) -> Iterable[ImageBatch]:
        processes, store = self._processes, self._processes.run_on_all(self._images.of, split)
        workers, targets = self._workers(store, augmented=False), self._targets
        batches = eval_batches(
            store,
            processes.rank,
            processes.world_size,
            self._spec.eval_batch_size,
            workers,
            pin_memory=processes.pins_memory,
        )
        return batches if targets is None else targets.of_split(split, batches)

    def _workers(self, store: ImageStore, *, augmented: bool) -> int:
        processes = self._processes
        return default_workers(
            self._spec.section,
            cached=store.cached,
            augmented=augmented,
            device=processes.device,
            processes=processes.world_size,
        )


@dataclass(frozen=True)
class _Fetched:
    """Hold a step's micro-batches on this process, or why there are none, while the other processes are asked."""

    micro_batches: list[ImageBatch] | None
    error: TlscaleError | None
    has_any_failed: Callable[[], bool]

    def get(self) -> list[ImageBatch] | None:
        if self.error is not None:
            raise self.error
        return self.micro_batches


def _fetch(batches: Iterator[list[ImageBatch]], processes: Processes) -> _Fetched:
    micro_batches, error = None, None
    try:
        micro_batches = next(batches, None)
    except TlscaleError as raised:
        error = raised
    return _Fetched(micro_batches, error, processes.any_later(error is not None))


def _in_step(
    batches: Generator[list[ImageBatch], None, None], processes: Processes
) -> Generator[list[ImageBatch], None, None]:
    """Yield each step's micro-batches once every process has its own.

    One that cannot read an image must not leave the others waiting in a step, nor let them make it without its images.
    The processes ask one another while they make the step before.

    Raises:
        TlscaleError: on every process, where one of them has no batch for this reason.
    """
    with closing(batches):
        ahead = _fetch(batches, processes)
        while True:
            fetched = ahead
            micro_batches = processes.run_on_all(fetched.get) if fetched.has_any_failed() else fetched.micro_batches
            if micro_batches is None:
                return
            ahead = _fetch(batches, processes)
            yield micro_batches


_POOLED = 512  # images whose codes are in memory at a time


class CodePipeline:
    """Feed the codes of a partition's prefix to its suffix."""

    def __init__(
        self,
        spec: PipelineSpec,
        processes: Processes,
        network: Classifier,
        partition: Partition,
        codes_cache: CodesCache,
        views: Sequence[int],
        last_split: ImageSplit | None = None,
    ) -> None:
        """Get or compute the codes of the training images, as the stage sees them, and of what is evaluated.

        `last_split` is as `open_pipeline` takes it.
        """
        self.module = partition.suffix
        self.workers: int | None = None
        self._spec, self._processes = spec, processes
        self._partition, self._codes_cache = partition, codes_cache
        self._parts = partition_parts(partition, network.backbone, codes_cache.spec.precision)
        self._train = codes_cache.train_views(partition.prefix, self._parts, views)
        self._evaluated: dict[str, CodeViews] = {}
        self._plain: dict[str, Codes] = {}
        for split in (spec.data.validation, last_split):
            if split is not None:
                self._of(split)

    def steps(self, start: int, stop: int) -> Generator[list[CodeBatch], None, None]:
        spec, processes = self._spec, self._processes
        return train_code_batches(
            self._train,
            spec.order,
            spec.split,
            processes.rank,
            start_step=start,
            stop_step=stop,
            pin_memory=processes.pins_memory,
        )

    def inputs(self, batch: CodeBatch) -> tuple[Tensor, ...]:
        codes, values = batch.to(self._processes.device, non_blocking=True).codes, self._partition.values
        values = values * (len(codes) // len(values))  # of each view
        # What was cached in fewer bits is converted to the dtype that the network computes in.
        return tuple(code.to(value.dtype) for code, value in zip(codes, values, strict=True))

    def eval_inputs(self, batch: CodeBatch) -> tuple[Tensor, ...]:
        return self.inputs(batch)

    def eval_batches(self, split: ImageSplit) -> Iterable[CodeBatch]:
        processes = self._processes
        return eval_code_batches(
            self._of(split),
            processes.rank,
            processes.world_size,
            self._spec.eval_batch_size,
            pin_memory=processes.pins_memory,
        )

    def pooled(self, split: str, rows_N: Ints) -> Tensor:
        """Return codes of some rows of a split, a vector an image; of their plain view where it is evaluated."""
        codes = next(iter(self._train.views.values())) if split == "train" else self._plain[split]
        parts = np.array_split(rows_N, -(-len(rows_N) // _POOLED))
        image_hw = self._spec.inputs.spec.image_hw
        return torch.cat([pooled_codes(codes.take(rows_B), image_hw) for rows_B in parts])

    def _of(self, split: ImageSplit) -> CodeViews:
        if split.name not in self._evaluated:
            codes_of = partial(self._codes_cache.codes, self._partition.prefix, self._parts, split)
            plain, *others = [codes_of(view) for view in self._spec.views]
            self._plain[split.name] = plain
            joined = plain.joined_with(others) if others else plain
            self._evaluated[split.name] = CodeViews({0: joined}, split.labels_N)
        return self._evaluated[split.name]


def open_pipeline(
    network: Classifier,
    spec: PipelineSpec,
    caching: CacheSpec,
    processes: Processes,
    codes_cache: CodesCache,
    *,
    title: str = "",
    image_views: int | None,
    num_seen: int,
    targets: TeacherTargets | None = None,
    decided: bool | None,
    last_split: ImageSplit | None = None,
) -> tuple[InputPipeline, bool]:
    """Open the pipeline of a stage that was entered; return it, and whether it is one of codes.

    Args:
        caching: of the stage.
        title: of the stage, before its line on the console.
        image_views: where it is fed with images, the number of augmented views of each; None: a new one each epoch.
        num_seen: where it is fed with images, how many it and the stages after it see in training.
        decided: whether an earlier start of this run chose codes for this stage, so that it is resumed in the same way.
        last_split: evaluated after training, opened now to find a bad image before it; None: not evaluated, or training
            is over.

    Raises:
        DataError: an image cannot be read, or codes are not finite.
    """
    choice = Choice(None, "as when the run began")
    if decided is not False:
        choice = agree_on_partition(network, caching, processes, codes_cache.store, force_cache=bool(decided))
    if choice.partition is None:
        codes_cache.console.detail(f"{title}images through the whole network: {choice.why}")
        images = codes_cache.images
        return ImagePipeline(spec, processes, network, images, targets, image_views, num_seen, last_split), False
    codes_cache.console.detail(f"{title}{choice.partition.describe()}; {choice.why}")
    return CodePipeline(spec, processes, network, choice.partition, codes_cache, caching.views, last_split), True
