"""The interval of a share of images that come in groups: how far it would move with other groups.

Promise: a function of the counts alone, in whatever order the groups come; a fixed seed, so that a resumed run finds
what an unbroken one does.

Shape letters: G groups, K kinds of groups (with equal counts), B draws.
"""

from __future__ import annotations

import numpy as np

from tlscale.data.sources.tables import Ints
from tlscale.training.metrics import wilson

_NUM_DRAWS = 4000
_SEED = 20_241
_LEVEL = 0.95


def group_interval(hits_G: Ints, images_G: Ints) -> list[float] | None:
    """Return the 95% interval of hits / images by a bootstrap over groups (percentiles); None of no group.

    Where all groups agree, or there is one, draws of them tell nothing: then it is Wilson's, as if each group were one
    image.
    """
    num_groups, share = len(images_G), float(hits_G.sum()) / max(int(images_G.sum()), 1)
    if not num_groups:
        return None
    if num_groups == 1 or share in (0.0, 1.0):
        return wilson(share * num_groups, num_groups)
    kinds_K2, counts_K = np.unique(np.stack([hits_G, images_G], axis=1), axis=0, return_counts=True)
    drawn_BK = np.random.default_rng(_SEED).multinomial(num_groups, counts_K / num_groups, size=_NUM_DRAWS)
    sums_B2 = drawn_BK @ kinds_K2
    low, high = np.quantile(sums_B2[:, 0] / sums_B2[:, 1], [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return [min(float(low), share), max(float(high), share)]
