"""Test in pairs whether two runs that were scored on the same images differ by more than chance.

Promise: two runs are paired only where the images and their true labels are the same, row by row: by content where
both runs noted it, else by path. The test is exact (McNemar 1947): of the images on which only one of the two is right,
under equal accuracy each run has half. Over several seeds, or repeats of folds, an image counts once, for the run that
is right more often on it. Images of a group do not stand alone: where there are groups, each group's lead may as well
be that of the other run (a test by flipping signs), which is McNemar's where each group has one image. Of several
labels an image the test is that of `paired_label_sets`. The p-values of a comparison are corrected for the number of
pairs (Holm 1979, "A simple sequentially rejective multiple test procedure").
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from tlscale.commands.paired_label_sets import difference_of_maps
from tlscale.data.sources.tables import JOINER, GroupNames, Ints, number_groups
from tlscale.training.label_set_metrics import LabelFigures, probabilities
from tlscale.training.label_set_predictions import label_matrix, logit_matrix
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
    hits_N: Hits | None
    """None: of several labels."""
    groups_N: GroupNames | None = None
    """None: the run had no groups."""
    num_repeats: int = 1
    """Answers to each image."""
    label_figures: LabelFigures | None = None
    """Of several labels, of all answers, repeat by repeat."""

    def has_images_of(self, other: Scored) -> bool:
        """Report whether both runs were scored on the same images: copies of files elsewhere are the same."""
        if self.num_repeats != other.num_repeats or (self.hits_N is None) != (other.hits_N is None):
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
    num_first_only: int | None
    """Images on which the first is right (more often), and the second is not; None of several labels."""
    num_second_only: int | None
    p: float
    p_corrected: float
    num_groups: int | None = None
    """None: the test is over images."""
    difference: float | None = None
    """Of several labels: by how much the mean average precision of the first is higher."""
    difference_interval95: tuple[float, float] | None = None

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
    table = read_predictions(path, ("path", "row"), if_there=("true_labels", "group", "repeat")).combine_chunks()
    num_repeats = pc.max(table["repeat"]).as_py() if "repeat" in table.column_names else 1
    hits_N, figures = None, None
    if "true_labels" in table.column_names:
        figures = _label_figures(read_predictions(path, ("true_labels", "logits")))
        table = table.append_column("true_label", pc.binary_join(table["true_labels"].combine_chunks(), JOINER))
    else:
        answers = read_predictions(path, ("label", "true_label")).combine_chunks()
        is_right = pc.fill_null(pc.equal(answers["label"], answers["true_label"]), False)
        hits_N = is_right.to_numpy(zero_copy_only=False).reshape(num_repeats, -1).astype(np.int64).sum(axis=0)
        table = table.append_column("true_label", answers["true_label"])
    table = table.slice(0, len(table) // num_repeats)  # each repeat has the same images, in the same order
    total = hashlib.sha256()
    for name in _KEYS:
        for value in table[name].to_pylist():
            total.update(f"{value}\0".encode())
    groups_N = table["group"].combine_chunks() if "group" in table.column_names else None
    return Scored(total.hexdigest(), content, table.select(_KEYS), hits_N, groups_N, num_repeats, figures)


def _label_figures(table: pa.Table) -> LabelFigures:
    classes = json.loads(table.schema.metadata[b"tlscale"])["classes"]
    shares_NC = probabilities(torch.from_numpy(logit_matrix(table))).numpy()
    return LabelFigures(shares_NC, label_matrix(table["true_labels"], classes), np.zeros(len(table)))


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
    """Test two variants, by the two runs of each seed; `p_corrected` is not corrected yet.

    The test is exact, or of several labels that of `paired_label_sets`. Return None where no seed is there, or a seed's
    two runs were scored on different images.
    """
    if not runs or not all(one.has_images_of(other) for one, other in runs):
        return None
    numbers, groups_N, num_images = _numbered(runs)
    if runs[0][0].hits_N is None:
        return _test_of_label_sets(size, first, second, runs, (numbers, groups_N, num_images))
    leads_N = np.zeros(num_images, dtype=np.int64)
    for (one, other), numbers_N in zip(runs, numbers, strict=True):
        assert one.hits_N is not None
        assert other.hits_N is not None
        np.add.at(leads_N, numbers_N, one.hits_N - other.hits_N)
    num_first, num_second = int((leads_N > 0).sum()), int((leads_N < 0).sum())
    if groups_N is None:
        p, num_groups = exact_p(num_first, num_second), None
    else:
        leads_G = np.bincount(groups_N, np.sign(leads_N)).astype(np.int64)
        p, num_groups = exact_p_of_groups(leads_G), len(leads_G)
    return Pair(size, first, second, len(leads_N), num_first, num_second, p, p, num_groups)


def _test_of_label_sets(
    size: int,
    first: str,
    second: str,
    runs: Sequence[tuple[Scored, Scored]],
    numbered: tuple[list[Ints], Ints | None, int],
) -> Pair | None:
    numbers, groups_N, num_images = numbered
    pairs = [(one.label_figures, other.label_figures) for one, other in runs]
    known = [(one, other) for one, other in pairs if one is not None and other is not None]
    units = [
        np.tile(numbers_N if groups_N is None else groups_N[numbers_N], one.num_repeats)
        for (one, _), numbers_N in zip(runs, numbers, strict=True)
    ]
    num_groups = None if groups_N is None else int(groups_N.max()) + 1
    found = difference_of_maps(known, units, num_images if num_groups is None else num_groups)
    if found is None:
        return None
    p, value, interval = found.p, found.value, found.interval95
    return Pair(size, first, second, num_images, None, None, p, p, num_groups, value, interval)


def _numbered(runs: Sequence[tuple[Scored, Scored]]) -> tuple[list[Ints], Ints | None, int]:
    """Return the numbers of the images of each seed, over all seeds, the group of each, and how many there are."""
    first = runs[0][0]
    if all(one.has_images_of(first) for one, _ in runs):
        named = [run.groups_N for pair in runs for run in pair if run.groups_N is not None]
        own_N = np.arange(len(first.keys), dtype=np.int64)
        return [own_N] * len(runs), number_groups(named[0]) if named else None, len(own_N)
    # The seeds hold out other images: each that any of them has counts once.
    by_image: dict[tuple[object, ...], int] = {}
    groups: dict[tuple[object, ...], str | None] = {}
    numbers: list[Ints] = []
    for one, other in runs:
        columns = (one.keys[name].to_pylist() for name in _KEYS)
        keys = list(zip(*columns, strict=True))
        numbers.append(np.array([by_image.setdefault(key, len(by_image)) for key in keys], dtype=np.int64))
        named = [run.groups_N for run in (one, other) if run.groups_N is not None]
        groups |= dict(zip(keys, named[0].to_pylist(), strict=True)) if named else {}
    if not groups:
        return numbers, None, len(by_image)
    names_M = pa.array([groups.get(key) for key in by_image], pa.large_string())
    return numbers, number_groups(names_M), len(by_image)


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
