"""Read what a layer gives as positions of an image: how they are pooled, and what rows and columns they may have.

Shapes: B images, P positions, K prefix tokens (class, distillation, register), D features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tlscale.errors import ModelError


@dataclass
class Positions:
    """What a layer gives, its positions apart from its prefix tokens.

    `height` is the number of rows of positions, None where there are no rows. Maps are flattened channels first.
    """

    positions_BPD: Tensor
    prefix_BKD: Tensor
    height: int | None
    is_map: bool = False

    def pooled(self, pool: str, layer: str) -> Tensor:
        """Pool to (B, D), in memory of its own: a later layer may work in place."""
        match pool:
            case "avg":
                return self.positions_BPD.mean(1)
            case "max":
                return self.positions_BPD.amax(1)
            case "avgmax":
                return torch.cat([self.positions_BPD.mean(1), self.positions_BPD.amax(1)], 1)
            case "none" if self.is_map:
                return self.positions_BPD.transpose(1, 2).flatten(1).clone()
            case "none":
                return torch.cat([self.prefix_BKD, self.positions_BPD], 1).flatten(1)
        if self.prefix_BKD.shape[1] == 0:
            remedy = "Use avg, max, avgmax or none."
            raise ModelError(f"'{layer}' has no class token", key="codes.pool", remedy=remedy)
        return self.prefix_BKD[:, 0].clone()


def num_rows(num_positions: int, images_hw: tuple[int, int]) -> int | None:
    """Return the number of rows of positions, by their number and the proportions of the images; None if it is open."""
    height, width = images_hw
    side = math.isqrt(num_positions * height // width)
    fitting = [rows for rows in (side, side + 1) if rows and num_positions % rows == 0]
    fitting = [rows for rows in fitting if is_grid((rows, num_positions // rows), images_hw)]
    return fitting[0] if len(fitting) == 1 else None


def is_grid(sides: tuple[int, int], images_hw: tuple[int, int]) -> bool:
    """Return whether a map of these sides may be an image's: with as many pixels to a position across as down."""
    (rows, columns), (height, width) = sides, images_hw
    if height == width:
        return rows == columns
    # Some stride gives both, if it rounds both down or both up.
    down = height * columns < width * (rows + 1) and width * rows < height * (columns + 1)
    up = width * (rows - 1) < height * columns and height * (columns - 1) < width * rows
    return down or up
