"""Compute codes block by block.

Promise: every forward pass has `BLOCK` images, the last block filled up, so that an image's codes depend neither on its
place nor on its neighbours. A row has the address of what was read when it was computed.

Shape letters: N images that are requested, P positions among them, R images of a shard, B images of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tlscale.codes.key import CodesKey
from tlscale.codes.shards import BLOCK, DTYPES, Ints, ValueSpec
from tlscale.codes.store import Bools, CodesStore, Inventory
from tlscale.data.content import Digests, digest_array
from tlscale.distributed.device import CopyToCpu
from tlscale.distributed.settings import cpu_threads
from tlscale.distributed.signals import is_stopping
from tlscale.errors import DataError, ModelError
from tlscale.storage import faults

Module = Callable[[Any], tuple[Tensor, ...]]
Values = tuple[Tensor, ...]
_THREADS = (4, 2, 1)


class AddressedImages(Protocol):
    """Give the images that are requested, by position."""

    def known(self) -> tuple[Digests, Bools]:
        """Return the addresses (N,) as far as they are known without reading an image, and which are."""

    def name(self) -> str:
        """Return a digest that tells these images from others while their addresses are not known."""

    def read(self, positions_B: Ints, *, are_new: bool) -> list[tuple[bytes, Any]]:
        """Read some images; return the address of each, hashed from what was read, and what `inputs` takes.

        Args:
            are_new: the store has no codes of any image, so that all will be decoded.
        """

    def found(self, ids_N: Digests) -> None:
        """Take the addresses of all images, now that they are known."""

    def inputs(self, read: Sequence[Any]) -> Any:
        """Return the module's input for BLOCK images."""

    def where(self, position: int) -> str:
        """Return the place of an image, for messages."""


@dataclass(frozen=True)
class _Computing:
    """Hold a block whose values are maybe not computed yet: a GPU works on it while the next one is read."""

    values: Values
    stored: CopyToCpu
    positions_B: Ints


@dataclass
class Extraction:
    """Hold the state of an extraction: the same on all processes, except while they compute."""

    store: CodesStore
    keys: Sequence[CodesKey]
    images: AddressedImages
    module: Module
    request: str
    ids_N: Digests
    known_N: Bools
    values: tuple[tuple[ValueSpec, ...], ...] = ()
    """Of each key; empty where they are not known yet."""
    inventories: tuple[Inventory, ...] = ()
    """Of each key."""
    done: set[bytes] = field(default_factory=set)
    """Addresses that were computed now."""
    found_late: bool = False
    """Images turned out to be there when they were read."""
    _read: dict[int, tuple[bytes, Any]] = field(default_factory=dict)
    """Images that `learn` read, by position, so that they are not read twice."""
    _first: dict[bytes, Values] = field(default_factory=dict)
    """Their values, by their addresses, so that they are not computed twice."""

    @property
    def specs(self) -> tuple[ValueSpec, ...]:
        return tuple(spec for specs in self.values for spec in specs)

    @property
    def row_bytes(self) -> int:
        return sum(spec.row_bytes for spec in self.specs)

    def todo(self) -> Ints:
        """Return the positions of images that may be missing, each image once as far as that is known."""
        missing_N = ~np.all([inventory.has(self.ids_N) for inventory in self.inventories], axis=0) | ~self.known_N
        known_P = np.flatnonzero(missing_N & self.known_N)
        _, first_P = np.unique(self.ids_N[known_P], return_index=True)
        return np.sort(np.concatenate([known_P[first_P], np.flatnonzero(~self.known_N)]))

    def learn(self, positions_B: Ints) -> tuple[tuple[ValueSpec, ...], ...]:
        """Compute a block to learn shape and dtype of the values."""
        read = self.read(positions_B)
        self._read |= dict(zip(positions_B.tolist(), read, strict=True))
        distinct = list(dict(read).items())
        raw = self._forward([what for _, what in distinct])
        names = [(key, layer) for key in self.keys for layer in key.layers]
        specs = iter([spec_of(layer, v, key.dtype) for (key, layer), v in zip(names, raw, strict=True)])
        self.values = tuple(tuple(next(specs) for _ in key.layers) for key in self.keys)
        computing = self._to_store(raw, positions_B[: len(distinct)])
        self._first[b"".join(address for address, _ in distinct)] = self._stored(computing)
        return self.values

    def read(self, positions_B: Ints) -> list[tuple[bytes, Any]]:
        """Read images as `AddressedImages.read` does, each once."""
        there = [self._read.pop(position, None) for position in positions_B.tolist()]
        lacking_B = positions_B[[one is None for one in there]]
        are_new = not any(len(inventory.there_M) for inventory in self.inventories)
        new = iter(self.images.read(lacking_B, are_new=are_new) if len(lacking_B) else [])
        return [one if one is not None else next(new) for one in there]

    def chunk(self, positions_P: Ints, on_block: Callable[[int], None]) -> tuple[Digests, Digests, Values]:
        """Compute what is missing of these images, or of the first of them where the process is asked to stop.

        Returns:
            The addresses of those that were read; those of the computed ones, each once; and their values.
        """
        ids: list[bytes] = []
        blocks: list[Values] = []
        waiting: dict[bytes, tuple[int, Any]] = {}
        new: dict[bytes, None] = {}
        computing: _Computing | Values | None = None
        for start in range(0, len(positions_P), BLOCK):
            positions_B = positions_P[start : start + BLOCK]
            read = self.read(positions_B)
            wanted_B = self._are_wanted(digest_array([address for address, _ in read]))
            for position, (address, what), is_wanted in zip(positions_B.tolist(), read, wanted_B, strict=True):
                ids.append(address)
                if is_wanted and not any(address in some for some in (self.done, waiting, new)):
                    waiting[address] = position, what
            is_last = start + BLOCK >= len(positions_P) or is_stopping()
            while len(waiting) >= BLOCK or (waiting and is_last):
                addresses = list(waiting)[:BLOCK]
                taken = [waiting.pop(address) for address in addresses]
                before, computing = computing, self._compute(addresses, taken)
                blocks += [self._stored(before)] if before is not None else []
                new |= dict.fromkeys(addresses)
            on_block(len(positions_B))
            if is_last:
                break
        blocks += [self._stored(computing)] if computing is not None else []
        values = tuple(torch.cat(parts) for parts in zip(*blocks, strict=True))
        return digest_array(ids), digest_array(list(new)), values

    def _are_wanted(self, ids_B: Digests) -> Bools:
        wanted_B: Bools = ~np.all([inventory.has(ids_B) for inventory in self.inventories], axis=0)
        self.found_late = self.found_late or not wanted_B.all()
        return wanted_B

    def _compute(self, addresses: list[bytes], taken: list[tuple[int, Any]]) -> _Computing | Values:
        """Begin to compute a block of images, or give what `learn` computed."""
        known = self._first.pop(b"".join(addresses), None)
        faults.at("codes.block")
        if known is not None:
            return known
        positions_B = np.array([position for position, _ in taken])
        return self._to_store(self._forward([what for _, what in taken]), positions_B)

    def write(self, ids_R: Digests, values: Values) -> list[tuple[str, str]]:
        """Write for each key a shard of the images that it lacks; return the digest of its entry and its name."""
        written, start = [], 0
        for key, specs, inventory in zip(self.keys, self.values, self.inventories, strict=True):
            lacking_R = ~inventory.has(ids_R)
            its = values[start : start + len(specs)]
            start += len(specs)
            if lacking_R.any():
                chosen = its if lacking_R.all() else [value[torch.from_numpy(lacking_R)] for value in its]
                name = self.store.write_shard(key, ids_R[lacking_R], chosen, specs, self.request)
                written.append((key.digest(), name))
        return written

    def _forward(self, read: Sequence[Any]) -> Values:
        # A short block is filled up: a network's arithmetic may depend on the number of images.
        filled = [*read, *[read[-1]] * (BLOCK - len(read))]
        with torch.no_grad(), fixed_threads():  # not inference mode: what comes from it could not be trained on
            values = self.module(self.images.inputs(filled))
        num_values = sum(len(key.layers) for key in self.keys)
        assert len(values) == num_values, f"{len(values)} values for {[key.layers for key in self.keys]}"
        return values

    def _to_store(self, values: Values, positions_B: Ints) -> _Computing:
        """Convert values for the store: on the CPU, in their dtype and the default memory order, without padding."""
        given, to_store = [], []
        for spec, value in zip(self.specs, values, strict=True):
            if tuple(value.shape) != (BLOCK, *spec.shape):
                raise ModelError(
                    f"the value '{spec.name}' is {tuple(value.shape)} for these {BLOCK} images and "
                    f"{(BLOCK, *spec.shape)} for others; only what has one shape for all can be cached as codes"
                )
            given.append(value.detach()[: len(positions_B)])
            to_store.append(given[-1].to(spec.torch_dtype).contiguous())
        return _Computing(tuple(given), CopyToCpu(to_store), positions_B)

    def _stored(self, block: _Computing | Values) -> Values:
        """Wait for a block's values; return them, all finite."""
        if not isinstance(block, _Computing):
            return block
        stored = block.stored.wait()
        for spec, value, given in zip(self.specs, stored, block.values, strict=True):
            _refuse_non_finite(value, given, spec, [self.images.where(at) for at in block.positions_B.tolist()])
        return stored


def fixed_threads() -> AbstractContextManager[None]:
    """Compute with 1, 2 or 4 threads, the most that are allowed: with these a row's bits are the same at every place.

    With 3 threads, and with 8 and more, some kernels divide a block unevenly, and then bits hang on threads and place.
    """
    allowed = torch.get_num_threads()
    return cpu_threads(next(number for number in _THREADS if number <= allowed))


def spec_of(name: str, value_B: Tensor, dtype: str, num_images: int = BLOCK) -> ValueSpec:
    """Describe a value by a whole block of it."""
    if value_B.ndim == 0 or len(value_B) != num_images:
        raise ModelError(
            f"the value '{name}' is {tuple(value_B.shape)} for {num_images} images; only what has the images as its "
            "first dimension can be cached as codes"
        )
    kind = dtype if dtype != "auto" and value_B.is_floating_point() else str(value_B.dtype).removeprefix("torch.")
    if kind not in DTYPES:
        raise ModelError(f"the value '{name}' is of dtype {kind}; codes can be cached as {', '.join(DTYPES)}")
    channels_last = (
        value_B.ndim == 4 and not value_B.is_contiguous() and value_B.is_contiguous(memory_format=torch.channels_last)
    )
    return ValueSpec(name, tuple(value_B.shape[1:]), kind, channels_last)


def _refuse_non_finite(stored_B: Tensor, value_B: Tensor, spec: ValueSpec, places: Sequence[str]) -> None:
    if not stored_B.is_floating_point() or bool(torch.isfinite(stored_B).all()):
        return
    bad_B = ~torch.isfinite(stored_B).flatten(1).all(1) if stored_B.ndim > 1 else ~torch.isfinite(stored_B)
    bad = [place for place, is_bad in zip(places, bad_B.tolist(), strict=True) if is_bad]
    shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
    if bool(torch.isfinite(value_B).all()):
        why, remedy = f"too large for {spec.dtype}", "Set codes.dtype to another dtype"
    else:
        why, remedy = "NaN or infinite as the network gives them", "Check its weights and compute.precision"
    raise DataError(f"the codes '{spec.name}' of these images are {why}: {shown}", remedy=remedy)
