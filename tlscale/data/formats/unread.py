"""What the readers of single formats raise: `decode` puts the place of the image in front."""

from __future__ import annotations

from tlscale.errors import render


class Reason(str):
    """Say in words why an image cannot be used, and of what kind that is: what differs in numbers or names is one."""

    kind: str
    of_model: str
    """Without a remedy that names a key of a recipe: who gives images to a model has none to change."""

    def __new__(cls, text: str, kind: str = "", of_model: str | None = None) -> Reason:
        """Take a text; it is its own kind where none is given."""
        reason = super().__new__(cls, text)
        reason.kind, reason.of_model = kind or text, of_model or text
        return reason


class UnreadError(Exception):
    """Raised with what is wrong with an image, its kind, and what to do about it where something can be done."""

    def __init__(self, problem: str, remedy: str | None = None, *, kind: str = "", of_recipe: bool = False) -> None:
        """Take them; `of_recipe` is a remedy that changes a key of a recipe."""
        super().__init__(render(problem, remedy=remedy))
        self.reason = Reason(str(self), kind, problem if of_recipe else None)


class OtherChannelsError(UnreadError):
    """Raised for an image that is sound, and has other channels than the network takes."""
