"""Draw limits and hold-outs of single images, each class by its share; `grouped_draws` does it for groups.

Promise: every draw is a pure function of (seed, labels): integer arithmetic on row numbers, no generator of a library.
With one seed, a smaller limit gives a subset of a larger one.

The shares of the classes are those of Webster's method (Sainte-Lague): the k-th image of a class of n has the place
(k - 1/2) / n in line, and who comes first is taken. Unlike rounding the shares it never takes from a class what a
larger limit or fraction would not also take. https://en.wikipedia.org/wiki/Sainte-Lagu%C3%AB_method

Shape letters: N images or rows, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tlscale.data.sources.tables import Ints


def stratified_subset(labels_N: Ints, rows_N: Ints, count: int, seed: int, *, keep_all_classes: bool) -> Ints:
    """Return positions of `count` images, each class by its share.

    Args:
        labels_N: class numbers of all candidates.
        rows_N: their row numbers, which decide (with the seed) who of a class is taken first.
        count: at most `len(labels_N)`, and at least the number of classes with `keep_all_classes`.
        keep_all_classes: the first image of each class goes before all others.

    Returns:
        Positions in `labels_N`, ascending.
    """
    assert 0 <= count <= len(labels_N)
    places_N, lots_N = places_in_line(labels_N, rows_N, seed)
    line_N = np.where(places_N.ranks == 1, 0.0, places_N.shares) if keep_all_classes else places_N.shares
    return np.sort(np.lexsort((rows_N, lots_N, line_N))[:count]).astype(np.int64)


def stratified_holdout(labels_N: Ints, rows_N: Ints, fraction: float, seed: int) -> Ints:
    """Return positions of about `fraction` of the images, each class by its share, never the last image of a class.

    Returns:
        Positions in `labels_N`, ascending: at least one where any class has two images, else none.
    """
    places_N, lots_N = places_in_line(labels_N, rows_N, seed)
    spare_N = np.flatnonzero(places_N.ranks < places_N.sizes)
    count = min(max(1, round(fraction * len(labels_N))), len(spare_N))
    order = np.lexsort((rows_N[spare_N], lots_N[spare_N], places_N.shares[spare_N]))
    return np.sort(spare_N[order[:count]]).astype(np.int64)


def holdout_of_files(files_N: Ints | None, rows_N: Ints, holdout: Callable[[Ints], Ints]) -> Ints:
    """Return positions in `rows_N` of the held-out rows; all rows of a file go where the first of them goes.

    Args:
        files_N: the file of each row; None: each is a file of its own.
        rows_N: the candidates.
        holdout: holds out some of the positions that it is given, one a file, ascending.
    """
    if files_N is None:
        return holdout(np.arange(len(rows_N)))
    _, firsts, files = np.unique(files_N[rows_N], return_index=True, return_inverse=True)
    order = np.sort(firsts)
    held = order[holdout(order)]
    return np.flatnonzero(np.isin(files.reshape(-1), files.reshape(-1)[held])).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Places:
    """Hold where each image stands in its class."""

    ranks: Ints
    """1 for the first of its class, 2 for the next."""
    sizes: Ints
    """Images of that class."""
    shares: npt.NDArray[np.float64]


def places_in_line(labels_N: Ints, rows_N: Ints, seed: int) -> tuple[Places, npt.NDArray[np.uint64]]:
    """Return where each image stands in its class, and the lots that it drew."""
    lots_N = draw_lots(rows_N, seed)
    order_N = np.lexsort((rows_N, lots_N, labels_N))
    _, starts_C, sizes_C = np.unique(labels_N[order_N], return_index=True, return_counts=True)
    ranks_N, sizes_N = np.empty_like(labels_N), np.empty_like(labels_N)
    ranks_N[order_N] = np.arange(len(labels_N)) - np.repeat(starts_C, sizes_C) + 1
    sizes_N[order_N] = np.repeat(sizes_C, sizes_C)
    return Places(ranks_N, sizes_N, (ranks_N - 0.5) / sizes_N), lots_N


def draw_lots(rows_N: Ints, seed: int) -> npt.NDArray[np.uint64]:
    """Draw a 64-bit number for each row: the output function of SplitMix64 (Steele et al., OOPSLA 2014)."""
    bits_N = rows_N.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    bits_N = (bits_N ^ (bits_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits_N = (bits_N ^ (bits_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits_N ^ (bits_N >> np.uint64(31))
