"""The codes of a run's images: found in the store, or computed by the part of the network that gives them.

Promise: what identifies codes (the part's weights and structure, the transform, the type they are kept in, what may
change a last bit) is in their key, and nothing else is: neither batch size, workers nor the number of processes. A row
has the address of its image's content. Images are decoded only where codes are missing.

Shapes: B images, N images of a split.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tlscale.codes.addresses import SplitPictures, ViewPictures
from tlscale.codes.batches import CodeViews
from tlscale.codes.blocks import Pictures
from tlscale.codes.extract import extract_codes
from tlscale.codes.key import CodesKey
from tlscale.codes.reader import Codes
from tlscale.codes.shards import BLOCK
from tlscale.codes.store import CodesStore
from tlscale.data.loader import ImageStore, make_augmenter
from tlscale.data.sources.open import ImageSplit
from tlscale.data.transforms import ImageBatch
from tlscale.distributed.host import versions_of
from tlscale.distributed.processes import Processes
from tlscale.distributed.signals import StopRequest
from tlscale.models.backbone import function_digest
from tlscale.models.features import PENULTIMATE
from tlscale.models.partition.partition import Partition
from tlscale.tracking.console import Console, Pace
from tlscale.training.evaluate import InputPath
from tlscale.training.setup import RunSetup


class Images:
    """The images of the run's splits: each split is decoded, and kept where it fits, once in this process."""

    def __init__(self, setup: RunSetup) -> None:
        self._prepared = setup
        self._stores: dict[str, ImageStore] = {}
        self.say: Callable[[str], None] = lambda text: None  # how far decoding is

    def train(self, *, every: bool = False) -> ImageStore:
        """As training wants them; nothing is decoded beforehand where the run's steps see few of them.

        Args:
            every: all of them are wanted.

        Raises:
            DataError: an image cannot be read.
        """
        split, keep = self._prepared.data.train, every or self._prepared.needs_all_images
        make = partial(self._prepared.train_store, keep=keep, on_images=self._pace(split))
        return self._store("train" if keep else "few of train", make)

    def of(self, split: ImageSplit) -> ImageStore:
        """As evaluation wants them.

        Raises:
            DataError: an image cannot be read.
        """
        return self._store(split.name, partial(self._prepared.eval_store, split, on_images=self._pace(split)))

    def once(self, split: ImageSplit, *, crops: bool = False) -> ImageStore:
        """As evaluation wants them (with `crops`, as training), when each is wanted only once: nothing is kept."""
        section = self._prepared.recipe.data.model_copy(update={"cache_mib": 0})
        return ImageStore(split, section, self._prepared.spec, crops=crops)

    def _pace(self, split: ImageSplit) -> Callable[[int], None]:
        return Pace(len(split), lambda text: self.say(text), f"decoding {split.name}").add

    def _store(self, name: str, make: Callable[[], ImageStore]) -> ImageStore:
        if name not in self._stores:
            with self._prepared.watch("decode"):
                self._stores[name] = make()
        return self._stores[name]


_WHOLE_BACKBONE = "backbone"  # the name of the classifier's child, where that is cut off as a whole


@dataclass(frozen=True)
class Part:
    """What identifies values that a part of a network gives, and that are always wanted together."""

    weights: str
    layers: tuple[str, ...]
    pools: tuple[str, ...]
    folded: tuple[str, ...] = ()
    """Convolutions that have taken up the norms behind them."""


def layers_parts(backbone: nn.Module, wanted: Sequence[tuple[str, str]], folded: Sequence[str] = ()) -> list[Part]:
    """The parts of codes of layers, each a pair of layer and pooling, and each looked up by itself."""
    weights = function_digest(backbone)
    return [Part(weights, (name_of(pair),), (pair[1],), tuple(folded)) for pair in wanted]


def name_of(pair: tuple[str, str]) -> str:
    """A layer and its pooling in words; `penultimate` has one pooling only."""
    layer, pool = pair
    return layer if layer == PENULTIMATE else f"{layer} {pool}"


def partition_parts(partition: Partition, setup: RunSetup) -> list[Part]:
    """The parts of codes of a frontier: one.

    Where all of the backbone is frozen they are its penultimate codes, which a probe may have computed already (in half
    precision it would have kept them in float32, so there each has its own).
    """
    plain = [value.name for value in partition.values]
    names = tuple(f"{name} ({at})" if name in plain[:at] else name for at, name in enumerate(plain))
    if names == (_WHOLE_BACKBONE,) and setup.recipe.compute.precision in ("fp32", "fp64"):
        return layers_parts(setup.classifier.backbone, [(PENULTIMATE, "avg")])
    return [Part(partition.digest, names, ("as is",) * len(names))]


@dataclass
class CodesCache:
    """Gets codes from the store, and computes those that are missing."""

    setup: RunSetup
    processes: Processes
    images: Images
    console: Console
    stop: StopRequest
    force_fp32: bool = False  # in float32 where the run is in less
    num_computed: int = 0  # images that went through a frozen part, over all processes
    kept: dict[str, int] = field(default_factory=dict)  # bytes of the codes of each split

    def __post_init__(self) -> None:
        self._loaded_bytes = 0
        self.images.say = lambda text: self.console.say(text)  # on the screen of the time
        self.store = CodesStore(limit_bytes=round(self.setup.recipe.codes.cache_gib * 2**30))

    def codes(self, module: nn.Module, parts: Sequence[Part], split: ImageSplit) -> Codes:
        """The codes of a split's images as evaluation sees them.

        Raises:
            DataError: an image cannot be read, or codes are not finite.
            Stopped: the run was asked to stop; what was computed stays.
        """
        return self._get(module, parts, SplitPictures(split, self.images.once(split), self._to_inputs), split.name)

    def begin_stage(self) -> None:
        """Codes of another stage are not needed any more: their memory counts no longer."""
        self._loaded_bytes = 0

    def train_views(self, module: nn.Module, parts: Sequence[Part], views: Sequence[int]) -> CodeViews:
        """The codes of the training images: these augmented views of them, or the images as they are."""
        setup, split = self.setup, self.setup.data.train
        if not setup.augment:
            return CodeViews({0: self.codes(module, parts, split)}, split.labels_N)
        seed, augmenter = setup.recipe.seed, make_augmenter(setup.spec, setup.augment)
        bare = self.images.once(split, crops="crop" in setup.augment)
        kept = {}
        for view in views:
            every = partial(self.images.train, every=True)
            pictures = ViewPictures(split, view, seed, augmenter, bare, every, self._to_inputs)
            kept[view] = self._get(module, parts, pictures, split.name, augment=setup.augment)
        return CodeViews(kept, split.labels_N, setup.recipe.codes.views, augmenter, seed)

    @property
    def _precision(self) -> str:
        precision = self.setup.recipe.compute.precision
        return "fp32" if self.force_fp32 and precision != "fp64" else precision

    def facts(self) -> dict[str, Any]:
        """For `result.json`: how many images went through a frozen part in this start of the run, and what is kept."""
        return {"num_computed": self.num_computed, "kept_mib": {k: round(n / 2**20, 3) for k, n in self.kept.items()}}

    @property
    def _to_inputs(self) -> Callable[[ImageBatch], Tensor]:
        to_inputs = input_path(self.setup, self.processes)
        return lambda batch: to_inputs(batch)[0]

    def _get(
        self,
        module: nn.Module,
        parts: Sequence[Part],
        pictures: Pictures,
        split: str,
        augment: dict[str, float | None] | None = None,
    ) -> Codes:
        def compute(images_BCHW: Tensor) -> tuple[Tensor, ...]:
            with nullcontext() if self.force_fp32 else self.processes.accelerator.autocast():
                codes: tuple[Tensor, ...] = module(images_BCHW)
            self.processes.mark_step()
            return codes

        with self.setup.watch("codes"):
            codes = extract_codes(
                self.store,
                [self._key(part, augment) for part in parts],
                pictures,
                module=compute,
                processes=self.processes,
                console=self.console,
                title=split,
                should_stop=lambda: self.stop.requested,
            )
        self.num_computed += codes.num_computed
        self.kept[split] = self.kept.get(split, 0) + codes.num_bytes
        fits = self._loaded_bytes + codes.num_bytes <= self.setup.recipe.codes.memory_mib * 2**20
        self._loaded_bytes += codes.num_bytes if fits else 0
        return codes.load() if fits else codes

    def _key(self, part: Part, augment: dict[str, float | None] | None) -> CodesKey:
        recipe = self.setup.recipe
        packages = ("torch", "timm", "pillow", *(("torchvision", "numpy") if augment else ()))
        return CodesKey(
            weights=part.weights,
            transform={
                "input": self.setup.spec.to_plain(),
                **({"augment": augment} if augment is not None else {}),
            },
            layers=part.layers,
            pools=part.pools,
            dtype=recipe.codes.dtype,
            compute={
                "precision": self._precision,
                "device": self.processes.device.type,
                "kind": _kind_of(self.processes.device),
                "cpu": _kind_of(torch.device("cpu")),
                "block": BLOCK,
                "channels_last": recipe.compute.channels_last,
                "folded": part.folded,
            },
            versions=versions_of(packages),
        )


def _kind_of(device: torch.device) -> str:
    """What of a device may change the last bit: its instructions. Threads: see `fixed_threads`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else device.type


def input_path(setup: RunSetup, processes: Processes) -> InputPath:
    """How this run's images become the network's input."""
    return InputPath(setup.spec, setup.dtype, processes.device, setup.recipe.compute.channels_last)
