"""What a stage's network is fed with: images through all of it, or codes through the part that is trained.

Promise: both feeds give the same steps, the same images in the same order, and the same weights in the end; which one
it is is a matter of cost, decided here and said on the screen. What cannot be split safely is fed with images.

Shapes: B images.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tlscale.codes.batches import CodeBatch, CodeViews, eval_code_batches, train_code_batches
from tlscale.codes.extract import extract_codes
from tlscale.codes.key import CodesKey
from tlscale.codes.reading import Codes
from tlscale.codes.store import CodesStore
from tlscale.data.loaders import ImageStore, eval_batches, make_augmenter, train_batch, train_batches
from tlscale.data.sampler import Ints, MicroBatch
from tlscale.data.sources import ImageSplit
from tlscale.data.transforms import ImageBatch
from tlscale.dist import Processes
from tlscale.evaluate import InputPath
from tlscale.model.frontier import Frontier, NoFrontier, find_frontier
from tlscale.packages import versions_of
from tlscale.prepare import Prepared
from tlscale.progress import Progress
from tlscale.stages import Stage
from tlscale.stop import StopRequest


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


class Images:
    """The images of the run's splits: each split is decoded, and kept where it fits, once in this process."""

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
        self._stores: dict[str, ImageStore] = {}

    def train(self) -> ImageStore:
        """As training wants them.

        Raises:
            DataError: an image cannot be read.
        """
        return self._store("train", self._prepared.train_store)

    def of(self, split: ImageSplit) -> ImageStore:
        """As evaluation wants them.

        Raises:
            DataError: an image cannot be read.
        """
        return self._store(split.name, partial(self._prepared.eval_store, split))

    def once(self, split: ImageSplit) -> ImageStore:
        """As evaluation wants them, when each is wanted only once: nothing is kept."""
        section = self._prepared.recipe.data.model_copy(update={"cache_mib": 0})
        return ImageStore(split, section, self._prepared.spec)

    def _store(self, name: str, make: Callable[[], ImageStore]) -> ImageStore:
        if name not in self._stores:
            self._stores[name] = make()
        return self._stores[name]


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
        self._train = keeper.train_views(frontier.prefix, frontier_key(frontier))
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
            codes = self._keeper.codes(self._frontier.prefix, frontier_key(self._frontier), split)
            self._others[split.name] = CodeViews([codes], split.labels_N)
        return self._others[split.name]


@dataclass(frozen=True)
class Part:
    """What identifies the part of a network that gives codes."""

    weights: str
    layers: tuple[str, ...]
    pools: tuple[str, ...]


def frontier_key(frontier: Frontier) -> Part:
    """The frontier's part of a key."""
    names = tuple(value.name for value in frontier.values)
    return Part(frontier.digest, names, ("as is",) * len(names))


@dataclass
class Keeper:
    """Gets codes from the store, and computes those that are missing."""

    prepared: Prepared
    processes: Processes
    images: Images
    screen: Progress
    stop: StopRequest
    num_computed: int = 0  # images that went through a frozen part, over all processes
    kept: dict[str, int] = field(default_factory=dict)  # bytes of the codes of each split

    def __post_init__(self) -> None:
        self.store = CodesStore(limit_bytes=round(self.prepared.recipe.codes.cache_gib * 2**30))

    def codes(self, module: nn.Module, part: Part, split: ImageSplit) -> Codes:
        """The codes of a split's images as evaluation sees them.

        Raises:
            DataError: an image cannot be read, or codes are not finite.
            Stopped: the run was asked to stop; what was computed stays.
        """
        key = self._key(part, split, {})
        return self._get(module, key, split, partial(self._plain_batch, self.images.once(split)))

    def train_views(self, module: nn.Module, part: Part) -> CodeViews:
        """The codes of the training images, each view as training sees it."""
        prepared, split = self.prepared, self.prepared.data.train
        if not prepared.augment:
            return CodeViews([self.codes(module, part, split)], split.labels_N)
        seed = prepared.recipe.seed
        views = [
            self._get(module, self._key(part, split, self._augmentation(view)), split, partial(self._view_batch, view))
            for view in range(prepared.recipe.codes.views)
        ]
        return CodeViews(views, split.labels_N, make_augmenter(prepared.spec, prepared.augment), seed)

    def facts(self) -> dict[str, Any]:
        """For `result.json`: how many images went through a frozen part in this start of the run, and what is kept."""
        return {"num_computed": self.num_computed, "kept_mib": {k: round(n / 2**20, 3) for k, n in self.kept.items()}}

    def _get(self, module: nn.Module, key: CodesKey, split: ImageSplit, load: Callable[[Ints], ImageBatch]) -> Codes:
        to_inputs = input_path(self.prepared, self.processes)

        def load_inputs(positions_B: Ints) -> Tensor:
            return to_inputs(load(positions_B))[0]

        def compute(images_BCHW: Tensor) -> tuple[Tensor, ...]:
            with self.processes.accelerator.autocast():
                codes: tuple[Tensor, ...] = module(images_BCHW)
            return codes

        codes = self._of_more_layers(key, split)
        if codes is None:
            codes = extract_codes(
                self.store,
                key,
                split.rows_N,
                load=load_inputs,
                module=compute,
                processes=self.processes,
                screen=self.screen,
                title=split.name,
                should_stop=lambda: self.stop.requested,
            )
        self.num_computed += codes.num_computed
        self.kept[split.name] = self.kept.get(split.name, 0) + codes.num_bytes
        fits = codes.num_bytes <= self.prepared.recipe.codes.memory_mib * 2**20
        return codes.load() if fits else codes

    def _of_more_layers(self, key: CodesKey, split: ImageSplit) -> Codes | None:
        """The codes out of an entry that has those of other layers as well, where every process finds it."""
        codes = self.processes.on_all(lambda: self.store.open_within(key, split.rows_N, say=self.screen.say))
        if self.processes.any(codes is None):
            return None
        assert codes is not None
        self.screen.say(f"codes of {split.name}: hit, among those of other layers, from '{codes.path}'")
        return codes

    def _plain_batch(self, store: ImageStore, positions_B: Ints) -> ImageBatch:
        images_BCHW = store.images(positions_B)
        assert isinstance(images_BCHW, Tensor)
        return ImageBatch(images_BCHW, store.labels(positions_B), torch.from_numpy(positions_B), len(positions_B))

    def _view_batch(self, view: int, positions_B: Ints) -> ImageBatch:
        store = self.images.train()
        augmenter = make_augmenter(store.spec, self.prepared.augment)
        return train_batch(store, augmenter, self.prepared.recipe.seed, MicroBatch(view, positions_B, len(positions_B)))

    def _augmentation(self, view: int) -> dict[str, Any]:
        """An augmented image follows from the seed, the view, and its place among the training images."""
        split = self.prepared.data.train
        return {
            "augment": self.prepared.augment,
            "seed": self.prepared.recipe.seed,
            "view": view,
            "rows": hashlib.sha256(split.rows_N.astype("<i8").tobytes()).hexdigest(),
        }

    def _key(self, part: Part, split: ImageSplit, augmentation: Mapping[str, Any]) -> CodesKey:
        recipe = self.prepared.recipe
        packages = ("torch", "timm", "pillow", *(("torchvision",) if augmentation else ()))
        return CodesKey(
            weights=part.weights,
            transform={"input": self.prepared.spec.to_plain(), **augmentation},
            layers=part.layers,
            pools=part.pools,
            dtype=recipe.codes.dtype,
            compute={
                "precision": recipe.compute.precision,
                "device": self.processes.device.type,
                "channels_last": recipe.compute.channels_last,
                "fold_norm": recipe.codes.fold_norm,
            },
            data=split.table.content,
            versions=versions_of(packages),
        )


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


def input_path(prepared: Prepared, processes: Processes) -> InputPath:
    """How this run's images become the network's input."""
    return InputPath(prepared.spec, prepared.dtype, processes.device, prepared.recipe.compute.channels_last)
