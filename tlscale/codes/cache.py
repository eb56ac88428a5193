"""Get the codes (cached features) of a run's images: from the store, or from the part of the network that gives them.

Promise: what identifies codes (the part's weights and structure, the transform, the dtype they are stored in, what may
change a last bit) is in their key, and nothing else is: neither batch size, workers nor the number of processes. A row
has the address of its image's content. Images are decoded only where codes are missing.

Shapes: B images, N images of a split.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tlscale.codes.addresses import SplitImages, ViewImages
from tlscale.codes.batches import CodeViews
from tlscale.codes.blocks import AddressedImages
from tlscale.codes.decoders import decoders_of, reading_of
from tlscale.codes.extract import extract_codes
from tlscale.codes.key import CodesKey
from tlscale.codes.parts import Part, layer_parts
from tlscale.codes.reader import Codes
from tlscale.codes.shards import BLOCK
from tlscale.codes.store import CodesStore
from tlscale.data.loader import ImageCache
from tlscale.data.sources.open import ImageSplit
from tlscale.data.transforms import Augmenter, ImageBatch, InputPath
from tlscale.data.views import PLAIN, View
from tlscale.distributed.host import versions_of
from tlscale.distributed.processes import Processes
from tlscale.models.features import LayerCodes
from tlscale.recipe.schema import CodesSection
from tlscale.tracking.console import Console
from tlscale.tracking.stopwatch import Stopwatch


@dataclass(frozen=True)
class CodesSpec:
    """Hold what codes depend on, next to the network and the images."""

    section: CodesSection
    inputs: InputPath
    precision: str
    """Of the forward pass: fp32, bf16, fp16 or fp64."""
    augment: dict[str, float | None]
    seed: int
    """Of the augmentation."""


@dataclass
class CodesCache:
    """Get codes from the store, and compute those that are missing."""

    spec: CodesSpec
    images: ImageCache
    processes: Processes
    console: Console
    watch: Stopwatch
    num_computed: int = 0  # images that went through a frozen part, over all processes
    cached_bytes: dict[str, int] = field(default_factory=dict)  # of the codes of each split

    def __post_init__(self) -> None:
        """Open the store; nothing is read yet."""
        self._loaded_bytes = 0
        self.store = CodesStore(limit_bytes=round(self.spec.section.cache_gib * 2**30))

    def codes(self, module: nn.Module, parts: Sequence[Part], split: ImageSplit, view: View = PLAIN) -> Codes:
        """Get the codes of a split's images as evaluation sees them, or of another view of them.

        Raises:
            DataError: an image cannot be read, or codes are not finite.
            Stopped: the run was asked to stop; what was computed stays in the store.
        """
        store = self.images.uncached(split, place=view.place)
        images = SplitImages(split, store, lambda batch: self.spec.inputs.of_views(batch, (view,))[0])
        return self._get(module, parts, images, split, view=view)

    def layer_codes(
        self, backbone: nn.Module, wanted: list[tuple[str, str]], splits: Sequence[ImageSplit], view: View = PLAIN
    ) -> dict[str, Codes]:
        """Get the codes of some layers, each a pair of layer and pooling, of each split, by its name; of a view.

        Raises:
            ModelError: a layer or a pooling that the backbone does not have.
        """
        backbone = backbone.to(self.processes.device)
        module, parts = LayerCodes(backbone, wanted), layer_parts(backbone, wanted)
        return {split.name: self.codes(module, parts, split, view) for split in splits}

    def train_views(self, module: nn.Module, parts: Sequence[Part], views: Sequence[int]) -> CodeViews:
        """Get the codes of the training images: of these augmented views of them, or of the images as they are."""
        spec, split = self.spec, self.images.data.train
        if not spec.augment:
            return CodeViews({0: self.codes(module, parts, split)}, split.labels_N)
        augmenter = Augmenter(spec.augment, spec.inputs.spec)
        uncached = self.images.uncached(split, crops="crop" in spec.augment)
        open_cached = self.images.train
        codes = {}
        for view in views:
            images = ViewImages(split, view, spec.seed, augmenter, uncached, open_cached, self._to_inputs)
            codes[view] = self._get(module, parts, images, split, augment=spec.augment)
        return CodeViews(codes, split.labels_N, spec.section.views, augmenter, spec.seed)

    def forget_loaded(self) -> None:
        """Stop counting what was read into memory: the codes of an earlier stage are not needed any more."""
        self._loaded_bytes = 0

    def stats(self) -> dict[str, Any]:
        """Return the `codes` of `result.json`: images computed by this start of the run, and MiB cached by split."""
        cached_mib = {name: round(count / 2**20, 3) for name, count in self.cached_bytes.items()}
        return {"num_computed": self.num_computed, "kept_mib": cached_mib}

    def _to_inputs(self, batch: ImageBatch) -> Tensor:
        return self.spec.inputs(batch)[0]

    def _get(
        self,
        module: nn.Module,
        parts: Sequence[Part],
        images: AddressedImages,
        split: ImageSplit,
        augment: dict[str, float | None] | None = None,
        view: View = PLAIN,
    ) -> Codes:
        autocasts = self.spec.precision in ("bf16", "fp16")

        def compute(images_BCHW: Tensor) -> tuple[Tensor, ...]:
            with self.processes.accelerator.autocast() if autocasts else nullcontext():
                codes: tuple[Tensor, ...] = module(images_BCHW)
            self.processes.local.mark_step()
            return codes

        spec = self.spec.inputs.spec
        decoders, reading = decoders_of(split, spec), reading_of(split, spec)
        with self.watch("codes"):
            codes = extract_codes(
                self.store,
                [self._key(part, augment, view, decoders, reading) for part in parts],
                images,
                module=compute,
                processes=self.processes,
                console=self.console,
                title=split.name if view == PLAIN else f"{split.name}, {view}",
            )
        self.num_computed += codes.num_computed
        self.cached_bytes[split.name] = self.cached_bytes.get(split.name, 0) + codes.num_bytes
        fits = self._loaded_bytes + codes.num_bytes <= self.spec.section.memory_mib * 2**20
        self._loaded_bytes += codes.num_bytes if fits else 0
        return codes.load() if fits else codes

    def _key(
        self,
        part: Part,
        augment: dict[str, float | None] | None,
        view: View,
        decoders: tuple[str, ...],
        reading: dict[str, str],
    ) -> CodesKey:
        spec, device = self.spec, self.processes.device
        packages = ("torch", "timm", "pillow", *(("torchvision", "numpy") if augment else ()), *decoders)
        return CodesKey(
            weights=part.weights,
            transform={
                "input": spec.inputs.spec.to_plain(),
                **({} if augment is None else {"augment": augment}),
                **({} if view == PLAIN else {"view": str(view)}),
                **reading,
            },
            layers=part.layers,
            pools=part.pools,
            dtype=spec.section.dtype,
            compute={
                "precision": spec.precision,
                "device": device.type,
                "kind": _instructions_of(device),
                "cpu": _instructions_of(torch.device("cpu")),
                "block": BLOCK,
                "channels_last": spec.inputs.channels_last,
                "folded": (),  # of a retired option; without it all keys would change
            },
            versions=versions_of(packages),
        )


def _instructions_of(device: torch.device) -> str:
    """Name what of a device may change the last bit: its instructions. For threads, see `fixed_threads`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else device.type
