"""Where things lie on this machine, kept out of what leaves it: a path often holds the name of a user or a customer.

Promise: paths below the data are relative to them, other known places are their last part, and of any other absolute
path in a message only its last part is left. What is needed to run again is in `recipe.yaml` of the run folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tlscale.recipe.schema import Recipe
from tlscale.recipe.sources import SOURCES

# Not within a URL or a relative path: what comes before the first slash is neither a name nor another slash.
_ABSOLUTE = re.compile(r"(?<![\w:/.~\-\])])/(?:[^/\s:;,'\"()]+/)+")
_NAMES = frozenset(("classes", "class_weights"))  # keys whose texts are labels, whatever they look like


def places_of(recipe: Recipe) -> tuple[str, ...]:
    """Return the places that a recipe names, and those that messages are about: the home and the working folder."""
    named = [recipe.backbone.weights if recipe.backbone.from_file else None, recipe.data.path]
    if recipe.distill is not None:
        teacher = recipe.distill.teacher
        named += [recipe.distill.run, teacher.weights if teacher is not None and teacher.from_file else None]
    if SOURCES[recipe.data.source].path == "file":  # a table, whose paths begin in its folder
        named.append(os.path.dirname(recipe.data.path or ""))
    found = {place for place in (*named, os.path.expanduser("~"), _working_folder()) if place and os.path.isabs(place)}
    links = {os.path.realpath(place) for place in found}
    return tuple(sorted((found | links) - {os.sep}, key=len, reverse=True))


def without_places(value: Any, places: Sequence[str]) -> Any:  # noqa: ANN401 (plain YAML values)
    """Return plain values whose texts name no place: `PLACE/a/b` becomes `a/b`, and `PLACE` its last part."""
    if isinstance(value, Mapping):
        return {key: item if key in _NAMES else without_places(item, places) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(item, places) for item in value]
    if not isinstance(value, str):
        return value
    for place in places:
        value = re.sub(rf"{re.escape(place)}/(?=[^\s'\"])", "", value)
        value = re.sub(rf"{re.escape(place)}/?(?![\w.\-/])", _last_part(place), value)
    return _ABSOLUTE.sub("", value)


def _last_part(place: str) -> str:
    return "~" if place == os.path.expanduser("~") else os.path.basename(place)


def _working_folder() -> str:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return ""
