"""Draw limits, hold-outs and folds of images in groups: photos of one patient, animal or scene stay together.

Promise: no hold-out and no fold cuts a group. Every draw is a function of (seed, names of the groups, labels) alone:
of no order of the rows, and of no library's random numbers. The rule is fixed for ever.

The rule deals the groups out to bins: the larger ones first (by powers of two; among those the draw decides), each to
the bin in which the shares of its classes then are nearest to their targets; and then moves single groups for as long
as that brings the shares nearer. Of few groups (up to 2,000) the nearest of four draws is taken. How far the shares are
off is the sum, over classes and bins, of the squares of (images of the class in the bin - its target) / images of the
class. Sums are made in one order and of whole numbers, so that they are the same everywhere. A hold-out is the nearest
of these bins, with single groups taken in or out; a fold is each of them.

Images with several labels each are drawn by the same rule: a group counts with the images of each of its labels, and
all images together count as one more label, so that those without any are dealt out evenly as well. That is nearer to
the shares than iterative stratification of whole groups (Sechidis, Tsoumakas and Vlahavas 2011), whose order of labels,
the rarest first, brings nothing here.

Shape letters: N images, G groups, C classes, K bins.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from tlscale.data.sources.tables import Ints, Labels, has_several
from tlscale.distributed.signals import check_stop

Floats = npt.NDArray[np.float64]
_DOING = "drawing groups"
_MOST_SWEEPS = 10
_FINEST = 1000  # a fraction is taken as a ratio of numbers up to this
_LEAST_GAIN = 1e-12  # what is less is rounding
_ATTEMPTS, _FEW = 4, 2000  # of so few units each of four draws is tried, and the nearest is taken


@dataclass(frozen=True, eq=False)
class Units:
    """Images that are never divided: the images of a group, or an image without one."""

    numbers_N: Ints
    """The unit of each image, from 0; each has an image."""
    names: Sequence[str]
    """By unit: what the draw knows it by."""

    def of(self, positions_M: Ints) -> Units:
        """Return the units of some of the images alone, numbered anew."""
        kept, numbers_M = np.unique(self.numbers_N[positions_M], return_inverse=True)
        return Units(numbers_M.reshape(-1).astype(np.int64), [self.names[unit] for unit in kept.tolist()])

    def sizes(self) -> Ints:
        """Return the number of images of each unit."""
        return np.bincount(self.numbers_N, minlength=len(self.names)).astype(np.int64)

    def order(self, seed: int) -> list[int]:
        """Return the units in the order in which they are dealt out."""
        lots = draw_name_lots(self.names, seed)
        sizes = self.sizes().tolist()
        return sorted(range(len(lots)), key=lambda unit: (-sizes[unit].bit_length(), lots[unit], self.names[unit]))


def draw_name_lots(names: Iterable[str], seed: int) -> list[int]:
    """Draw a 64-bit number for each name."""
    digests = (hashlib.blake2b(f"{seed} {name}".encode("utf-8", "surrogateescape"), digest_size=8) for name in names)
    return [int.from_bytes(digest.digest(), "little") for digest in digests]


def grouped_subset(labels_N: Labels, units: Units, names_N: Sequence[str], count: int, seed: int) -> Ints:
    """Return positions of `count` images: group after group, each class by its share, the last of them cut.

    The first image of each class goes before all others, so that none is missing. A smaller count gives a subset of
    that of a larger one.

    Args:
        labels_N: class numbers of all candidates; of several labels bool (N, C).
        units: theirs.
        names_N: of the images: decide who of a cut group is taken first.
        count: at most `len(labels_N)`, and at least the number of classes.

    Returns:
        Positions in `labels_N`, ascending.
    """
    places = _places_of_units(labels_N, units, seed)
    image_lots = np.array(draw_name_lots(names_N, seed), dtype=np.uint64)
    line_N = np.lexsort((image_lots, places[units.numbers_N]))
    if has_several(labels_N):
        firsts_C = np.unique(labels_N[line_N].argmax(axis=0)[labels_N.any(axis=0)])
    else:
        _, firsts_C = np.unique(labels_N[line_N], return_index=True)
    line_N = np.concatenate([line_N[np.sort(firsts_C)], np.delete(line_N, firsts_C)])
    return np.sort(line_N[:count]).astype(np.int64)


def _places_of_units(labels_N: Labels, units: Units, seed: int) -> Ints:
    """Return the place of each unit in a line whose every beginning has each class by its share.

    A unit stands for the most frequent class of its images, of several labels for the one that the fewest images have,
    and has the place of the middle of them among all images of such units: Webster's method, as `stratified_draws` has
    it, for units of any size.
    """
    lots, sizes, counts = draw_name_lots(units.names, seed), units.sizes().tolist(), _counts(labels_N, units)
    if has_several(labels_N):
        totals = [*labels_N.sum(axis=0).tolist(), len(labels_N)]
        labels = [min(own, key=lambda item: (totals[item[0]], item[0]))[0] for own in counts]
    else:
        labels = [max(own, key=lambda item: (item[1], -item[0]))[0] for own in counts]
    sums = np.bincount(labels, sizes).tolist()
    by_lot = sorted(range(len(lots)), key=lambda unit: (lots[unit], units.names[unit]))
    seen, shares = dict.fromkeys(labels, 0), [0.0] * len(lots)
    for unit in by_lot:
        label = labels[unit]
        shares[unit] = (2 * seen[label] + sizes[unit]) / (2 * sums[label])
        seen[label] += sizes[unit]
    places_G = np.empty(len(lots), dtype=np.int64)
    places_G[sorted(by_lot, key=shares.__getitem__)] = np.arange(len(lots))  # of equal ones the lots decide
    return places_G


def grouped_holdout(labels_N: Labels, units: Units, fraction: float, seed: int, *, stay: Collection[int] = ()) -> Ints:
    """Return positions of about `fraction` of the images, whole groups, each class by its share; never all of a class.

    Args:
        labels_N: class numbers; of several labels bool (N, C).
        units: of the images.
        fraction: above 0, at most a half.
        seed: of the draw.
        stay: units that are not held out.

    Returns:
        Positions in `labels_N`, ascending; none where every group has a class of its own.
    """
    ratio = max(Fraction(fraction).limit_denominator(_FINEST), Fraction(1, _FINEST))
    whole, rest = divmod(ratio.denominator, ratio.numerator)
    targets = [ratio.numerator] * whole + ([rest] if rest else [])
    dealt = _deal(labels_N, units, targets, seed, stay)
    last = bool(stay) and not rest  # the bin of those that stay is none to hold out
    held = _best_bin(dealt, range(whole - last), ratio.numerator / ratio.denominator)
    return np.flatnonzero(np.isin(units.numbers_N, held)).astype(np.int64)


def grouped_folds(labels_N: Labels, units: Units, num_folds: int, seed: int) -> Ints:
    """Return the fold of each image, from 0; each class by its share as far as the groups let it.

    Args:
        labels_N: class numbers; of several labels bool (N, C).
        units: of the images.
        num_folds: K, at least 2 and at most the number of groups.
        seed: of the draw.
    """
    assert 2 <= num_folds <= len(units.names), "a fold has a group"
    dealt = _deal(labels_N, units, [1] * num_folds, seed)
    return np.array(dealt.bins, dtype=np.int64)[units.numbers_N]


Counts = list[list[tuple[int, int]]]


def num_units_by_class(labels_N: Labels, numbers_N: Ints) -> Ints:
    """Return for each class the number of units that have an image of it, (C,)."""
    return np.bincount(np.unique(_pairs(labels_N, numbers_N), axis=1)[1]).astype(np.int64)


def _pairs(labels_N: Labels, numbers_N: Ints) -> Ints:
    """Return the unit and the class of each image, (2, N); of several labels a pair for each label of each image."""
    if not has_several(labels_N):
        return np.stack([numbers_N, labels_N])
    images, labels = np.nonzero(labels_N)
    return np.stack([numbers_N[images], labels])


def _counts(labels_N: Labels, units: Units) -> Counts:
    """Return for each unit its classes, ascending, with the number of images of each.

    Of several labels all images are of one class more, the last one.
    """
    pairs = _pairs(labels_N, units.numbers_N)
    if has_several(labels_N):
        every = np.stack([units.numbers_N, np.full(len(labels_N), labels_N.shape[1])])
        pairs = np.concatenate([pairs, every], axis=1)
    pairs, images = np.unique(pairs, axis=1, return_counts=True)
    counts: Counts = [[] for _ in units.names]
    for unit, label, count in zip(*pairs.tolist(), images.tolist(), strict=True):
        counts[unit].append((label, count))
    return counts


def _deal(labels_N: Labels, units: Units, targets: Sequence[int], seed: int, stay: Collection[int] = ()) -> _Dealt:
    """Deal units out to bins whose sizes are as `targets`; those that `stay` go to the last one."""
    counts, attempts = _counts(labels_N, units), _ATTEMPTS if len(units.names) <= _FEW else 1
    dealt = (_Dealt(counts, targets, units.order(seed + attempt), stay) for attempt in range(attempts))
    return min(dealt, key=_Dealt.cost)


class _Dealt:
    """Deal units out to bins.

    How far a class is off in a bin is kept as a whole number: images x sum of the targets - target x images of the
    class.
    """

    def __init__(
        self, counts: Counts, targets: Sequence[int], order: Sequence[int], stay: Collection[int] = ()
    ) -> None:
        """Deal.

        Args:
            counts: by unit.
            targets: of each bin, in proportion.
            order: of the units.
            stay: units that go to the last bin.
        """
        self.counts, self.order, self.stay = counts, order, frozenset(stay)
        self.whole = float(sum(targets))
        totals: dict[int, int] = {}
        for own in counts:
            for label, count in own:
                totals[label] = totals.get(label, 0) + count
        self.totals = totals
        targets_K = np.array(targets, dtype=np.float64)
        self.off = {label: -targets_K * total for label, total in totals.items()}
        self.off_all_K = -targets_K * sum(totals.values())
        self.bins = [len(targets) - 1] * len(counts)
        for unit in self.stay:
            self._put(unit, self.bins[unit], 1)
        self._deal()
        self._improve()

    def _deal(self) -> None:
        for unit in self.order:
            if unit in self.stay:
                continue
            check_stop(_DOING)
            cost_K = self._cost_of_putting(unit)
            nearest = np.flatnonzero(cost_K == cost_K.min())
            self.bins[unit] = int(nearest[np.argmin(self.off_all_K[nearest])])
            self._put(unit, self.bins[unit], 1)

    def _improve(self) -> None:
        """Move single units while that brings the shares nearer."""
        for _ in range(_MOST_SWEEPS):
            has_moved = False
            for unit in self.order:
                if unit in self.stay:
                    continue
                check_stop(_DOING)
                self._put(unit, self.bins[unit], -1)
                cost_K = self._cost_of_putting(unit)
                if cost_K.min() < cost_K[self.bins[unit]] - _LEAST_GAIN:
                    self.bins[unit], has_moved = int(cost_K.argmin()), True
                self._put(unit, self.bins[unit], 1)
            if not has_moved:
                return

    def cost(self) -> float:
        """Return how far the shares are off."""
        squares = [
            (off / self.totals[label]) ** 2 for label, off_K in sorted(self.off.items()) for off in off_K.tolist()
        ]
        return math.fsum(squares)

    def _cost_of_putting(self, unit: int) -> Floats:
        """Return by how much the sum of squares grows with the unit in each bin."""
        cost_K = np.zeros(len(self.off_all_K))
        for label, count in self.counts[unit]:
            more = count * self.whole
            cost_K = cost_K + (more / self.totals[label]) * ((2 * self.off[label] + more) / self.totals[label])
        return cost_K

    def _put(self, unit: int, at: int, sign: int) -> None:
        for label, count in self.counts[unit]:
            self.off[label][at] += sign * count * self.whole
            self.off_all_K[at] += sign * count * self.whole


class _Held:
    """Some units that are held out."""

    def __init__(self, dealt: _Dealt, target: float, units: Iterable[int]) -> None:
        self._counts, self._totals = dealt.counts, dealt.totals
        self._target = target
        """Share of the images of each class."""
        self.units = list(units)
        self._images: dict[int, int] = dict.fromkeys(dealt.totals, 0)
        for unit in self.units:
            self._put(unit, 1)
        self._spare_classes()

    def _put(self, unit: int, sign: int) -> None:
        for label, count in self._counts[unit]:
            self._images[label] += sign * count

    def _spare_classes(self) -> None:
        """Take out, of each class of which nothing else would be left, the unit without which the rest is nearest."""
        for label in sorted(self._images):
            if self._images[label] == self._totals[label]:
                with_it = [unit for unit in self.units if any(own == label for own, _ in self._counts[unit])]
                unit = min(with_it, key=lambda unit: self._change(unit, -1))
                self.units.remove(unit)
                self._put(unit, -1)

    def _change(self, unit: int, sign: int) -> float:
        """Return by how much the cost changes with a unit more, or less."""
        change = 0.0
        for label, count in self._counts[unit]:
            off = self._images[label] - self._target * self._totals[label]
            change += sign * (count / self._totals[label]) * ((2 * off + sign * count) / self._totals[label])
        return change

    def improve(self, order: Sequence[int], stay: Collection[int]) -> None:
        """Take single units in or out while that brings the shares nearer, and keep one."""
        inside = set(self.units)
        for _ in range(_MOST_SWEEPS):
            has_moved = False
            for unit in order:
                check_stop(_DOING)
                sign = -1 if unit in inside else 1
                may_move = len(inside) > 1 if sign < 0 else unit not in stay and not self._would_empty(unit)
                if may_move and self._change(unit, sign) < -_LEAST_GAIN:
                    self._put(unit, sign)
                    inside ^= {unit}
                    has_moved = True
            if not has_moved:
                break
        self.units = [unit for unit in order if unit in inside]

    def _would_empty(self, unit: int) -> bool:
        return any(self._images[label] + count == self._totals[label] for label, count in self._counts[unit])

    def cost(self) -> float:
        return sum((self._images[label] / total - self._target) ** 2 for label, total in sorted(self._totals.items()))


def _best_bin(dealt: _Dealt, candidates: Iterable[int], target: float) -> list[int]:
    """Return the units of the bin that is nearest to its targets, brought nearer; no class is left with none."""
    members: dict[int, list[int]] = {}
    for unit in dealt.order:
        members.setdefault(dealt.bins[unit], []).append(unit)
    held = [_Held(dealt, target, members[at]) for at in candidates if at in members]
    possible = [one for one in held if one.units]
    if not possible:  # few groups: a single one, where one can be spared
        singles = (_Held(dealt, target, [unit]) for unit in dealt.order if unit not in dealt.stay)
        possible = [one for one in singles if one.units]
    if not possible:
        return []
    best = min(possible, key=_Held.cost)
    best.improve(dealt.order, dealt.stay)
    return best.units
