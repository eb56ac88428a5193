"""Divide images that come one after the other into the batches in which a run scored its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tlscale.data.sampler import eval_rows

_LEAST_CHUNK = 256  # images


@dataclass(frozen=True)
class Batching:
    """Tell how many images go through what was trained at once, from the first one that is given on."""

    size: int = 64
    num_scored: int = 0
    """Images of the scored split, where several processes had a share of it each."""
    num_processes: int = 1

    def sizes(self) -> Iterator[int]:
        """Give the images of each batch, without end."""
        for rank in range(self.num_processes if self.num_processes > 1 else 0):
            yield from map(len, eval_rows(self.num_scored, rank, self.num_processes, self.size))
        while True:
            yield self.size

    def chunks(self) -> Iterator[list[int]]:
        """Give the batches that are read, answered and written as one, without end."""
        chunk: list[int] = []
        for size in self.sizes():
            chunk.append(size)
            if sum(chunk) >= _LEAST_CHUNK:
                yield chunk
                chunk = []
