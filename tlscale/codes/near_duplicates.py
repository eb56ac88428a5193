"""Find images of one split that look like one of another: by the cosine of their codes, in blocks of bounded memory.

Shape letters: N and K images of the two splits, B images of a block, D features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tlscale.codes.reader import Codes
from tlscale.data.sampler import Ints
from tlscale.distributed.signals import check_stop
from tlscale.tracking.progress import Pace

_BLOCK = 2048


@dataclass(frozen=True, eq=False)
class Near:
    """Images that have a near duplicate, and which; those that are nearest come first."""

    positions_M: Ints
    others_M: Ints
    """The nearest one in the other split, the first of equally near ones."""
    cosines_M: Tensor


def near_duplicates(one: Codes, other: Codes, least: float) -> Near:
    """Find the images of a split whose nearest one in another split has a cosine of at least `least`.

    Only the first value of the codes counts. Two blocks of images and their cosines are in memory at a time.
    """
    best_N, others_N = torch.full((len(one),), -2.0), torch.zeros(len(one), dtype=torch.int64)
    with Pace(len(one), "looking for near duplicates") as pace:
        for start, own_BD in _blocks(one):
            stop = start + len(own_BD)
            for other_start, theirs_BD in _blocks(other):
                check_stop("comparing codes")
                cosines_B, at_B = (own_BD @ theirs_BD.T).max(dim=1)
                nearer_B = cosines_B > best_N[start:stop]
                best_N[start:stop] = torch.where(nearer_B, cosines_B, best_N[start:stop])
                others_N[start:stop] = torch.where(nearer_B, at_B + other_start, others_N[start:stop])
            pace.add(len(own_BD))
    # Of two equal rows the product may be a rounding below 1.
    found_M = torch.nonzero(best_N >= least - 1e-6)[:, 0]
    found_M = found_M[best_N[found_M].sort(descending=True, stable=True).indices]
    return Near(found_M.numpy(), others_N[found_M].numpy(), best_N[found_M].clamp(max=1.0))


def _blocks(codes: Codes) -> Iterator[tuple[int, Tensor]]:
    """Yield blocks of codes with rows of length 1; rows of zeros stay so."""
    for start in range(0, len(codes), _BLOCK):
        rows_BD = codes.take(np.arange(start, min(start + _BLOCK, len(codes))))[0].float().flatten(1)
        yield start, torch.nn.functional.normalize(rows_BD, dim=1)
