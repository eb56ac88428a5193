"""What may leave the machine: plain values without secrets, and without places, which often hold the name of a user.

Promise: what goes to a tracker, or into a note about one, went through here. Paths below the data are relative to them,
other known places are their last part, and of any other absolute path in a message only its last part is left. What is
needed to run again is in `recipe.yaml` of the run folder.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tlscale.recipe.schema import BackboneSection, Recipe
from tlscale.recipe.sources import SOURCES

_URL_USER = re.compile(r"(?<=://)[^/\s@]+@")
_URL_SECRET = re.compile(r"(?i)([?&][^=&\s]*(?:token|key|sig|secret|passw|credential)[^=&\s]*=)[^&\s]+")
_PLAIN_SECRET = re.compile(r"(?i)(?<!\S)([\w.-]*(?:api_?key|token|secret|passw|credential)[\w.-]*=)[^&\s]+")
_SECRET_KEY = re.compile(r"(?i)api_?key|token|secret|passw|credential")
REDACTED = "[redacted]"
# Not within a URL or a relative path: what comes before the first slash is neither a name nor another slash.
_ABSOLUTE = re.compile(r"(?<![\w:/.~\-\])])/(?:[^/\s:;,'\"()]+/)+")
_NAMES = frozenset(("classes", "class_weights"))  # keys whose texts are labels, whatever they look like


def redact(value: Any) -> Any:  # noqa: ANN401 (plain YAML values)
    """Return plain values without secrets.

    That is without user-info and signing parameters in URLs, values of keys that look secret, and what follows such a
    key and '=' in a text.

    Keys are those that hold api_key, token, secret, passw or credential.
    """
    if isinstance(value, Mapping):
        return {
            key: REDACTED if isinstance(item, str) and _SECRET_KEY.search(str(key)) else redact(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    if not isinstance(value, str):
        return value
    for secret in (_URL_SECRET, _PLAIN_SECRET):
        value = secret.sub(rf"\1{REDACTED}", value)
    return _URL_USER.sub("", value)


def about_secrets(recipe: Recipe) -> str | None:
    """Return a warning where values of the recipe hold what looks like a secret; None: there is none."""
    keys = list(_keys_with_secrets(recipe.to_plain(), ""))
    if not keys:
        return None
    return (
        f"WARNING: {', '.join(keys)} holds what looks like a password or key. recipe.yaml keeps it, as it is needed to "
        "run again; give keys by the environment, and never in a recipe"
    )


def _keys_with_secrets(plain: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for key, value in plain.items():
        if isinstance(value, Mapping):
            yield from _keys_with_secrets(value, f"{prefix}{key}.")
        elif redact({key: value}) != {key: value}:
            yield f"{prefix}{key}"


def reason(error: Exception) -> str:
    """Return an exception in one redacted line of at most 200 characters."""
    first_line = (str(error).splitlines() or [""])[0]
    text = f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__
    return str(redact(text))[:200]


def places_of(recipe: Recipe) -> tuple[str, ...]:
    """Return the places that a recipe names, and those that messages are about: the home and the working folder."""
    named = [_place_of(recipe.backbone)]
    named += [recipe.data.path, recipe.data.exclude]
    if recipe.distill is not None:
        teacher = recipe.distill.teacher
        named += [recipe.distill.run, None if teacher is None else _place_of(teacher)]
    if SOURCES[recipe.data.source].path == "file":  # a table, whose paths begin in its folder
        named.append(os.path.dirname(recipe.data.path or ""))
    with contextlib.suppress(OSError):  # the working folder was removed
        named.append(os.getcwd())
    found = {place for place in (*named, os.path.expanduser("~")) if place and os.path.isabs(place)}
    links = {os.path.realpath(place) for place in found}
    return tuple(sorted((found | links) - {os.sep}, key=len, reverse=True))


def _place_of(backbone: BackboneSection) -> str | None:
    """Return the file or the run of the weights, if they are of one."""
    if backbone.from_run:
        return backbone.run
    return backbone.weights if backbone.from_file else None


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
        last_part = "~" if place == os.path.expanduser("~") else os.path.basename(place)
        value = re.sub(rf"{re.escape(place)}/?(?![\w.\-/])", last_part, value)
    return _ABSOLUTE.sub("", value)
