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
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tlscale.codes.batches import CodeBatch, CodeViews, eval_code_batches, train_code_batches
from tlscale.codes.cache import Images, Keeper, frontier_parts, input_path
from tlscale.codes.store import CodesStore, nearest_folder
from tlscale.data.loader import ImageStore, eval_batches, train_batches
from tlscale.data.sources.open import ImageSplit
from tlscale.data.transforms import ImageBatch
from tlscale.distributed.processes import Processes
from tlscale.errors import RecipeError
from tlscale.models.partition.partition import Frontier, NoFrontier, find_frontier
from tlscale.recipe.schema import CodesSection, Recipe
from tlscale.training.distillation.targets import Targets
from tlscale.training.setup import Prepared
from tlscale.training.stages import Stage


class Feed(Protocol):
    """Where batches come from, and what they go through."""

    module: nn.Module
    """What Accelerate wraps and the loop trains; it shares its parameters with the run's network."""

    def steps(self, start: int, stop: int) -> Generator[list[Any], None, None]:
        """For each step this process's micro-batches."""

    def inputs(self, batch: Any) -> tuple[Tensor, ...]:  # noqa: ANN401 (of the feed's own kind)
        """What `module` takes, on its device."""

    def eval_batches(self, split: ImageSplit) -> Iterable[Any]:
        """This process's share of a split."""


class ImageFeed:
    """Images through the whole network, beside what a teacher says of them where there is one."""

    def __init__(
        self,
        prepared: Prepared,
        processes: Processes,
        network: nn.Module,
        images: Images,
        targets: Targets | None = None,
        views: int | None = None,
    ) -> None:
        """
        Args:
            views: the augmented views of each training image; None: a new one in each epoch.
        """
        self.module = network
        self._prepared, self._processes, self._images, self._targets = prepared, processes, images, targets
        self._views = views
        self._input_path = input_path(prepared, processes)
        # Opened now, on all processes or on none: a bad image must not leave a half-begun run.
        processes.on_all(images.train)
        if prepared.data.validation is not None:
            processes.on_all(partial(images.of, prepared.data.validation))

    def steps(self, start: int, stop: int) -> Generator[list[ImageBatch], None, None]:
        prepared, processes, store = self._prepared, self._processes, self._images.train()
        batches = train_batches(
            store,
            prepared.order,
            prepared.split,
            processes.rank,
            seed=prepared.recipe.seed,
            augment=prepared.augment,
            start_step=start,
            stop_step=stop,
            views=self._views,
            workers=self._workers(store, augmented=bool(prepared.augment)),
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
        processes, store = self._processes, self._processes.on_all(partial(self._images.of, split))
        workers, targets = self._workers(store, augmented=False), self._targets
        batches = eval_batches(store, processes.rank, processes.world_size, self._prepared.eval_batch_size, workers)
        return batches if targets is None else targets.of_split(split, batches)

    def _workers(self, store: ImageStore, *, augmented: bool) -> int:
        return self._prepared.workers(
            store, self._processes.device, augmented=augmented, processes=self._processes.world_size
        )


class CodeFeed:
    """Codes of the frontier through what is behind it."""

    def __init__(
        self, stage: Stage, prepared: Prepared, processes: Processes, frontier: Frontier, keeper: Keeper
    ) -> None:
        self.module = frontier.suffix
        self._prepared, self._processes = prepared, processes
        self._frontier, self._keeper = frontier, keeper
        self._parts = frontier_parts(frontier, prepared)
        self._train = keeper.train_views(frontier.prefix, self._parts, views_of(stage, prepared))
        self._others: dict[str, CodeViews] = {}
        if prepared.data.validation is not None:
            self._of(prepared.data.validation)

    def steps(self, start: int, stop: int) -> Generator[list[CodeBatch], None, None]:
        prepared, processes = self._prepared, self._processes
        return train_code_batches(
            self._train,
            prepared.order,
            prepared.split,
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

    frontier: Frontier | None
    why: str


def open_feed(
    stage: Stage,
    prepared: Prepared,
    processes: Processes,
    keeper: Keeper,
    *,
    targets: Targets | None = None,
    decided: bool | None,
) -> tuple[Feed, bool]:
    """The feed of a stage that was entered, and whether it is one of codes.

    Args:
        targets: what a teacher says, where there is one.
        decided: what an earlier start of this run decided for this stage; it goes on in the same way.

    Raises:
        DataError: an image cannot be read, or codes are not finite.
    """
    choice = Choice(None, "as when the run began")
    if decided is not False:
        choice = agree_on_cut(stage, prepared, processes, keeper.store, is_decided=bool(decided))
    title = f"stage {stage.number + 1} of {len(prepared.stages)}: " if len(prepared.stages) > 1 else ""
    if choice.frontier is None:
        keeper.screen.say(f"{title}images through the whole network: {choice.why}")
        views = prepared.image_views(stage)
        return ImageFeed(prepared, processes, prepared.classifier, keeper.images, targets, views), False
    keeper.screen.say(f"{title}{choice.frontier.describe()}; {choice.why}")
    return CodeFeed(stage, prepared, processes, choice.frontier, keeper), True


def agree_on_cut(
    stage: Stage, prepared: Prepared, processes: Processes, store: CodesStore, *, is_decided: bool
) -> Choice:
    """The cut of a stage that was entered, where every process finds the same one."""
    device, autocast = processes.device, processes.accelerator.autocast
    choice = processes.on_all(lambda: choose_cut(stage, prepared, device, autocast, store, is_decided=is_decided))
    digests = processes.gather(choice.frontier.digest if choice.frontier else None)
    if choice.frontier is not None and any(digest != choice.frontier.digest for digest in digests):
        return Choice(None, "not every process comes to the same cut")
    return choice


def choose_cut(
    stage: Stage,
    prepared: Prepared,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]],
    store: CodesStore,
    *,
    is_decided: bool = False,
) -> Choice:
    """Where to cut the network of a stage that was entered, or why not to.

    Args:
        autocast: the context that the network runs in.
        store: where codes are kept, on the disk that is measured.
        is_decided: cut wherever it can be done, whatever it costs.
    """
    if prepared.teacher is not None:
        return Choice(None, "what is kept are the codes of its teacher")
    why_not = None if is_decided else _objection(stage, prepared)
    if stage.trains_all or why_not:
        return Choice(None, why_not or "nothing is frozen")
    images_BCHW = sample_images(prepared, device)
    try:
        with autocast():
            frontier = find_frontier(prepared.classifier, images_BCHW)
    except NoFrontier as reason:
        return Choice(None, reason.reason)
    num_bytes = kept_bytes(frontier, prepared) * num_to_keep(stage, prepared)
    size = f"{num_bytes / 2**20:,.1f} MiB of codes"
    if prepared.recipe.codes.keep == "always" or is_decided:
        return Choice(frontier, size)
    if why_not := _no_room(num_bytes, prepared.recipe.codes, store):
        return Choice(None, f"{size} {why_not}")
    if num_bytes <= prepared.recipe.codes.memory_mib * 2**20:
        return Choice(frontier, f"{size}, read into memory once")
    with autocast():
        forward_s = _forward_s(frontier.prefix, images_BCHW)
    speed = disk_bytes_per_s(store.root)
    if speed is None:
        return Choice(None, f"'{store.root}' cannot be written")
    read_s = kept_bytes(frontier, prepared) / speed
    costs = f"reading takes {1e3 * read_s:.2f} ms an image, computing {1e3 * forward_s:.2f} ms"
    return Choice(None, costs) if read_s > forward_s else Choice(frontier, f"{size}; {costs}")


def _objection(stage: Stage, prepared: Prepared) -> str | None:
    """Why codes would not pay, whatever the network; None where they may."""
    codes, data = prepared.recipe.codes, prepared.data
    if codes.keep == "never":
        return "codes.keep is never"
    if stage.trains_all:
        return "nothing is frozen"
    if codes.keep == "always":
        return None
    if prepared.augment and codes.views == 1:
        return "data.augment makes new images in each epoch (codes: {views: k} keeps k views of each)"
    seen = prepared.order.images_seen(stage.stop_step) - prepared.order.images_seen(stage.start_step)
    needed = len(data.train) * len(views_of(stage, prepared))
    if seen < needed:
        return f"the stage sees {seen:,} images, and codes of {needed:,} would be computed"
    return None


def views_of(stage: Stage, prepared: Prepared) -> list[int]:
    """The views of the training images that the epochs of the stage see."""
    order = prepared.order
    epochs = range(order.epoch(stage.start_step), order.epoch(stage.stop_step - 1) + 1)
    return sorted({epoch % prepared.recipe.codes.views for epoch in epochs[: prepared.recipe.codes.views]})


def num_to_keep(stage: Stage, prepared: Prepared) -> int:
    """Images, and augmented views of them, whose codes the stage needs; those of the test images included."""
    data = prepared.data
    others = [split for split in (data.validation, data.test) if split is not None]
    return len(data.train) * len(views_of(stage, prepared)) + sum(map(len, others))


def kept_bytes(frontier: Frontier, prepared: Prepared) -> int:
    """Bytes of an image's codes in the type that they are kept in."""
    dtype = prepared.recipe.codes.dtype
    if dtype == "auto":
        return frontier.num_bytes
    size = torch.finfo(getattr(torch, dtype)).bits // 8
    return sum(
        math.prod(value.shape) * (size if value.dtype.is_floating_point else value.dtype.itemsize)
        for value in frontier.values
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


def sample_images(prepared: Prepared, device: torch.device, count: int = _SAMPLE_IMAGES) -> Tensor:
    """Noise of the size and type of a batch: what is cut must not depend on the data."""
    spec, generator = prepared.spec, torch.Generator().manual_seed(0)
    shape = (count, spec.in_chans, spec.image_size, spec.image_size)
    images_BCHW = torch.randn(*shape, generator=generator).to(device, prepared.dtype)
    channels_last = prepared.recipe.compute.channels_last
    return images_BCHW.contiguous(memory_format=torch.channels_last) if channels_last else images_BCHW


@torch.no_grad()
def _forward_s(module: nn.Module, images_BCHW: Tensor) -> float:
    """Seconds an image through `module`: the median of three, after one to warm up."""
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        module(images_BCHW)
        _wait_for(images_BCHW.device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:]) / len(images_BCHW)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "xla":
        from tlscale.distributed import xla

        xla.run_recorded(wait=True)


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
    for key, is_set in (("layer", recipe.codes.layer is not None), ("fold_norm", recipe.codes.fold_norm)):
        if is_set:
            raise RecipeError(
                f"codes.{key} has no effect in training, which keeps the last values that nothing trainable has a part "
                "in, as they are. Take it out, or add 'probe: {kind: logistic}' to fit a classifier on codes"
            )
