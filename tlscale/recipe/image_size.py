"""The size of a network's input in a recipe: one number for a square, else `[height, width]`.

Promise: a square is one number, however it is written, so that recipes, inputs and the addresses of codes of equal size
are equal.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field, PlainSerializer

from tlscale.recipe.mistakes import InvalidValueError

LEAST_PX, MOST_PX = 8, 2048
ImageSize = int | tuple[int, int]
"""Pixels: of both sides, or height and width."""


def height_width(image_size: ImageSize) -> tuple[int, int]:
    """Return height and width."""
    return (image_size, image_size) if isinstance(image_size, int) else image_size


def image_size_of(height: int, width: int) -> ImageSize:
    """Return a size, of which a square's is one number."""
    return height if height == width else (height, width)


def size_in_words(image_size: ImageSize) -> str:
    """Return `64 x 96`: height, then width."""
    return " x ".join(map(str, height_width(image_size)))


def pixels_in_words(image_size: ImageSize) -> str:
    """Return `64 px` of a square, else `64 x 96 px`."""
    return f"{image_size if isinstance(image_size, int) else size_in_words(image_size)} px"


def _read(value: object) -> object:
    if not isinstance(value, list | tuple):
        return value
    sides = [side for side in value if isinstance(side, int) and not isinstance(side, bool)]
    if not len(value) == len(sides) == 2 or not all(LEAST_PX <= side <= MOST_PX for side in sides):
        problem = f"takes two sides, height and width, each a whole number from {LEAST_PX} to {MOST_PX}"
        raise InvalidValueError(problem, "Write [64, 128], for example; or one number for a square.")
    return image_size_of(*sides)


Side = Annotated[int, Field(ge=LEAST_PX, le=MOST_PX)]
SizeInRecipe = Annotated[
    Side | tuple[Side, Side] | None,
    BeforeValidator(_read),
    PlainSerializer(lambda value: list(value) if isinstance(value, tuple) else value),
]
"""What `image_size` takes; null: as the backbone has it."""
