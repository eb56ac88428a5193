"""Refuse views of an image (`evaluate.views`) that have no meaning with the data at hand."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tlscale.data.views import FIVE_CROP, FLIPS
from tlscale.errors import RecipeError

_KEY = "evaluate.views"
_MIRRORED = {
    "flip": (("left", "right"), ("l", "r")),
    "vertical_flip": (("top", "bottom"), ("up", "down"), ("upper", "lower")),
}


def refuse_senseless_views(views: Sequence[str], classes: Sequence[str], seen_share: float) -> None:
    """Refuse crops of images that are shown whole, and flips that turn one class into another by their names.

    Raises:
        RecipeError: there is one of these.
    """
    if FIVE_CROP in views and seen_share >= 1.0:
        problem = f"{FIVE_CROP}: a typical image is shown whole, so that all crops of it are the same"
        raise RecipeError(problem, key=_KEY, remedy="Take it out, or set data.crop_pct below 1, such as 0.875")
    for name in FLIPS:
        pair = _mirrored(classes, name) if name in views else None
        if pair is not None:
            problem = f"{name}: it makes an image of '{pair[0]}' one of '{pair[1]}', by their names"
            raise RecipeError(problem, key=_KEY, remedy="Take it out")


def _mirrored(classes: Sequence[str], flip: str) -> tuple[str, str] | None:
    """Return two classes of which one has the other's name when words such as left and right change places."""
    words_of = {tuple(re.split(r"[\W_]+", name.lower())): name for name in classes}
    for one, other in _MIRRORED[flip]:
        turned = {one: other, other: one}
        for words, name in words_of.items():
            found = words_of.get(tuple(turned.get(word, word) for word in words))
            if found is not None and found != name:
                return name, found
    return None
