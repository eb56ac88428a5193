"""Codes that can be read: those of some images, from the disk or from memory.

Promise: what is taken is a copy, bit-equal to what the network gave, in the memory order in which it gave it.

Shape letters: N images of these codes, B images of a batch, R images of a shard, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tlscale.codes.shards import Array, Ints, ValueSpec, as_array


class Codes:
    """The codes of some images, in the order in which their rows were asked for."""

    def __init__(
        self,
        path: Path,
        values: tuple[ValueSpec, ...],
        rows_N: Ints,
        shard_N: Ints,
        offset_N: Ints,
        maps: Sequence[Mapping[int, Array]],
    ) -> None:
        """
        Args:
            path: the folder that they are from.
            rows_N: rows of the table.
            shard_N: the number of the shard of each.
            offset_N: its place in that shard.
            maps: for each value, by the number of the shard, an array (R, *shape).
        """
        self.path, self.values, self.rows_N = path, values, rows_N
        self.num_computed = 0
        """Images that went through the network to get them, over all processes: 0 where all were there."""
        self._shard_N, self._offset_N, self._maps = shard_N, offset_N, maps
        self._kept: tuple[Tensor, ...] | None = None

    def __len__(self) -> int:
        return len(self.rows_N)

    @property
    def row_bytes(self) -> int:
        """Bytes of one image."""
        return sum(spec.row_bytes for spec in self.values)

    @property
    def num_bytes(self) -> int:
        """Bytes of these images."""
        return len(self) * self.row_bytes

    @property
    def in_memory(self) -> bool:
        """Whether `load` read them."""
        return self._kept is not None

    def take(self, positions_B: Ints | Tensor) -> tuple[Tensor, ...]:
        """The values of some images, in tensors of their own that the caller may overwrite.

        Args:
            positions_B: 0 <= position < len(codes), in any order, also several times; position i is `rows_N[i]`.

        Returns:
            For each of `values` a tensor (B, *shape) on the CPU.

        Raises:
            IndexError: there is no such position.
        """
        at_B = np.asarray(positions_B, dtype=np.int64)
        if at_B.size and not 0 <= at_B.min() <= at_B.max() < len(self):
            raise IndexError(f"positions {at_B.min()}..{at_B.max()} in codes of {len(self):,} images")
        if self._kept is not None:
            index_B = torch.from_numpy(at_B)
            pairs = zip(self._kept, self.values, strict=True)
            return tuple(_turned(kept.index_select(0, index_B), spec) for kept, spec in pairs)
        # One row after the other: to copy a few KiB takes longer than to find them; grouped by shard it was slower.
        places = list(zip(self._shard_N[at_B].tolist(), self._offset_N[at_B].tolist(), strict=True))
        return tuple(_gathered(maps, spec, places) for maps, spec in zip(self._maps, self.values, strict=True))

    def load(self, limit_bytes: int | None = None) -> Codes:
        """The same codes, read into memory once, a tensor for each value; itself if they need over `limit_bytes`."""
        if self.in_memory or (limit_bytes is not None and self.num_bytes > limit_bytes):
            return self
        codes = Codes(self.path, self.values, self.rows_N, self._shard_N, self._offset_N, ())
        codes._kept = tuple(self._read(maps, spec) for maps, spec in zip(self._maps, self.values, strict=True))
        codes.num_computed = self.num_computed
        return codes

    def select(self, numbers: Sequence[int]) -> Codes:
        """Some of the values, by their places in `values`, of the same images."""
        values = tuple(self.values[number] for number in numbers)
        maps = [self._maps[number] for number in numbers] if self._maps else ()
        codes = Codes(self.path, values, self.rows_N, self._shard_N, self._offset_N, maps)
        codes._kept = None if self._kept is None else tuple(self._kept[number] for number in numbers)
        codes.num_computed = self.num_computed
        return codes

    def whole(self, number: int) -> Tensor:
        """One value of all images, (N, *shape) on the CPU, which the caller must not overwrite."""
        codes = self.select([number]).load()
        assert codes._kept is not None
        return _turned(codes._kept[0], codes.values[0])

    def _read(self, maps: Mapping[int, Array], spec: ValueSpec) -> Tensor:
        channels, *rest = spec.shape if spec.channels_last else (0,)
        values_N = torch.empty((len(self), *((*rest, channels) if rest else spec.shape)), dtype=spec.torch_dtype)
        array_N = as_array(_turned(values_N, spec))
        for shard, array_R in maps.items():
            at = np.flatnonzero(self._shard_N == shard)
            array_N[at] = array_R[self._offset_N[at]]
        return values_N


def _turned(values_B: Tensor, spec: ValueSpec) -> Tensor:
    """(B, H, W, C) as (B, C, H, W), in the same memory, where the network gave that order."""
    return values_B.permute(0, 3, 1, 2) if spec.channels_last else values_B


def _gathered(maps: Mapping[int, Array], spec: ValueSpec, places: Sequence[tuple[int, int]]) -> Tensor:
    values_B = torch.empty((len(places), *spec.shape), dtype=spec.torch_dtype)
    array_B = as_array(values_B)
    for i, (shard, offset) in enumerate(places):
        array_B[i] = maps[shard][offset]
    return values_B.contiguous(memory_format=torch.channels_last) if spec.channels_last else values_B
