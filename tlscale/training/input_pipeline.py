"""What a stage's network is fed with: images through all of it, or codes through the part that is trained.

Promise: both feeds give the same steps, the same images in the same order, in the same augmented views, and the same
weights in the end; which one it is is a matter of cost, decided here and said on the screen. What cannot be split
safely is fed with images.

Shapes: B images.
"""

from __future__ import annotations

import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tlscale.codes.batches import CodeBatch, CodeViews, eval_code_batches, train_code_batches
from tlscale.codes.cache import CodesCache
from tlscale.codes.parts import partition_parts
from tlscale.codes.store import CodesStore, nearest_folder
from tlscale.data.image_cache import ImageCache
from tlscale.data.loader import ImageStore, eval_batches, train_batches
from tlscale.data.sources.open import ImageSplit
from tlscale.data.transforms import ImageBatch
from tlscale.distributed.device import device_for
from tlscale.distributed.processes import Processes
from tlscale.errors import RecipeError
from tlscale.models.partition.partition import NoPartition, Partition, find_partition
from tlscale.recipe.schema import CodesSection, Recipe
from tlscale.training.distillation.targets import Targets
from tlscale.training.setup import RunSetup, input_path
from tlscale.training.stages import Stage


class InputPipeline(Protocol):
    """Where batches come from, and what they go through."""

    module: nn.Module
    """What Accelerate wraps and the loop trains; it shares its parameters with the run's network."""

    def steps(self, start: int, stop: int) -> Generator[list[Any], None, None]:
        """For each step this process's micro-batches."""

    def inputs(self, batch: Any) -> tuple[Tensor, ...]:  # noqa: ANN401 (of the feed's own kind)
        """What `module` takes, on its device."""

    def eval_batches(self, split: ImageSplit) -> Iterable[Any]:
        """This process's share of a split."""


class ImagePipeline:
    """Images through the whole network, beside what a teacher says of them where there is one."""

    def __init__(
        self,
        setup: RunSetup,
        processes: Processes,
        network: nn.Module,
        images: ImageCache,
        targets: Targets | None = None,
        views: int | None = None,
    ) -> None:
        """
        Args:
            views: the augmented views of each training image; None: a new one in each epoch.
        """
        self.module = network
        self._prepared, self._processes, self._images, self._targets = setup, processes, images, targets
        self._views = views
        self._input_path = input_path(setup, processes.device)
        # Opened now, on all processes or on none: a bad image must not leave a half-begun run.
        processes.run_on_all(images.train)
        if setup.data.validation is not None:
            processes.run_on_all(images.of, setup.data.validation)

    def steps(self, start: int, stop: int) -> Generator[list[ImageBatch], None, None]:
        setup, processes, store = self._prepared, self._processes, self._images.train()
        batches = train_batches(
            store,
            setup.order,
            setup.split,
            processes.rank,
            seed=setup.recipe.seed,
            augment=setup.augment,
            start_step=start,
            stop_step=stop,
            views=self._views,
            workers=self._workers(store, augmented=bool(setup.augment)),
            pin_memory=processes.device.type == "cuda",
        )
        return batches if self._targets is None else self._taught(batches, start, stop, self._targets)

    def _taught(
        self, batches: Generator[list[ImageBatch], None, None], start: int, stop: int, targets: Targets
    ) -> Generator[list[ImageBatch], None, None]:
        with closing(batches):
            for step in range(start, stop):
                epoch = self._prepared.order.epoch(step)
                yield [targets.of_training(batch, epoch) for batch in next(batches)]

    def inputs(self, batch: ImageBatch) -> tuple[Tensor, ...]:
        return self._input_path(batch)

    def eval_batches(self, split: ImageSplit) -> Iterable[ImageBatch]:
        processes, store = self._processes, self._processes.run_on_all(self._images.of, split)
        workers, targets = self._workers(store, augmented=False), self._targets
        batches = eval_batches(store, processes.rank, processes.world_size, self._prepared.eval_batch_size, workers)
        return batches if targets is None else targets.of_split(split, batches)

    def _workers(self, store: ImageStore, *, augmented: bool) -> int:
        return self._prepared.workers(
            store, self._processes.device, augmented=augmented, processes=self._processes.world_size
        )


class CodePipeline:
    """Codes of the frontier through what is behind it."""

    def __init__(
        self, stage: Stage, setup: RunSetup, processes: Processes, partition: Partition, codes_cache: CodesCache
    ) -> None:
        self.module = partition.suffix
        self._prepared, self._processes = setup, processes
        self._frontier, self._keeper = partition, codes_cache
        self._parts = partition_parts(partition, setup.classifier.backbone, codes_cache.spec.precision)
        self._train = codes_cache.train_views(partition.prefix, self._parts, views_of(stage, setup))
        self._others: dict[str, CodeViews] = {}
        if setup.data.validation is not None:
            self._of(setup.data.validation)

    def steps(self, start: int, stop: int) -> Generator[list[CodeBatch], None, None]:
        setup, processes = self._prepared, self._processes
        return train_code_batches(
            self._train,
            setup.order,
            setup.split,
            processes.rank,
            start_step=start,
            stop_step=stop,
            pin_memory=processes.device.type == "cuda",
        )

    def inputs(self, batch: CodeBatch) -> tuple[Tensor, ...]:
        codes = batch.to(self._processes.device, non_blocking=True).codes
        # What was kept in fewer bits goes on in the type that the network computes in.
        return tuple(code.to(value.dtype) for code, value in zip(codes, self._frontier.values, strict=True))

    def eval_batches(self, split: ImageSplit) -> Iterable[CodeBatch]:
        processes = self._processes
        batch_size = self._prepared.eval_batch_size
        return eval_code_batches(self._of(split), processes.rank, processes.world_size, batch_size)

    def _of(self, split: ImageSplit) -> CodeViews:
        if split.name not in self._others:
            codes = self._keeper.codes(self._frontier.prefix, self._parts, split)
            self._others[split.name] = CodeViews({0: codes}, split.labels_N)
        return self._others[split.name]


@dataclass(frozen=True)
class Choice:
    """Whether a stage trains on codes, and why, in one sentence for the screen."""

    partition: Partition | None
    why: str


def open_pipeline(
    stage: Stage,
    setup: RunSetup,
    processes: Processes,
    codes_cache: CodesCache,
    *,
    targets: Targets | None = None,
    decided: bool | None,
) -> tuple[InputPipeline, bool]:
    """The feed of a stage that was entered, and whether it is one of codes.

    Args:
        targets: what a teacher says, where there is one.
        decided: what an earlier start of this run decided for this stage; it goes on in the same way.

    Raises:
        DataError: an image cannot be read, or codes are not finite.
    """
    choice = Choice(None, "as when the run began")
    if decided is not False:
        choice = agree_on_partition(stage, setup, processes, codes_cache.store, force_cache=bool(decided))
    title = f"stage {stage.number + 1} of {len(setup.stages)}: " if len(setup.stages) > 1 else ""
    if choice.partition is None:
        codes_cache.console.say(f"{title}images through the whole network: {choice.why}")
        views = setup.image_views(stage)
        return ImagePipeline(setup, processes, setup.classifier, codes_cache.images, targets, views), False
    codes_cache.console.say(f"{title}{choice.partition.describe()}; {choice.why}")
    return CodePipeline(stage, setup, processes, choice.partition, codes_cache), True


def agree_on_partition(
    stage: Stage, setup: RunSetup, processes: Processes, store: CodesStore, *, force_cache: bool
) -> Choice:
    """The cut of a stage that was entered, where every process finds the same one."""
    device, autocast = processes.device, processes.accelerator.autocast
    choice = processes.run_on_all(choose_partition, stage, setup, device, autocast, store, force_cache=force_cache)
    digests = processes.gather(choice.partition.digest if choice.partition else None)
    if choice.partition is not None and any(digest != choice.partition.digest for digest in digests):
        return Choice(None, "not every process comes to the same cut")
    return choice


def choose_partition(
    stage: Stage,
    setup: RunSetup,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]],
    store: CodesStore,
    *,
    force_cache: bool = False,
) -> Choice:
    """Where to cut the network of a stage that was entered, or why not to.

    Args:
        autocast: the context that the network runs in.
        store: where codes are kept, on the disk that is measured.
        force_cache: cut wherever it can be done, whatever it costs.
    """
    if setup.teacher is not None:
        return Choice(None, "what is kept are the codes of its teacher")
    why_not = None if force_cache else _objection(stage, setup)
    if stage.trains_all or why_not:
        return Choice(None, why_not or "nothing is frozen")
    images_BCHW = sample_images(setup, device)
    try:
        with autocast():
            partition = find_partition(setup.classifier, images_BCHW)
    except NoPartition as reason:
        return Choice(None, reason.reason)
    num_bytes = kept_bytes(partition, setup) * num_to_keep(stage, setup)
    size = f"{num_bytes / 2**20:,.1f} MiB of codes"
    if setup.recipe.codes.keep == "always" or force_cache:
        return Choice(partition, size)
    if why_not := _no_room(num_bytes, setup.recipe.codes, store):
        return Choice(None, f"{size} {why_not}")
    if num_bytes <= setup.recipe.codes.memory_mib * 2**20:
        return Choice(partition, f"{size}, read into memory once")
    with autocast():
        forward_s = _forward_s(partition.prefix, images_BCHW)
    speed = disk_bytes_per_s(store.root)
    if speed is None:
        return Choice(None, f"'{store.root}' cannot be written")
    read_s = kept_bytes(partition, setup) / speed
    costs = f"reading takes {1e3 * read_s:.2f} ms an image, computing {1e3 * forward_s:.2f} ms"
    return Choice(None, costs) if read_s > forward_s else Choice(partition, f"{size}; {costs}")


def _objection(stage: Stage, setup: RunSetup) -> str | None:
    """Why codes would not pay, whatever the network; None where they may."""
    codes, data = setup.recipe.codes, setup.data
    if codes.keep == "never":
        return "codes.keep is never"
    if stage.trains_all:
        return "nothing is frozen"
    if codes.keep == "always":
        return None
    if setup.augment and codes.views == 1:
        return "data.augment makes new images in each epoch (codes: {views: k} keeps k views of each)"
    seen = setup.order.images_seen(stage.stop_step) - setup.order.images_seen(stage.start_step)
    needed = len(data.train) * len(views_of(stage, setup))
    if seen < needed:
        return f"the stage sees {seen:,} images, and codes of {needed:,} would be computed"
    return None


def views_of(stage: Stage, setup: RunSetup) -> list[int]:
    """The views of the training images that the epochs of the stage see."""
    order = setup.order
    epochs = range(order.epoch(stage.start_step), order.epoch(stage.stop_step - 1) + 1)
    return sorted({epoch % setup.recipe.codes.views for epoch in epochs[: setup.recipe.codes.views]})


def num_to_keep(stage: Stage, setup: RunSetup) -> int:
    """Images, and augmented views of them, whose codes the stage needs; those of the test images included."""
    data = setup.data
    others = [split for split in (data.validation, data.test) if split is not None]
    return len(data.train) * len(views_of(stage, setup)) + sum(map(len, others))


def kept_bytes(partition: Partition, setup: RunSetup) -> int:
    """Bytes of an image's codes in the type that they are kept in."""
    dtype = setup.recipe.codes.dtype
    if dtype == "auto":
        return partition.num_bytes
    size = torch.finfo(getattr(torch, dtype)).bits // 8
    return sum(
        math.prod(value.shape) * (size if value.dtype.is_floating_point else value.dtype.itemsize)
        for value in partition.values
    )


def _no_room(num_bytes: int, codes: CodesSection, store: CodesStore) -> str | None:
    for key in ("disk_gib", "cache_gib"):
        if num_bytes > getattr(codes, key) * 2**30:
            return f"would be more than codes.{key} = {getattr(codes, key):g} allows"
    nearest = nearest_folder(store.root)
    # What is kept may be these very codes, or go for them.
    free = shutil.disk_usage(nearest).free + sum(entry.num_bytes for entry in store.entries())
    return f"would be more than the {free / 2**20:,.0f} MiB that '{nearest}' has room for" if num_bytes > free else None


_SAMPLE_IMAGES = 8


def sample_images(setup: RunSetup, device: torch.device, count: int = _SAMPLE_IMAGES) -> Tensor:
    """Noise of the size and type of a batch: what is cut must not depend on the data."""
    spec, generator = setup.spec, torch.Generator().manual_seed(0)
    shape = (count, spec.in_chans, spec.image_size, spec.image_size)
    images_BCHW = torch.randn(*shape, generator=generator).to(device, setup.dtype)
    channels_last = setup.recipe.compute.channels_last
    return images_BCHW.contiguous(memory_format=torch.channels_last) if channels_last else images_BCHW


@torch.no_grad()
def _forward_s(module: nn.Module, images_BCHW: Tensor) -> float:
    """Seconds an image through `module`: the median of three, after one to warm up."""
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        module(images_BCHW)
        device_for(images_BCHW.device).wait()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:]) / len(images_BCHW)


def disk_bytes_per_s(root: Path, num_bytes: int = 32 * 2**20) -> float | None:
    """Speed of reading from the disk below `root` what is not in memory; None where nothing can be written there."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        return _read_speed(root, num_bytes)
    except OSError:
        return None


def _read_speed(root: Path, num_bytes: int) -> float:
    """By a file that is removed again."""
    with tempfile.NamedTemporaryFile(dir=root, prefix=".speed-") as file:
        file.write(bytes(num_bytes))
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began = time.perf_counter()
        with open(file.name, "rb", buffering=0) as reader:
            while reader.read(2**20):
                pass
        return num_bytes / (time.perf_counter() - began)


def refuse_codes_of_a_probe(recipe: Recipe) -> None:
    """
    Raises:
        RecipeError: a key that only a probe, or `tlscale codes`, knows what to do with.
    """
    if recipe.codes.layer is not None:
        raise RecipeError(
            "codes.layer has no effect in training, which caches the last values that nothing trainable has a part in, "
            "as they are. Take it out, or add 'probe: {kind: logistic}' to fit a classifier on codes"
        )
