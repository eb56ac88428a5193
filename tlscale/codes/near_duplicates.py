"""Find images of one split, or fold, that look like one of another: by the cosine of their codes, in blocks.

Shape letters: N and K images of the two splits, B images of a block, C those of another one, D features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tlscale.codes.reader import Codes
from tlscale.data.sampler import Ints
from tlscale.distributed.signals import check_stop
from tlscale.tracking.progress import Pace

_BLOCK = 2048
_ROUNDING = 1e-6  # of two equal rows the product may be below 1
_NONE = -2.0


@dataclass(frozen=True, eq=False)
class Near:
    """Images that have a near duplicate, and which; those that are nearest come first."""

    positions_M: Ints
    others_M: Ints
    """The nearest one of the others, the first of equally near ones."""
    cosines_M: Tensor


def near_duplicates(one: Codes, other: Codes, least: float, together: tuple[Ints, Ints] | None = None) -> Near:
    """Find the images of a split whose nearest one in another split has a cosine of at least `least`.

    Only the first value of the codes counts. Two blocks of images and their cosines are in memory at a time.

    Args:
        together: a number for each image of `one`, and of `other`; images of equal numbers are not compared.
    """
    best_N, others_N = torch.full((len(one),), _NONE), torch.zeros(len(one), dtype=torch.int64)
    with Pace(len(one), "looking for near duplicates") as pace:
        for start, own_BD in _blocks(one):
            stop = start + len(own_BD)
            for other_start, theirs_CD in _blocks(other):
                check_stop("comparing codes")
                cosines_BC = own_BD @ theirs_CD.T
                if together is not None:
                    there = slice(other_start, other_start + len(theirs_CD))
                    cosines_BC[torch.from_numpy(_equal(together[0][start:stop], together[1][there]))] = _NONE
                cosines_B, at_B = cosines_BC.max(dim=1)
                nearer_B = cosines_B > best_N[start:stop]
                best_N[start:stop] = torch.where(nearer_B, cosines_B, best_N[start:stop])
                others_N[start:stop] = torch.where(nearer_B, at_B + other_start, others_N[start:stop])
            pace.add(len(own_BD))
    return _near(best_N, others_N, least)


def surplus_duplicates(codes: Codes, least: float, units_N: Ints, gone_N: npt.NDArray[np.bool_]) -> Near:
    """Find images without which no two of different units look alike: of those that do the first one stays.

    Args:
        units_N: images of equal numbers are not compared.
        gone_N: images that are left out anyway.
    """
    gone_N, best_N, others_N = (
        gone_N.copy(),
        torch.full((len(codes),), _NONE),
        torch.zeros(len(codes), dtype=torch.int64),
    )
    for start, own_BD in _blocks(codes):
        stop = start + len(own_BD)
        nearest_B, at_B = torch.full((len(own_BD),), _NONE), torch.zeros(len(own_BD), dtype=torch.int64)
        for other_start, theirs_CD in _blocks(codes, stop=start):
            check_stop("comparing codes")
            there = slice(other_start, other_start + len(theirs_CD))
            cosines_BC = own_BD @ theirs_CD.T
            never_BC = _equal(units_N[start:stop], units_N[there]) | gone_N[None, there]
            cosines_B, found_B = cosines_BC.masked_fill_(torch.from_numpy(never_BC), _NONE).max(dim=1)
            nearer_B = cosines_B > nearest_B
            nearest_B = torch.where(nearer_B, cosines_B, nearest_B)
            at_B = torch.where(nearer_B, found_B + other_start, at_B)
        own_B = units_N[start:stop]
        never_BB = _equal(own_B, own_B) | np.tri(len(own_B), dtype=bool).T  # with those before it alone
        cosines_BB = (own_BD @ own_BD.T).masked_fill_(torch.from_numpy(never_BB), _NONE)
        is_near_B = torch.maximum(nearest_B, cosines_BB.max(dim=1).values) >= least - _ROUNDING
        for i in torch.nonzero(is_near_B)[:, 0].tolist():
            if gone_N[start + i]:
                continue
            cosines_B = cosines_BB[i].masked_fill(torch.from_numpy(gone_N[start:stop]), _NONE)
            if (nearest := cosines_B.max()) > nearest_B[i]:
                nearest_B[i], at_B[i] = nearest, cosines_B.argmax() + start
            if nearest_B[i] >= least - _ROUNDING:
                gone_N[start + i], best_N[start + i], others_N[start + i] = True, nearest_B[i], at_B[i]
    return _near(best_N, others_N, least)


def _equal(own_B: Ints, others_C: Ints) -> npt.NDArray[np.bool_]:
    """Tell which pairs have equal numbers, (B, C)."""
    return np.equal(own_B[:, None], others_C[None])


def _near(best_N: Tensor, others_N: Tensor, least: float) -> Near:
    found_M = torch.nonzero(best_N >= least - _ROUNDING)[:, 0]
    found_M = found_M[best_N[found_M].sort(descending=True, stable=True).indices]
    return Near(found_M.numpy(), others_N[found_M].numpy(), best_N[found_M].clamp(max=1.0))


def _blocks(codes: Codes, stop: int | None = None) -> Iterator[tuple[int, Tensor]]:
    """Yield blocks of codes, or of the first ones, with rows of length 1; rows of zeros stay so."""
    for start in range(0, len(codes) if stop is None else stop, _BLOCK):
        rows_BD = codes.take(np.arange(start, min(start + _BLOCK, len(codes))))[0].float().flatten(1)
        yield start, torch.nn.functional.normalize(rows_BD, dim=1)
