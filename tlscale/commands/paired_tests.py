"""Test in pairs whether two runs that were scored on the same images differ by more than chance.

Promise: two runs are paired only where the images and their true labels are the same, row by row: by content where
both runs noted it, else by path. The test is exact (McNemar 1947): of the images on which only one of the two is right,
under equal accuracy each run has half. Over several seeds, or repeats of folds, an image counts once, for the run that
is right more often on it. Images of a group do not stand alone: where there are groups, each group's lead may as well
be that of the other run (a test by flipping signs), which is McNemar's where each group has one image. The p-values of
a comparison are corrected for the number of pairs (Holm 1979, "A simple sequentially rejective multiple test
procedure").
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tlscale.data.sources.tables import GroupNames, number_groups
from tlscale.training.predictions import read_predictions

if TYPE_CHECKING:
    from tlscale.commands.compare_outcomes import Row

LEVEL = 0.05
"""Runs whose corrected p-value is at least this are not distinguishable."""
_KEYS = ("path", "row", "true_label")
Hits = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Scored:
    """Hold which images a run was scored on, and how often it answered each right."""

    images: str
    """Digest of their paths, rows and true labels, in order."""
    content: str | None
    """`scored_sha256` of the run: digest of their contents and true labels, in order; None of an older run."""
    keys: pa.Table
    hits_N: Hits
    groups_N: GroupNames | None = None
    """None: the run had no groups."""
    num_repeats: int = 1
    """Answers to each image."""

    def has_images_of(self, other: Scored) -> bool:
        """Report whether both runs were scored on the same images: copies of files elsewhere are the same."""
        if self.num_repeats != other.num_repeats:
            return False
        if self.content is not None and other.content is not None:
            return self.content == other.content
        return self.images == other.images


@dataclass(frozen=True)
class Pair:
    """Hold the test of two variants of the same size."""

    size: int
    first: str
    second: str
    num_images: int
    num_first_only: int
    """Images on which the first is right (more often), and the second is not."""
    num_second_only: int
    p: float
    p_corrected: float
    num_groups: int | None = None
    """None: the test is over images."""

    @property
    def is_distinguishable(self) -> bool:
        return self.p_corrected < LEVEL

    def joins(self, first: str, second: str) -> bool:
        """Report whether it is the pair of these two variants, in either order."""
        return {self.first, self.second} == {first, second}

    def to_plain(self) -> dict[str, Any]:
        return {**vars(self), "distinguishable": self.is_distinguishable}


def read_scored(folder: Path, content: str | None = None) -> Scored | None:
    """Read a run's `predictions.parquet`; None where there is none: an older tlscale made the run.

    `content` is `scored_sha256` of the run, where it noted that.
    """
    path = folder / "predictions.parquet"
    if not path.is_file():
        return None
    table = read_predictions(path, (*_KEYS, "label"), if_there=("group", "repeat")).combine_chunks()
    num_repeats = pc.max(table["repeat"]).as_py() if "repeat" in table.column_names else 1
    is_right = pc.fill_null(pc.equal(table["label"], table["true_label"]), False)
    hits_RN = is_right.to_numpy(zero_copy_only=False).reshape(num_repeats, -1).astype(np.int64)
    table = table.slice(0, hits_RN.shape[1])  # each repeat has the same images, in the same order
    total = hashlib.sha256()
    for name in _KEYS:
        for value in table[name].to_pylist():
            total.update(f"{value}\0".encode())
    groups_N = table["group"].combine_chunks() if "group" in table.column_names else None
    return Scored(total.hexdigest(), content, table.select(_KEYS), hits_RN.sum(axis=0), groups_N, num_repeats)


def paired_tests(rows: Sequence[Row]) -> list[Pair]:
    """Test all pairs of variants of each size, corrected for the number of pairs of their size.

    Runs without predictions, and pairs of runs that were scored on different images, have none.
    """
    scored = {run.folder: read_scored(Path(run.folder), run.scored_sha256) for row in rows for run in row.runs}
    found: list[Pair] = []
    for size in dict.fromkeys(row.size for row in rows):
        tests = []
        for one, other in combinations([row for row in rows if row.size == size], 2):
            others = {run.seed: scored[run.folder] for run in other.runs}
            runs = [(scored[run.folder], others[run.seed]) for run in one.runs if run.seed in others]
            known = [(first, second) for first, second in runs if first is not None and second is not None]
            test = paired_test(size, one.variant, other.variant, known) if len(known) == len(runs) else None
            tests += [test] if test is not None else []
        found += corrected(tests)
    return found


def paired_test(size: int, first: str, second: str, runs: Sequence[tuple[Scored, Scored]]) -> Pair | None:
    """Test two variants exactly, by the two runs of each seed; `p_corrected` is not corrected yet.

    Return None where no seed is there, or a seed's two runs were scored on different images.
    """
    if not runs or not all(one.has_images_of(other) for one, other in runs):
        return None
    leads_N, groups_N = _leads(runs)
    num_first, num_second = int((leads_N > 0).sum()), int((leads_N < 0).sum())
    if groups_N is None:
        p, num_groups = exact_p(num_first, num_second), None
    else:
        leads_G = np.bincount(groups_N, np.sign(leads_N)).astype(np.int64)
        p, num_groups = exact_p_of_groups(leads_G), len(leads_G)
    return Pair(size, first, second, len(leads_N), num_first, num_second, p, p, num_groups)


def _leads(runs: Sequence[tuple[Scored, Scored]]) -> tuple[Hits, Hits | None]:
    """Count for each image in how many seeds more the first is right than the second; and number its group."""
    leads = [one.hits_N - other.hits_N for one, other in runs]
    first = runs[0][0]
    if all(one.has_images_of(first) for one, _ in runs):
        total_N: Hits = np.sum(leads, axis=0, dtype=np.int64)
        named = [run.groups_N for pair in runs for run in pair if run.groups_N is not None]
        return total_N, number_groups(named[0]) if named else None
    # The seeds hold out other images: each that any of them has counts once.
    by_image: dict[tuple[object, ...], int] = {}
    groups: dict[tuple[object, ...], str | None] = {}
    for (one, other), leads_N in zip(runs, leads, strict=True):
        columns = (one.keys[name].to_pylist() for name in _KEYS)
        keys = list(zip(*columns, strict=True))
        for key, lead in zip(keys, leads_N.tolist(), strict=True):
            by_image[key] = by_image.get(key, 0) + lead
        named = [run.groups_N for run in (one, other) if run.groups_N is not None]
        groups |= dict(zip(keys, named[0].to_pylist(), strict=True)) if named else {}
    leads_M = np.fromiter(by_image.values(), dtype=np.int64, count=len(by_image))
    if not groups:
        return leads_M, None
    return leads_M, number_groups(pa.array([groups.get(key) for key in by_image], pa.large_string()))


def exact_p(num_first: int, num_second: int) -> float:
    """Compute the two-sided p-value of so many images on which only the first, or only the second, is right."""
    from scipy.stats import binomtest  # takes half a second

    total = num_first + num_second
    return float(binomtest(num_first, total).pvalue) if total else 1.0


def exact_p_of_groups(leads_G: Hits) -> float:
    """Compute the two-sided p-value of the groups' leads: of all choices of their signs, those with as large a sum."""
    from scipy.signal import convolve
    from scipy.stats import binom

    sizes_K, counts_K = np.unique(np.abs(leads_G[leads_G != 0]), return_counts=True)
    if len(sizes_K) <= 1:  # all equal, as where each group has one image
        return exact_p(int((leads_G > 0).sum()), int((leads_G < 0).sum()))
    shares_S = np.ones(1)  # of the choices, by the sum of the leads that are the first's
    for size, count in zip(sizes_K.tolist(), counts_K.tolist(), strict=True):
        own_S = np.zeros(size * count + 1)
        own_S[::size] = binom.pmf(np.arange(count + 1), count, 0.5)
        shares_S = np.maximum(convolve(shares_S, own_S), 0.0)
    sums_S = 2 * np.arange(len(shares_S)) - (len(shares_S) - 1)
    return min(1.0, float(shares_S[np.abs(sums_S) >= abs(int(leads_G.sum()))].sum()))


def corrected(pairs: Sequence[Pair]) -> list[Pair]:
    """Correct the p-values by Holm's method for the number of pairs; their order stays."""
    order = sorted(range(len(pairs)), key=lambda place: pairs[place].p)
    found: dict[int, Pair] = {}
    least = 0.0
    for rank, place in enumerate(order):
        least = max(least, min(1.0, pairs[place].p * (len(pairs) - rank)))
        found[place] = replace(pairs[place], p_corrected=least)
    return [found[place] for place in range(len(pairs))]
