"""What a stage's network is fed with: images through all of it, or codes through the part that is trained.

Promise: both feeds give the same steps, the same images in the same order, and the same weights in the end; which one
it is is a matter of cost, decided here and said on the screen. What cannot be split safely is fed with images.

Shapes: B images.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tlscale.codes.batches import CodeBatch, CodeViews, eval_code_batches, train_code_batches
from tlscale.data.loaders import ImageStore, eval_batches, train_batches
from tlscale.data.sources import ImageSplit
from tlscale.data.transforms import ImageBatch
from tlscale.dist import Processes
from tlscale.keeper import Images, Keeper, frontier_part, input_path
from tlscale.model.frontier import Frontier, NoFrontier, find_frontier
from tlscale.prepare import Prepared
from tlscale.stages import Stage


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
    """Images through the whole network."""

    def __init__(self, prepared: Prepared, processes: Processes, network: nn.Module, images: Images) -> None:
        self.module = network
        self._prepared, self._processes, self._images = prepared, processes, images
        self._input_path = input_path(prepared, processes)
        # Opened now, on all processes or on none: a bad image must not leave a half-begun run.
        processes.on_all(images.train)
        if prepared.data.validation is not None:
            processes.on_all(partial(images.of, prepared.data.validation))

    def steps(self, start: int, stop: int) -> Generator[list[ImageBatch], None, None]:
        prepared, processes, store = self._prepared, self._processes, self._images.train()
        return train_batches(
            store,
            prepared.order,
            prepared.split,
            processes.rank,
            seed=prepared.recipe.seed,
            augment=prepared.augment,
            start_step=start,
            stop_step=stop,
            workers=self._workers(store, augmented=bool(prepared.augment)),
            pin_memory=processes.device.type == "cuda",
        )

    def inputs(self, batch: ImageBatch) -> tuple[Tensor, ...]:
        return self._input_path(batch)

    def eval_batches(self, split: ImageSplit) -> Iterable[ImageBatch]:
        processes, store = self._processes, self._processes.on_all(partial(self._images.of, split))
        workers = self._workers(store, augmented=False)
        return eval_batches(store, processes.rank, processes.world_size, self._prepared.eval_batch_size, workers)

    def _workers(self, store: ImageStore, *, augmented: bool) -> int:
        return self._prepared.workers(
            store, self._processes.device, augmented=augmented, processes=self._processes.world_size
        )


class CodeFeed:
    """Codes of the frontier through what is behind it."""

    def __init__(self, prepared: Prepared, processes: Processes, frontier: Frontier, keeper: Keeper) -> None:
        self.module = frontier.suffix
        self._prepared, self._processes = prepared, processes
        self._frontier, self._keeper = frontier, keeper
        self._part = frontier_part(frontier, prepared)
        self._train = keeper.train_views(frontier.prefix, self._part)
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
            codes = self._keeper.codes(self._frontier.prefix, self._part, split)
            self._others[split.name] = CodeViews([codes], split.labels_N)
        return self._others[split.name]


@dataclass(frozen=True)
class Choice:
    """Whether a stage trains on codes, and why, in one sentence for the screen."""

    frontier: Frontier | None
    why: str


def open_feed(
    stage: Stage, prepared: Prepared, processes: Processes, keeper: Keeper, *, decided: bool | None
) -> tuple[Feed, bool]:
    """The feed of a stage that was entered, and whether it is one of codes.

    Args:
        decided: what an earlier start of this run decided for this stage; it goes on in the same way.

    Raises:
        DataError: an image cannot be read, or codes are not finite.
    """
    choice = Choice(None, "as when the run began")
    if decided is not False:
        device, autocast = processes.device, processes.accelerator.autocast
        choice = processes.on_all(
            lambda: choose_cut(stage, prepared, device, autocast, keeper.store.root, is_decided=bool(decided))
        )
    digests = processes.gather(choice.frontier.digest if choice.frontier else None)
    title = f"stage {stage.number + 1} of {len(prepared.stages)}: " if len(prepared.stages) > 1 else ""
    if choice.frontier is None or any(digest != choice.frontier.digest for digest in digests):
        keeper.screen.say(f"{title}images through the whole network: {choice.why}")
        return ImageFeed(prepared, processes, prepared.classifier, keeper.images), False
    keeper.screen.say(f"{title}{choice.frontier.describe()}; {choice.why}")
    return CodeFeed(prepared, processes, choice.frontier, keeper), True


def choose_cut(
    stage: Stage,
    prepared: Prepared,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]],
    root: Path,
    *,
    is_decided: bool = False,
) -> Choice:
    """Where to cut the network of a stage that was entered, or why not to.

    Args:
        autocast: the context that the network runs in.
        root: where codes are kept, on the disk that is measured.
        is_decided: cut wherever it can be done, whatever it costs.
    """
    codes = prepared.recipe.codes
    if codes.keep == "never" and not is_decided:
        return Choice(None, "codes.keep is never")
    if stage.trains_all:
        return Choice(None, "nothing is frozen")
    if prepared.augment and codes.views == 1 and codes.keep == "auto" and not is_decided:
        return Choice(None, "data.augment makes new images in each epoch (codes: {views: k} keeps k views of each)")
    images_BCHW = sample_images(prepared, device)
    try:
        with autocast():
            frontier = find_frontier(prepared.classifier, images_BCHW)
    except NoFrontier as reason:
        return Choice(None, reason.reason)
    num_bytes = frontier.num_bytes * prepared.num_views
    size = f"{num_bytes / 2**20:,.1f} MiB of codes"
    if codes.keep == "always" or is_decided:
        return Choice(frontier, size)
    if num_bytes > codes.disk_gib * 2**30:
        return Choice(None, f"{size} would be more than codes.disk_gib = {codes.disk_gib:g} allows")
    if num_bytes <= codes.memory_mib * 2**20:
        return Choice(frontier, f"{size}, read into memory once")
    with autocast():
        forward_s = _forward_s(frontier.prefix, images_BCHW)
    read_s = frontier.num_bytes / disk_bytes_per_s(root)
    costs = f"reading takes {1e3 * read_s:.2f} ms an image, computing {1e3 * forward_s:.2f} ms"
    return Choice(None, costs) if read_s > forward_s else Choice(frontier, f"{size}; {costs}")


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
        if images_BCHW.device.type == "cuda":
            torch.cuda.synchronize(images_BCHW.device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:]) / len(images_BCHW)


def disk_bytes_per_s(root: Path, num_bytes: int = 32 * 2**20) -> float:
    """Speed of reading from the disk below `root` what is not in memory, by a file that is removed again."""
    root.mkdir(parents=True, exist_ok=True)
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
