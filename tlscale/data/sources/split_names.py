"""Recognise names of splits, however they are spelt.

Promise: a split that the recipe does not use, but whose name says that it is test or validation data, is never passed
over without a word: the readers ask here before they leave anything out.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Literal

Role = Literal["train", "validation", "test"]

SPLIT_COLUMN = "split"
"""Column of a table that says which split a row belongs to; found in any case, with or without spaces around it."""

_WORDS: dict[str, Role] = {
    **dict.fromkeys(("train", "training", "trainval", "trn"), "train"),
    **dict.fromkeys(
        ("val", "valid", "validation", "validate", "validating", "dev", "eval", "evaluation"), "validation"
    ),
    **dict.fromkeys(("test", "testing", "tst", "holdout", "heldout"), "test"),
}
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
_ENDS = ("s", "set", "sets", "split", "data", "images", "imgs")


def role_of(name: str) -> Role | None:
    """Return the role that a name as a whole stands for: 'Test', ' testing', 'val2', 'TestSet'; None: none."""
    plain = re.sub(r"[^a-z]", "", name.lower())
    return _role_of_word(plain)


def role_within(name: str) -> Role | None:
    """Return the role that any word of a name stands for: also 'test_images', 'imagesTest', '2-validation'."""
    whole = role_of(name)
    if whole is not None:
        return whole
    roles = (_role_of_word(word.lower()) for word in _WORD.findall(name))
    return next((role for role in roles if role is not None), None)


def _role_of_word(word: str) -> Role | None:
    if word in _WORDS:
        return _WORDS[word]
    stems = (word.removesuffix(end) for end in _ENDS if word.endswith(end))
    return next((_WORDS[stem] for stem in stems if stem in _WORDS), None)


def lookalikes(unused: Iterable[str], roles: Collection[str], *, any_word: bool) -> dict[str, Role]:
    """Return the unused names that look like a split whose role nothing plays.

    Args:
        unused: names of splits (or folders) that the recipe does not use.
        roles: the roles that are played.
        any_word: one word of a name is enough ('test_images').
    """
    found = {name: role_within(name) if any_word else role_of(name) for name in unused}
    return {name: role for name, role in found.items() if role is not None and role not in roles}


def are_splits(names: Sequence[str]) -> bool:
    """Return whether folders can only be splits: each has a role in its name, and there are two roles or more."""
    roles = [role_within(name) for name in names]
    return None not in roles and len(set(roles)) > 1


def split_values(values: Iterable[str | None]) -> list[str]:
    """Return the values of a column if each that is not empty names a split, and not all name the training split."""
    held = [value for value in values if value is not None and value.strip()]
    roles = {role_of(value) for value in held}
    return sorted(held) if roles and None not in roles and roles != {"train"} else []


def may_name_splits(values: Iterable[str | None]) -> bool:
    """Return whether the column that begins with these values may be one of `split_values`."""
    held = [value for value in values if value is not None and value.strip()]
    return bool(held) and all(map(role_of, held))
