"""Draw limits and hold-outs of images that have several labels each, every label by its share.

Promise: every draw is a function of (seed, rows, labels) alone: of whole numbers, and of no library's random numbers.
The rules are fixed for ever. With one seed, a smaller limit gives a subset of a larger one.

A hold-out is drawn by iterative stratification (Sechidis, Tsoumakas and Vlahavas 2011): the label with the fewest
images that are left goes first, and each of its images goes to that part of the two which lacks most of this label;
where both lack as much, to the one that lacks more images, or else to train. Who of a label comes first the lots say.
Images without any label go last.

A limit takes each image for one of its rarest label, and has these by their shares, as `splits` draws classes; the
first image of each label goes before all others.

Shape letters: N images or rows, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from tlscale.data.sources.stratified_draws import draw_lots, holdout_of_files, places_in_line
from tlscale.data.sources.tables import Ints, Labels
from tlscale.distributed.signals import check_stop

_FINEST = 1000  # a fraction is taken as a ratio of numbers up to this
_TRAIN, _HELD = 0, 1


def iterative_holdout(labels_NC: Labels, rows_N: Ints, fraction: float, seed: int) -> Ints:
    """Return positions of about `fraction` of the images, each label by its share, never the last image of a label.

    Args:
        labels_NC: bool.
        rows_N: row numbers, which decide (with the seed) who of a label goes first.
        fraction: above 0, at most a half.
        seed: of the draw.

    Returns:
        Ascending; at least one where any image can be spared, else none.
    """
    lots_N = draw_lots(rows_N, seed)
    line_N = np.lexsort((rows_N, lots_N))
    held_N = _Parts(labels_NC, fraction).divide(line_N)
    totals_C = labels_NC.sum(axis=0)
    for label in np.flatnonzero((labels_NC[held_N].sum(axis=0) == totals_C) & (totals_C > 0)):
        if not (labels_NC[:, label] & ~held_N).any():  # what an earlier label gave back may have this one, too
            held_N[line_N[labels_NC[line_N, label]][0]] = False
    if not held_N.any():
        spare_N = ~(labels_NC & (totals_C == 1)).any(axis=1)
        held_N[line_N[spare_N[line_N]][:1]] = len(held_N) > 1
    return np.flatnonzero(held_N).astype(np.int64)


class _Parts:
    """Divide images into two parts. What a part lacks is kept as a whole number: images x the ratio's denominator."""

    def __init__(self, labels_NC: Labels, fraction: float) -> None:
        ratio = max(Fraction(fraction).limit_denominator(_FINEST), Fraction(1, _FINEST))
        shares = (ratio.denominator - ratio.numerator, ratio.numerator)
        self._whole = ratio.denominator
        totals = labels_NC.sum(axis=0).tolist()
        self._labels_NC = labels_NC
        self._lacking = [[total * share for total in totals] for share in shares]
        self._lacking_all = [len(labels_NC) * share for share in shares]
        self._part_N = np.full(len(labels_NC), -1)

    def divide(self, line_N: Ints) -> npt.NDArray[np.bool_]:
        """Return who is held out, of images in the order of their lots."""
        left_N = np.ones(len(line_N), dtype=bool)
        while True:
            check_stop("drawing images")
            counts_C = self._labels_NC[left_N].sum(axis=0)
            if not counts_C.any():
                break
            label = int(np.where(counts_C > 0, counts_C, len(line_N) + 1).argmin())
            own_M = line_N[left_N[line_N] & self._labels_NC[line_N, label]]
            for image in own_M.tolist():
                self._put(image, self._lacking[_TRAIN][label], self._lacking[_HELD][label])
            left_N[own_M] = False
        for image in line_N[left_N[line_N]].tolist():
            self._put(image, 0, 0)
        return np.asarray(self._part_N == _HELD)

    def _put(self, image: int, train_lacks: int, held_lacks: int) -> None:
        goes_out = (held_lacks, self._lacking_all[_HELD]) > (train_lacks, self._lacking_all[_TRAIN])
        part = _HELD if goes_out else _TRAIN
        self._part_N[image] = part
        self._lacking_all[part] -= self._whole
        for label in np.flatnonzero(self._labels_NC[image]).tolist():
            self._lacking[part][label] -= self._whole


def label_set_subset(labels_NC: Labels, rows_N: Ints, count: int, seed: int) -> Ints:
    """Return positions of `count` images, ascending; as many as there are labels have all of them among them."""
    totals_C = labels_NC.sum(axis=0)
    rarest_N = np.where(labels_NC, totals_C, len(labels_NC) + 1).argmin(axis=1).astype(np.int64)
    rarest_N[~labels_NC.any(axis=1)] = labels_NC.shape[1]  # a class of their own
    places, lots_N = places_in_line(rarest_N, rows_N, seed)
    line_N = np.lexsort((rows_N, lots_N, places.shares))
    firsts = np.unique(labels_NC[line_N].argmax(axis=0)[totals_C > 0])
    line_N = np.concatenate([line_N[firsts], np.delete(line_N, firsts)])
    return np.sort(line_N[:count]).astype(np.int64)


@dataclass(frozen=True, eq=False)
class LabelSetDraw:
    """Draw images with several labels; those of a file stay together."""

    labels_NC: Labels
    files_N: Ints | None
    unit = "image"

    def subset(self, rows_N: Ints, count: int, seed: int) -> Ints:
        """Return positions in `rows_N`."""
        return label_set_subset(self.labels_NC[rows_N], rows_N, count, seed)

    def holdout(self, rows_N: Ints, fraction: float, seed: int) -> Ints:
        def drawn(at: Ints) -> Ints:
            return iterative_holdout(self.labels_NC[rows_N[at]], rows_N[at], fraction, seed)

        return holdout_of_files(self.files_N, rows_N, drawn)

    def num_units(self, rows_N: Ints) -> int:
        return len(rows_N)

    def classes_of_one(self, rows_N: Ints) -> list[int]:
        """Return the classes of which there is one image."""
        return [int(label) for label in np.flatnonzero(self.labels_NC[rows_N].sum(axis=0) == 1)]
