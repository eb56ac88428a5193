"""Load batches from the images of a split: decoded, cached, augmented, in the sampler's order.

Promise: the batches of a step are the same whatever the workers, the cache and the step that the run began with. A
bad image is an error here, never another image in its place.

Shape letters: N images of a split, B images of a batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import partial
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from tlscale.data.decode import BadImageError, Pixels, decode_image
from tlscale.data.input_spec import InputSpec
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
from tlscale.data.sources.open import ImageData, ImageSplit
from tlscale.data.sources.tables import Raw
from tlscale.data.transforms import Augmenter, ImageBatch, eval_transform
from tlscale.data.views import CENTER
from tlscale.data.workers import load_in_order, map_in_threads
from tlscale.distributed.signals import check_stop
from tlscale.errors import DataError
from tlscale.recipe.image_size import size_in_words
from tlscale.recipe.schema import DataSection
from tlscale.tracking.progress import Pace
from tlscale.tracking.stopwatch import Stopwatch

_MIB = 2**20
_BLOCK = 256  # images that a thread takes at once while a cache is filled
_SAMPLE = 64  # images whose sizes stand for those of all


@dataclass(frozen=True)
class _Originals:
    """Decoded images of any size, one after the other in one buffer."""

    pixels: Pixels
    starts_N: Ints
    shapes_N3: Ints  # H, W, C

    def __getitem__(self, row: int) -> Pixels:
        shape, start = self.shapes_N3[row], self.starts_N[row]
        return self.pixels[start : start + int(shape.prod())].reshape(shape)


class ImageStore:
    """The images of a split, decoded; cached in memory if all of them fit into `cache_mib`.

    Images are cached as the backbone sees them or, where training crops at random, as decoded. Each process has a cache
    of its own; worker processes share their parent's.
    """

    def __init__(
        self,
        split: ImageSplit,
        section: DataSection,
        spec: InputSpec,
        *,
        crops: bool = False,
        keep: bool = True,
        places: Sequence[str] = (CENTER,),
        on_images: Callable[[int], None] | None = None,
    ) -> None:
        """
        Args:
            crops: `images` gives originals of any size, for a random crop, rather than images of the spec's size.
            keep: False: cache nothing, as only a few of the images will be used.
            on_images: called with a number of images whenever so many more are decoded for the cache.

        Raises:
            DataError: an image cannot be read (at once where images are cached, else when it is used).
        """
        self.split, self.spec, self.crops, self._places = split, spec, crops, tuple(places)
        self._section, self._keep = section, keep
        # Not an attribute: workers get the store, and could not get what shows things.
        on_images = on_images or (lambda num_images: None)
        self._prepared_NCHW = self._keep_prepared(on_images) if keep and not crops else None
        self._originals = self._keep_originals(on_images) if keep and crops and section.cache_mib else None

    def __len__(self) -> int:
        return len(self.split)

    @property
    def cached(self) -> bool:
        """Whether all images are in memory."""
        return self._prepared_NCHW is not None or self._originals is not None

    @property
    def kept_mib(self) -> float:
        """Memory of the images that are cached, in MiB."""
        if self._prepared_NCHW is not None:
            return self._prepared_NCHW.nbytes / _MIB
        return self._originals.pixels.nbytes / _MIB if self._originals is not None else 0.0

    def describe(self) -> str:
        """Return in one line what is cached and how much memory it takes."""
        what = f"{self.split.name}: {len(self):,} images"
        if not self._keep:
            return f"{what}, of which few are used, each decoded when it is"
        if not self.cached:
            return f"{what}, decoded each time they are used (data.cache_mib is {self._section.cache_mib})"
        size = f"{size_in_words(self.spec.image_size)} x {self.spec.in_chans}"
        return (
            f"{what}, decoded once and cached {'as they are' if self.crops else f'as {size}'}: {self.kept_mib:.1f} MiB"
        )

    def labels(self, rows_B: Ints) -> Tensor:
        """Return the class numbers of these images: int64 (B,)."""
        return torch.from_numpy(self.split.labels_N[rows_B])

    def images(self, rows_B: Ints, raws: Mapping[int, Raw] | None = None) -> Tensor | list[Tensor]:
        """Return images before augmentation, as `decode_image` gives them.

        Args:
            raws: what was read of some of them; those are not read again.

        Returns:
            (B, C, H, W); or, where training crops, a list of B tensors (C, H, W), each of its own size.
        """
        if self._prepared_NCHW is not None:
            return torch.from_numpy(self._prepared_NCHW).index_select(0, torch.from_numpy(rows_B))
        if self._originals is not None:
            return [_as_chw(self._originals[row]) for row in rows_B.tolist()]
        images = map_in_threads(partial(self._decode if self.crops else self._prepare, raws=raws), rows_B.tolist())
        return [_as_chw(image) for image in images] if self.crops else torch.from_numpy(stacked(images))

    def _decode(self, row: int, raws: Mapping[int, Raw] | None = None) -> Pixels:
        raw = raws.get(row) if raws is not None else None
        try:
            return decode_image(
                self.split.read(row) if raw is None else raw,
                in_chans=self.spec.in_chans,
                max_pixels=round(self._section.max_megapixels * 1e6),
                where=self.split.where(row),
                reading=self.spec.reading,
            )
        except DataError as error:
            bad = error.recast(BadImageError, error.key)
            bad.image = self.split.name, row
            raise bad from error

    def _prepare(self, row: int, raws: Mapping[int, Raw] | None = None) -> Pixels:
        return eval_transform(self._decode(row, raws), self.spec, self._places)

    def _keep_prepared(self, on_images: Callable[[int], None]) -> Pixels | None:
        shape_CHW = (self.spec.in_chans * len(self._places), *self.spec.image_hw)
        dtype = np.dtype(self.spec.reading.dtype)
        if len(self) * int(np.prod(shape_CHW)) * dtype.itemsize > self._section.cache_mib * _MIB:
            return None
        kept_NCHW = np.empty((len(self), *shape_CHW), dtype)

        def fill(rows: range) -> None:
            kept_NCHW[rows.start : rows.stop] = stacked(self._prepare(row) for row in _asked(rows))

        blocks = _blocks(len(self))
        for block, _ in zip(blocks, map_in_threads(fill, blocks), strict=True):
            on_images(len(block))
        return kept_NCHW

    def _keep_originals(self, on_images: Callable[[int], None]) -> _Originals | None:
        dtype = np.dtype(self.spec.reading.dtype)
        budget = self._section.cache_mib * _MIB // dtype.itemsize
        sampled = np.unique(np.linspace(0, len(self) - 1, min(_SAMPLE, len(self))).astype(np.int64)).tolist()
        sizes = [image.size for image in map_in_threads(self._decode, sampled)]
        expected = round(sum(sizes) / len(sizes) * len(self))
        if expected > budget:
            return None
        pixels = np.empty(expected, dtype)
        starts_N, shapes_N3 = np.zeros(len(self), np.int64), np.zeros((len(self), 3), np.int64)
        row = end = 0
        for images in map_in_threads(lambda rows: [self._decode(row) for row in _asked(rows)], _blocks(len(self))):
            for image in images:
                if end + image.size > budget:
                    return None  # the first images were smaller than the rest
                if end + image.size > pixels.size:
                    pixels.resize(min(budget, (end + image.size) * 5 // 4), refcheck=False)
                pixels[end : end + image.size] = image.ravel()
                starts_N[row], shapes_N3[row] = end, image.shape
                row, end = row + 1, end + image.size
            on_images(len(images))
        pixels.resize(end, refcheck=False)
        return _Originals(pixels, starts_N, shapes_N3)


def _asked(rows: range) -> Iterator[int]:
    """Give the rows, and ask before each whether the process is to stop."""
    for row in rows:
        check_stop("decoding images")
        yield row


@dataclass
class ImageCache:
    """Open the image stores of a run's splits when they are first asked for, and keep them open."""

    data: ImageData
    section: DataSection
    spec: InputSpec
    _: KW_ONLY
    crops: bool
    """Training cuts its images at random, and so needs them in their own size."""
    watch: Stopwatch
    """Measures decoding."""
    places: Sequence[str] = (CENTER,)
    """Where evaluation crops its images."""
    _stores: dict[str, ImageStore] = field(default_factory=dict)

    def train(self, num_seen: int | None = None) -> ImageStore:
        """Return the training images as training wants them.

        Args:
            num_seen: how many will be used, an image that is used again counted again. Where that is less than there
                are, decoding all of them beforehand would be for nothing. None: all of them.

        Raises:
            DataError: an image cannot be read.
        """
        split = self.data.train
        keep = num_seen is None or num_seen >= len(split) or "train" in self._stores
        return self._store("train" if keep else "few of train", split, crops=self.crops, keep=keep)

    def of(self, split: ImageSplit) -> ImageStore:
        """Return the images of a split as evaluation wants them.

        Raises:
            DataError: an image cannot be read.
        """
        return self._store(f"{split.name}, evaluated", split, places=self.places)

    def uncached(self, split: ImageSplit, *, crops: bool = False, place: str = CENTER) -> ImageStore:
        """Return a split's images as evaluation (with `crops`, training) wants them, for one pass: none is cached."""
        section = self.section.model_copy(update={"cache_mib": 0})
        return ImageStore(split, section, self.spec, crops=crops, places=(place,))

    def _store(
        self,
        name: str,
        split: ImageSplit,
        *,
        crops: bool = False,
        keep: bool = True,
        places: Sequence[str] = (CENTER,),
    ) -> ImageStore:
        if name not in self._stores:
            pace = Pace(len(split), f"decoding {split.name}")
            how = partial(ImageStore, crops=crops, keep=keep, places=places, on_images=pace.add)
            make = partial(how, split, self.section, self.spec)
            with self.watch("decode"), pace:
                self._stores[name] = make()
        return self._stores[name]


@dataclass(frozen=True)
class HeldImages:
    """Images of a store that were read already, and are decoded when they are wanted."""

    store: ImageStore
    raws: Mapping[int, Raw]
    """By position in the split."""

    def __len__(self) -> int:
        return len(self.store)

    def labels(self, rows_B: Ints) -> Tensor:
        """Return class numbers, as `ImageStore.labels`."""
        return self.store.labels(rows_B)

    def images(self, rows_B: Ints) -> Tensor | list[Tensor]:
        """Return images, as `ImageStore.images`; those that were not read yet are read."""
        return self.store.images(rows_B, self.raws)


def train_batches(
    store: ImageStore,
    order: DataOrder,
    split: BatchSplit,
    rank: int,
    *,
    seed: int,
    augment: Mapping[str, float | None],
    start_step: int,
    stop_step: int,
    views: int | None = None,
    workers: int = 0,
    pin_memory: bool = False,
) -> Generator[list[ImageBatch], None, None]:
    """Yield this process's micro-batches of each step, from `start_step` up to before `stop_step`.

    Close the iterator (or use it up) to end its worker processes.

    Args:
        store: with `crops` exactly where `augment` has a crop.
        seed: of the augmentation; streams of its own, so it may be the order's.
        augment: as `augmentation_values` gives it.
        views: epoch e sees the images as they are in epoch e modulo this; None: new ones in each epoch.

    Raises:
        DataError: an image cannot be read.
    """
    assert store.crops == ("crop" in augment)
    assert len(store) == order.num_images
    augmenter = Augmenter(augment, store.spec)
    steps = range(start_step, stop_step)
    wanted = (
        replace(micro_batch, epoch=micro_batch.epoch % views) if views is not None else micro_batch
        for step in steps
        for micro_batch in micro_batches(order, step, split, rank)
    )
    batches = load_in_order(partial(train_batch, store, augmenter, seed), wanted, workers, pin_memory)
    try:
        for step in steps:
            yield list(islice(batches, split.num_micro_batches(order.num_images_in(step))))
    finally:
        batches.close()


def eval_batches(
    store: ImageStore, rank: int, world_size: int, batch_size: int, workers: int = 0, pin_memory: bool = False
) -> Generator[ImageBatch, None, None]:
    """Yield this process's share of all images, each once over all processes, without padding or augmentation.

    Args:
        store: without `crops`.
        batch_size: most images of one batch.
    """
    assert not store.crops
    wanted = eval_rows(len(store), rank, world_size, batch_size)
    return load_in_order(partial(eval_batch, store), wanted, workers, pin_memory)


def eval_batch(store: ImageStore | HeldImages, rows_B: Ints) -> ImageBatch:
    """Make a batch of images as evaluation sees them, from a store without `crops`."""
    images_BCHW = store.images(rows_B)
    assert isinstance(images_BCHW, Tensor)
    return ImageBatch(images_BCHW, store.labels(rows_B), torch.from_numpy(rows_B), len(rows_B))


def train_batch(store: ImageStore | HeldImages, augmenter: Augmenter, seed: int, micro_batch: MicroBatch) -> ImageBatch:
    """Make a micro-batch as training sees it in its epoch: augmented, and with the partners of mixup."""
    rows_B = micro_batch.rows_B
    keys = partial(image_keys, seed, micro_batch.epoch, rows_B)
    batch = ImageBatch(
        augmenter.augment(store.images(rows_B), keys(Stream.OWN)),
        store.labels(rows_B),
        torch.from_numpy(rows_B),
        micro_batch.num_real,
    )
    if augmenter.mixes:
        mixes = augmenter.draw_mixes(keys(Stream.MIX), len(store))
        batch.partners_BCHW = augmenter.augment(store.images(mixes.partners_B), keys(Stream.PARTNER))
        batch.partner_labels_B = store.labels(mixes.partners_B)
        batch.lam_B, batch.boxes_B4 = torch.from_numpy(mixes.lam_B), torch.from_numpy(mixes.boxes_B4)
    return batch


def _blocks(count: int) -> list[range]:
    return [range(start, min(start + _BLOCK, count)) for start in range(0, count, _BLOCK)]


def stacked(images: Iterable[Pixels]) -> Pixels:
    """Stack images (H, W, C) of one size to (B, C, H, W), contiguous."""
    images_BHWC = np.stack(list(images))
    batch, height, width, chans = images_BHWC.shape
    # Not by ascontiguousarray: with one channel, that leaves strides that torch takes for channels-last, and then
    # convolutions sum in another order than for the same images from the cache.
    images_BCHW = np.empty((batch, chans, height, width), images_BHWC.dtype)
    images_BCHW[:] = images_BHWC.transpose(0, 3, 1, 2)
    return images_BCHW


def _as_chw(image_HWC: Pixels) -> Tensor:
    # A tensor over memory that is not ours to write would be a warning; the augmentations write into none of them.
    writable_HWC = image_HWC if image_HWC.flags.writeable else image_HWC.copy()
    return torch.from_numpy(writable_HWC).permute(2, 0, 1)
