"""What the readers of single formats raise: `decode` puts the place of the image in front."""

from __future__ import annotations

from tlscale.errors import render


class UnreadError(Exception):
    """Raised with what is wrong with an image, and what to do about it where something can be done."""

    def __init__(self, problem: str, remedy: str | None = None) -> None:
        super().__init__(render(problem, remedy=remedy))


class OtherChannelsError(UnreadError):
    """Raised for an image that is sound, and has other channels than the network takes."""
