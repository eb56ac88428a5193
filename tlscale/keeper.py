"""The codes of a run's images: found in the store, or computed by the part of the network that gives them.

Promise: what identifies codes (the part's weights and structure, the transform, the view, the data, the type they are
kept in, what may change a last bit) is in their key, and nothing else is: neither batch size, workers nor the number of
processes. Images are decoded only where codes are missing.

Shapes: B images, N images of a split.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tlscale.codes.batches import CodeViews
from tlscale.codes.extract import Load, Module, extract_codes
from tlscale.codes.key import CodesKey
from tlscale.codes.reading import Codes
from tlscale.codes.store import CodesStore
from tlscale.data.loaders import ImageStore, make_augmenter, train_batch
from tlscale.data.sampler import Ints, MicroBatch
from tlscale.data.sources import ImageSplit
from tlscale.data.transforms import ImageBatch
from tlscale.dist import Processes
from tlscale.evaluate import InputPath
from tlscale.model.backbone import function_digest
from tlscale.model.frontier import Frontier
from tlscale.model.layers import PENULTIMATE
from tlscale.packages import versions_of
from tlscale.prepare import Prepared
from tlscale.progress import Pace, Progress
from tlscale.stop import StopRequest


class Images:
    """The images of the run's splits: each split is decoded, and kept where it fits, once in this process."""

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
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

    def once(self, split: ImageSplit) -> ImageStore:
        """As evaluation wants them, when each is wanted only once: nothing is kept."""
        section = self._prepared.recipe.data.model_copy(update={"cache_mib": 0})
        return ImageStore(split, section, self._prepared.spec)

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
    """What identifies the part of a network that gives codes."""

    weights: str
    layers: tuple[str, ...]
    pools: tuple[str, ...]


def layers_part(backbone: nn.Module, wanted: Sequence[tuple[str, str]]) -> Part:
    """The part of a key for codes of layers, each a pair of layer and pooling."""
    return Part(function_digest(backbone), tuple(map(name_of, wanted)), tuple(pool for _, pool in wanted))


def name_of(pair: tuple[str, str]) -> str:
    """A layer and its pooling in words; `penultimate` has one pooling only."""
    layer, pool = pair
    return layer if layer == PENULTIMATE else f"{layer} {pool}"


def frontier_part(frontier: Frontier, prepared: Prepared) -> Part:
    """The part of a key for codes of a frontier.

    Where all of the backbone is frozen they are its penultimate codes, which a probe may have computed already (in half
    precision it would have kept them in float32, so there each has its own).
    """
    plain = [value.name for value in frontier.values]
    names = tuple(f"{name} ({at})" if name in plain[:at] else name for at, name in enumerate(plain))
    if names == (_WHOLE_BACKBONE,) and prepared.recipe.compute.precision in ("fp32", "fp64"):
        return layers_part(prepared.classifier.backbone, [(PENULTIMATE, "avg")])
    return Part(frontier.digest, names, ("as is",) * len(names))


@dataclass
class Keeper:
    """Gets codes from the store, and computes those that are missing."""

    prepared: Prepared
    processes: Processes
    images: Images
    screen: Progress
    stop: StopRequest
    in_full: bool = False  # in float32 where the run is in less
    num_computed: int = 0  # images that went through a frozen part, over all processes
    kept: dict[str, int] = field(default_factory=dict)  # bytes of the codes of each split

    def __post_init__(self) -> None:
        self._loaded_bytes = 0
        self.images.say = lambda text: self.screen.say(text)  # on the screen of the time
        self.store = CodesStore(limit_bytes=round(self.prepared.recipe.codes.cache_gib * 2**30))

    def codes(self, module: nn.Module, part: Part, split: ImageSplit) -> Codes:
        """The codes of a split's images as evaluation sees them.

        Raises:
            DataError: an image cannot be read, or codes are not finite.
            Stopped: the run was asked to stop; what was computed stays.
        """
        key = self._key(part, split, {})
        return self._get(module, key, split, partial(self._plain_batch, self.images.once(split)))

    def begin_stage(self) -> None:
        """Codes of another stage are not needed any more: their memory counts no longer."""
        self._loaded_bytes = 0

    def train_views(self, module: nn.Module, part: Part, views: Sequence[int]) -> CodeViews:
        """The codes of the training images: these augmented views of them, or the images as they are."""
        prepared, split = self.prepared, self.prepared.data.train
        if not prepared.augment:
            return CodeViews({0: self.codes(module, part, split)}, split.labels_N)
        seed = prepared.recipe.seed
        kept = {
            view: self._get(
                module, self._key(part, split, self._augmentation(view)), split, partial(self._view_batch, view)
            )
            for view in views
        }
        augmenter = make_augmenter(prepared.spec, prepared.augment)
        return CodeViews(kept, split.labels_N, prepared.recipe.codes.views, augmenter, seed)

    @property
    def _precision(self) -> str:
        precision = self.prepared.recipe.compute.precision
        return "fp32" if self.in_full and precision != "fp64" else precision

    def facts(self) -> dict[str, Any]:
        """For `result.json`: how many images went through a frozen part in this start of the run, and what is kept."""
        return {"num_computed": self.num_computed, "kept_mib": {k: round(n / 2**20, 3) for k, n in self.kept.items()}}

    def _get(self, module: nn.Module, key: CodesKey, split: ImageSplit, load: Callable[[Ints], ImageBatch]) -> Codes:
        to_inputs = input_path(self.prepared, self.processes)

        def load_inputs(positions_B: Ints) -> Tensor:
            return to_inputs(load(positions_B))[0]

        def compute(images_BCHW: Tensor) -> tuple[Tensor, ...]:
            with nullcontext() if self.in_full else self.processes.accelerator.autocast():
                codes: tuple[Tensor, ...] = module(images_BCHW)
            self.processes.run_recorded()
            return codes

        with self.prepared.watch("codes"):
            return self._found_or_computed(key, split, load_inputs, compute)

    def _found_or_computed(self, key: CodesKey, split: ImageSplit, load: Load, module: Module) -> Codes:
        codes = self._of_more_layers(key, split)
        if codes is None:
            codes = extract_codes(
                self.store,
                key,
                split.rows_N,
                load=load,
                module=module,
                processes=self.processes,
                screen=self.screen,
                title=split.name,
                should_stop=lambda: self.stop.requested,
            )
        self.num_computed += codes.num_computed
        self.kept[split.name] = self.kept.get(split.name, 0) + codes.num_bytes
        fits = self._loaded_bytes + codes.num_bytes <= self.prepared.recipe.codes.memory_mib * 2**20
        self._loaded_bytes += codes.num_bytes if fits else 0
        return codes.load() if fits else codes

    def _of_more_layers(self, key: CodesKey, split: ImageSplit) -> Codes | None:
        """The codes out of an entry that has those of other layers as well, where every process finds it."""
        if not self.processes.on_main(lambda: self._is_among_more_layers(key, split)):
            return None
        codes = self.processes.on_all(lambda: self.store.open_within(key, split.rows_N, verify=False))
        if self.processes.any(codes is None):
            return None
        assert codes is not None
        self.screen.say(f"codes of {split.name}: hit, among those of other layers, from '{codes.path}'")
        return codes

    def _is_among_more_layers(self, key: CodesKey, split: ImageSplit) -> bool:
        """Whether they are not there by themselves, and are in another entry, where every byte is verified."""
        if not len(self.store.missing(key, split.rows_N, verify=False)):
            return False
        return self.store.open_within(key, split.rows_N, say=self.screen.say) is not None

    def _plain_batch(self, store: ImageStore, positions_B: Ints) -> ImageBatch:
        images_BCHW = store.images(positions_B)
        assert isinstance(images_BCHW, Tensor)
        return ImageBatch(images_BCHW, store.labels(positions_B), torch.from_numpy(positions_B), len(positions_B))

    def _view_batch(self, view: int, positions_B: Ints) -> ImageBatch:
        store = self.images.train(every=True)
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
        packages = ("torch", "timm", "pillow", *(("torchvision", "numpy") if augmentation else ()))
        return CodesKey(
            weights=part.weights,
            transform={
                "input": self.prepared.spec.to_plain(),
                "image_column": recipe.data.image_column,  # of a table that has several
                **augmentation,
            },
            layers=part.layers,
            pools=part.pools,
            dtype=recipe.codes.dtype,
            compute={
                "precision": self._precision,
                "device": self.processes.device.type,
                "channels_last": recipe.compute.channels_last,
                "fold_norm": recipe.codes.fold_norm,
            },
            data=split.table.content,
            versions=versions_of(packages),
        )


def input_path(prepared: Prepared, processes: Processes) -> InputPath:
    """How this run's images become the network's input."""
    return InputPath(prepared.spec, prepared.dtype, processes.device, prepared.recipe.compute.channels_last)
