"""Address the images whose codes are wanted: by content and, for an augmented view, by its random numbers.

Promise: an address follows from what was read when the image was decoded, and says everything about it that the key of
codes does not: where an image lies, what it is called and which split it is of change nothing. An augmented view also
follows from the random numbers that the training image has in its place, and from the image that is mixed in.

Shape letters: N images of a split, B images of a block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from tlscale.data.content import Digests, digest_array, digest_bytes, digest_of_parts
from tlscale.data.loader import HeldImages, ImageStore, eval_batch, train_batch
from tlscale.data.sampler import Ints, MicroBatch, Stream, image_keys
from tlscale.data.sources.open import ImageSplit
from tlscale.data.sources.tables import Raw
from tlscale.data.transforms import Augmenter, ImageBatch
from tlscale.data.workers import map_in_threads

Bools = npt.NDArray[np.bool_]


@dataclass
class SplitImages:
    """Give the images of a split as evaluation sees them, as `AddressedImages`; the address is the content."""

    split: ImageSplit
    store: ImageStore
    """Caches nothing."""
    to_inputs: Callable[[ImageBatch], Any]

    def known(self) -> tuple[Digests, Bools]:
        return self.split.known_digests()

    def name(self) -> str:
        return digest_of_parts([self.split.where(0), *self.split.places()])

    def read(self, positions_B: Ints, *, are_new: bool) -> list[tuple[bytes, Any]]:
        positions = positions_B.tolist()
        read = list(map_in_threads(self.split.read_hashed, positions))
        return [(address, (position, raw)) for position, (raw, address) in zip(positions, read, strict=True)]

    def found(self, ids_N: Digests) -> None:
        self.split.table.remember()
        self.split.table.take_digests(self.split.rows_N, ids_N)

    def inputs(self, read: Sequence[tuple[int, Raw]]) -> Any:
        positions_B = np.array([position for position, _ in read])
        return self.to_inputs(eval_batch(HeldImages(self.store, dict(read)), positions_B))

    def where(self, position: int) -> str:
        return self.split.where(position)


@dataclass
class ViewImages:
    """Give a view of the training images, as training sees them in its epoch, as `AddressedImages`."""

    split: ImageSplit
    view: int
    seed: int
    augmenter: Augmenter
    store: ImageStore
    """Caches nothing."""
    open_cached: Callable[[], ImageStore]
    """Open the store that the run trains from."""
    to_inputs: Callable[[ImageBatch], Any]
    _is_open: bool = field(default=False, init=False)

    def known(self) -> tuple[Digests, Bools]:
        return self._addresses(np.arange(len(self.split)), *self.split.known_digests())

    def name(self) -> str:
        return digest_of_parts([str(self.view), str(self.seed), self.split.where(0), *self.split.places()])

    def read(self, positions_B: Ints, *, are_new: bool) -> list[tuple[bytes, Any]]:
        if are_new and not self._is_open:
            self.open_cached()  # each view needs each image: it is decoded once for all of them, where that fits
            self._is_open = True
        _, noted_N = self.split.noted_digests()
        wanted = np.unique(np.concatenate([positions_B, self._draws[0][positions_B]]))
        unread = wanted[~noted_N[wanted]].tolist()
        raws = {at: raw for at, (raw, _) in zip(unread, map_in_threads(self.split.read_hashed, unread), strict=True)}
        ids_B, _ = self._addresses(positions_B, *self.split.noted_digests())
        return [(address, (at, raws)) for address, at in zip(digest_bytes(ids_B), positions_B.tolist(), strict=True)]

    def found(self, ids_N: Digests) -> None:
        self.split.table.remember()

    def inputs(self, read: Sequence[tuple[int, Mapping[int, Raw]]]) -> Any:
        positions_B = np.array([position for position, _ in read])
        raws = {at: raw for _, some in read for at, raw in some.items()}
        store = HeldImages(self.store, raws) if raws else self.open_cached()
        batch = MicroBatch(self.view, positions_B, len(positions_B))
        return self.to_inputs(train_batch(store, self.augmenter, self.seed, batch))

    def where(self, position: int) -> str:
        return self.split.where(position)

    @cached_property
    def _draws(self) -> tuple[Ints, list[bytes]]:
        """The image that is mixed into each, itself where none is; and all random numbers that its view is made of."""
        seed, view, rows_N = self.seed, self.view, np.arange(len(self.split))
        own = _rows_of_bytes(image_keys(seed, view, rows_N, Stream.OWN))
        if not self.augmenter.mixes:
            return rows_N, own
        mixes = self.augmenter.draw_mixes(image_keys(seed, view, rows_N, Stream.MIX), len(rows_N))
        others: list[npt.NDArray[Any]] = [image_keys(seed, view, rows_N, Stream.PARTNER), mixes.lam_B, mixes.boxes_B4]
        mixed = zip(own, *map(_rows_of_bytes, others), strict=True)
        return mixes.partners_B, [b"".join(some) for some in mixed]

    def _addresses(self, positions_B: Ints, digests_N: Digests, known_N: Bools) -> tuple[Digests, Bools]:
        (partners_N, bits), contents = self._draws, digest_bytes(digests_N)
        ids = []
        for at in positions_B.tolist():
            other = contents[int(partners_N[at])] if self.augmenter.mixes else b""
            ids.append(hashlib.sha256(b"tlscale view " + contents[at] + other + bits[at]).digest())
        known_B = known_N[positions_B] & known_N[partners_N[positions_B]]
        return digest_array(ids), known_B


def _rows_of_bytes(array: npt.NDArray[Any]) -> list[bytes]:
    return [row.tobytes() for row in array]
