"""Recognise names of splits, however they are spelt, and pick the splits that play a role.

Promise: a split that the recipe does not use, but whose name means test or validation data, is never skipped silently:
the readers check here before they skip anything.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from tlscale.errors import DataError, quoted_list, sentences, suggestion
from tlscale.recipe.schema import DataSection

Role = Literal["train", "validation", "test"]
ROLES: tuple[Role, ...] = ("train", "validation", "test")

SPLIT_COLUMN = "split"
"""Column of a table with the split of each row; found in any case, with or without spaces around it."""

WHOLE = "."
"""As `data.train_split`: the folder itself, whose folders are all classes, whatever they are called."""

VALIDATION_NAMES = ("validation", "valid", "val")
"""Names of a validation split that are found by default."""

_WORDS: dict[str, Role] = {
    **dict.fromkeys(("train", "training", "trainval", "trn"), "train"),
    **dict.fromkeys(
        ("val", "valid", "validation", "validate", "validating", "dev", "eval", "evaluation"), "validation"
    ),
    **dict.fromkeys(("test", "testing", "tst", "holdout", "heldout"), "test"),
}
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
_YES_AND_NO = frozenset(("0", "1", "false", "true", "f", "t", "no", "yes", "n", "y"))
_MOST_SPLITS = 20  # different values; a column of more is none of splits
_ENDS = ("s", "set", "sets", "split", "data", "images", "imgs")


def role_of(name: str) -> Role | None:
    """Return the role that a name as a whole stands for: 'Test', ' testing', 'val2', 'TestSet'; None: none."""
    return _role_of_word(re.sub(r"[^a-z]", "", name.lower()))


def is_split_name(name: str) -> bool:
    """Return whether a folder of this name is hardly a class: 'Test' and 'val' are none, but 'trains' may be."""
    return role_of(name) in ("validation", "test") or name.lower() in ("train", "training")


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


def are_splits(names: Sequence[str]) -> bool:
    """Return whether folders can only be splits: each has a role in its name, and there are two roles or more."""
    roles = [role_within(name) for name in names]
    return None not in roles and len(set(roles)) > 1


def may_be_classes(names: Sequence[str], with_classes: Sequence[str]) -> list[str]:
    """Return the folders that are called like splits and seem to be classes: they lie among classes, and hold none.

    Args:
        names: of all folders with images at one place.
        with_classes: those of them that hold folders with images.
    """
    called = [name for name in names if is_split_name(name)]
    is_so = len(called) < len(names) and not are_splits(names) and not set(called) & set(with_classes)
    return called if is_so else []


def split_values(column: str, values: Iterable[str | None]) -> list[str]:
    """Return the values of a column if it tells splits apart, else none.

    It does where all of them name a split, and not all the training split; where most of them do, of two roles or more
    ('train', 'test', 'extra'); and where its own name does and its values are yes and no ('is_test').
    """
    held = _held(values)
    roles = [role_of(value) for value in held]
    num_others, named = roles.count(None), set(roles) - {None}
    told = len(named) > 1 and num_others < len(held) / 2 if num_others else bool(named - {"train"})
    return held if told or (len(held) > 1 and _is_flag(column, held)) else []


def may_name_splits(column: str, values: Iterable[str | None]) -> bool:
    """Return whether the column that begins with these values may be one of `split_values`."""
    held = _held(values)
    return len(held) <= _MOST_SPLITS and (any(map(role_of, held)) or _is_flag(column, held))


def _held(values: Iterable[str | None]) -> list[str]:
    return sorted({value for value in values if value is not None and value.strip()})


def _is_flag(column: str, held: Iterable[str]) -> bool:
    return role_within(column) is not None and {value.strip().lower() for value in held} <= _YES_AND_NO


def split_keys(names: Mapping[Role, str]) -> dict[str, str]:
    """Return the keys of `data` that name these splits, without those that are found by default."""
    defaults = {"train": "train", "test": "test", "validation": None}
    return {f"{role}_split": name for role, name in names.items() if name != defaults[role]}


class ScoredSection(DataSection):
    """`data` of images that are only scored: none of the usual splits has to be there."""


def pick_splits(
    section: DataSection, available: Sequence[str], where: str, *, any_word: bool = False
) -> dict[Role, str]:
    """Pick the split of the source that plays each role; validation and test may be missing.

    Args:
        any_word: an unused name with a word such as 'test' in it is refused too, not only one that is such a word.

    Raises:
        DataError: a split that the recipe names is not there, one split has two roles, or a split that nothing uses
            is called like a role that nothing plays.
    """
    picked: dict[Role, str] = {}
    if section.train_split in available or not isinstance(section, ScoredSection):
        picked["train"] = _named_split(section.train_split, "train_split", available, where)
    validation = section.validation_split
    if validation is not None and not (isinstance(section, ScoredSection) and validation not in available):
        picked["validation"] = _named_split(validation, "validation_split", available, where)
    else:
        usual = [name for name in VALIDATION_NAMES if name in available and name not in (section.train_split, "test")]
        usual = [name for name in usual if name != section.test_split]
        if len(usual) > 1:
            raise DataError(
                f"{where} has validation splits {quoted_list(usual)}", remedy="Say which in data.validation_split"
            )
        if usual:
            picked["validation"] = usual[0]
    if section.test_split in available or (section.test_split != "test" and not isinstance(section, ScoredSection)):
        picked["test"] = _named_split(section.test_split, "test_split", available, where)
    for role, name in picked.items():
        twin = next((other for other, its in picked.items() if its == name and other != role), None)
        if twin is not None:
            raise DataError(f"{where}: split {name!r} would be both {role} and {twin}; each needs its own")
    if not picked:
        _named_split(section.train_split, "train_split", available, where)  # which lists what there is
    unused = [name for name in available if name not in picked.values()]
    for name in unused:
        looks_like = role_within(name) if any_word else role_of(name)
        if looks_like is not None and looks_like not in picked:
            raise DataError(
                f"{where}: unknown split {name!r}",
                remedy=f"Did you mean {looks_like!r}? Name it in the recipe (data.{looks_like}_split: "
                f"{name!r}), or rename it; one that is not to be used must not be called like a split",
            )
    return picked


def _named_split(name: str, key: str, available: Sequence[str], where: str) -> str:
    if name not in available:
        raise DataError(
            f"{where} has no split {name!r}",
            key=f"data.{key}",
            remedy=sentences(f"It has {quoted_list(available)}.", suggestion(name, available)),
        )
    return name
