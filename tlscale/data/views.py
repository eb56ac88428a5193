"""Name the views of an image that an evaluation averages over: which part is cut out of it, and how it is flipped.

Promise: the plain image is the first view. A view is the same pixels in each run: nothing is drawn.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

CENTER = "center"
CORNERS = ("top_left", "top_right", "bottom_left", "bottom_right")
FLIPS = {"flip": 3, "vertical_flip": 2}
"""By name, the dimension of (B, C, H, W) that is turned round."""
FIVE_CROP = "five_crop"


@dataclass(frozen=True, slots=True)
class View:
    """Tell a view from others."""

    place: str = CENTER
    flips: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return its name, such as `top_left+flip`."""
        return "+".join((self.place, *self.flips))

    @property
    def dims(self) -> list[int]:
        """Return the dimensions that are turned round."""
        return [FLIPS[name] for name in self.flips]


PLAIN = View()


def views_of(names: Sequence[str]) -> tuple[View, ...]:
    """Return all combinations of `evaluate.views`, the plain image first; `names` in any order give the same."""
    flips = [()] + [
        some for count in (1, 2) for some in itertools.combinations([name for name in FLIPS if name in names], count)
    ]
    return tuple(View(place, some) for place in crop_places(names) for some in flips)


def crop_places(names: Sequence[str]) -> tuple[str, ...]:
    """Return where parts are cut out, the centre first."""
    return (CENTER, *CORNERS) if FIVE_CROP in names else (CENTER,)
