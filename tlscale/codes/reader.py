"""Read the codes of some images, from the disk or from memory.

Promise: what is taken is a copy, bit-equal to what the network gave, in the memory order in which it gave it. A file
that was cut short, or that its disk does not give any more, since it was mapped is an error and no SIGBUS (on Linux).

Shape letters: N images of these codes, B images of a batch, R images of a shard, C channels, H height, W width.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tlscale.codes.shards import Array, Ints, ValueSpec, as_array
from tlscale.errors import TlscaleError, flag

_MOST_PIECES = 1024  # IOV_MAX of Linux
_MOST_BYTES = 2**30  # of one call; Linux takes up to 2 GiB


@dataclass(frozen=True, eq=False)
class Column:
    """Locate one value of the images."""

    spec: ValueSpec
    shard_N: Ints
    """The number of the shard of each image."""
    offset_N: Ints
    """Its place in that shard."""
    maps: Mapping[int, Array]
    """By the number of the shard, an array (R, *shape)."""
    loaded: Tensor | None = None
    """All of it in memory, in the order of the images."""

    def take(self, at_B: Ints) -> Tensor:
        """Return the value of some images, in a tensor of its own."""
        if self.loaded is not None:
            return _turned(self.loaded.index_select(0, torch.from_numpy(at_B)), self.spec)
        values_B = torch.empty((len(at_B), *self.spec.shape), dtype=self.spec.torch_dtype)
        self._copy(at_B, as_array(values_B))
        return values_B.contiguous(memory_format=torch.channels_last) if self.spec.channels_last else values_B

    def load(self) -> Column:
        """Return the same value, read into memory once."""
        return self if self.loaded is not None else replace(self, maps={}, loaded=self._read())

    def _read(self) -> Tensor:
        spec, num_images = self.spec, len(self.shard_N)
        channels, *rest = spec.shape if spec.channels_last else (0,)
        values_N = torch.empty((num_images, *((*rest, channels) if rest else spec.shape)), dtype=spec.torch_dtype)
        array_N = as_array(_turned(values_N, spec))
        for shard, mapped_R in self.maps.items():
            at_R = np.flatnonzero(self.shard_N == shard)
            array_R = np.empty((len(at_R), *spec.shape), mapped_R.dtype)
            self._copy(at_R, array_R)
            array_N[at_R] = array_R
        return values_N

    @cached_property
    def _begins(self) -> Ints:
        """Return the address in memory of the first row of each shard, by number."""
        begins = np.zeros(max(self.maps, default=0) + 1, np.int64)
        begins[list(self.maps)] = [array_R.ctypes.data for array_R in self.maps.values()]
        return begins

    def __getstate__(self) -> dict[str, Any]:
        """Leave out addresses, which a copy has others of."""
        return {name: value for name, value in self.__dict__.items() if name != "_begins"}

    def _copy(self, at_B: Ints, into_B: Array) -> None:
        """Copy the value of some images into a contiguous array.

        Raises:
            TlscaleError: a file cannot be read any more.
        """
        shard_B, offset_B, size = self.shard_N[at_B], self.offset_N[at_B], self.spec.row_bytes
        step = max(min(_MOST_PIECES, _MOST_BYTES // max(size, 1)), 1)
        for start in range(0, len(at_B), step):
            part = slice(start, start + step)
            from_B = self._begins[shard_B[part]] + offset_B[part] * size
            if not _copy_memory(from_B, size, into_B[part]):
                # One row after the other: to copy a few KiB takes longer than to find them.
                for i, (shard, offset) in enumerate(zip(shard_B[part].tolist(), offset_B[part].tolist(), strict=True)):
                    into_B[start + i] = self.maps[shard][offset]


class Codes:
    """Hold the codes of some images, in the order of the request, from `path` (of several folders the first)."""

    def __init__(self, path: Path, num_images: int, columns: Sequence[Column]) -> None:
        self.path, self._num_images, self._columns = path, num_images, tuple(columns)
        self.values = tuple(column.spec for column in columns)
        self.num_computed = 0
        """Images that went through the network to get them, over all processes: 0 where all were there."""

    def __len__(self) -> int:
        return self._num_images

    @property
    def row_bytes(self) -> int:
        return sum(spec.row_bytes for spec in self.values)

    @property
    def num_bytes(self) -> int:
        return len(self) * self.row_bytes

    def take(self, positions_B: Ints | Tensor) -> tuple[Tensor, ...]:
        """Return for each of `values` a tensor (B, *shape) on the CPU, which the caller may overwrite.

        Positions come in any order, also several times; an `IndexError` is raised where there is none such.
        """
        at_B = np.asarray(positions_B, dtype=np.int64)
        if at_B.size and not 0 <= at_B.min() <= at_B.max() < len(self):
            raise IndexError(f"positions {at_B.min()}..{at_B.max()} in codes of {len(self):,} images")
        return tuple(column.take(at_B) for column in self._columns)

    def load(self) -> Codes:
        """Return the same codes, read into memory once, a tensor for each value."""
        return self._of([column.load() for column in self._columns])

    def joined_with(self, others: Sequence[Codes]) -> Codes:
        """Join these values with those of others, of the same images."""
        assert all(len(other) == len(self) for other in others)
        return self._of([*self._columns, *(column for other in others for column in other._columns)])

    def whole(self, number: int) -> Tensor:
        """Return one value of all images, (N, *shape) on the CPU, which the caller must not overwrite."""
        column = self._columns[number].load()
        assert column.loaded is not None
        return _turned(column.loaded, column.spec)

    def _of(self, columns: Sequence[Column]) -> Codes:
        codes = Codes(self.path, len(self), columns)
        codes.num_computed = self.num_computed
        return codes


def _turned(values_B: Tensor, spec: ValueSpec) -> Tensor:
    """View (B, H, W, C) as (B, C, H, W), in the same memory, where the network gave that order."""
    return values_B.permute(0, 3, 1, 2) if spec.channels_last else values_B


@cache
def _read_memory() -> Any:  # noqa: ANN401 (a C function)
    """Return the C library's `process_vm_readv`; None where there is none."""
    return getattr(ctypes.CDLL(None, use_errno=True), "process_vm_readv", None) if os.name == "posix" else None


def _copy_memory(from_B: Ints, size: int, into_B: Array) -> bool:
    """Copy pieces of `size` bytes from these addresses; return False where this system lets nobody do it so.

    The kernel copies, as between two processes: a page that its file cannot give is an error of the call, where to read
    it here would end the process with SIGBUS.

    Raises:
        TlscaleError: a page cannot be read.
    """
    read, count = _read_memory(), len(from_B)
    if read is None or not size:
        return False
    pieces = np.empty((count + 1, 2), np.uint64)  # address and bytes: as many `struct iovec`, the last one for `into_B`
    pieces[:count, 0], pieces[:count, 1], pieces[count] = from_B, size, (into_B.ctypes.data, count * size)
    remote, local = pieces.ctypes.data, pieces[count:].ctypes.data
    number, zero = ctypes.c_ulong(count), ctypes.c_ulong(0)
    copied = read(os.getpid(), ctypes.c_void_p(local), ctypes.c_ulong(1), ctypes.c_void_p(remote), number, zero)
    if copied == count * size:
        return True
    if copied < 0 and ctypes.get_errno() in (errno.ENOSYS, errno.EPERM):
        return False
    raise TlscaleError(
        "codes that this run reads were cut short, or their disk does not give them any more",
        remedy="What is corrupt is found and computed again by the next run: resume this one with " + flag("resume"),
    )
