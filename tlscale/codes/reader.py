"""Read the codes of some images, from the disk or from memory.

Promise: what is taken is a copy, bit-equal to what the network gave, in the memory order in which it gave it.

Shape letters: N images of these codes, B images of a batch, R images of a shard, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tlscale.codes.shards import Array, Ints, ValueSpec, as_array


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
        # One row after the other: to copy a few KiB takes longer than to find them; grouped by shard it was slower.
        places = zip(self.shard_N[at_B].tolist(), self.offset_N[at_B].tolist(), strict=True)
        return _gathered(self.maps, self.spec, list(places))

    def load(self) -> Column:
        """Return the same value, read into memory once."""
        return self if self.loaded is not None else replace(self, maps={}, loaded=self._read())

    def _read(self) -> Tensor:
        spec, num_images = self.spec, len(self.shard_N)
        channels, *rest = spec.shape if spec.channels_last else (0,)
        values_N = torch.empty((num_images, *((*rest, channels) if rest else spec.shape)), dtype=spec.torch_dtype)
        array_N = as_array(_turned(values_N, spec))
        for shard, array_R in self.maps.items():
            at = np.flatnonzero(self.shard_N == shard)
            array_N[at] = array_R[self.offset_N[at]]
        return values_N


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


def _gathered(maps: Mapping[int, Array], spec: ValueSpec, places: Sequence[tuple[int, int]]) -> Tensor:
    values_B = torch.empty((len(places), *spec.shape), dtype=spec.torch_dtype)
    array_B = as_array(values_B)
    for i, (shard, offset) in enumerate(places):
        array_B[i] = maps[shard][offset]
    return values_B.contiguous(memory_format=torch.channels_last) if spec.channels_last else values_B
