"""Tell from the labels of a column whether they are classes: they may be several labels an image, or numbers.

Promise: a function of the texts, of how many images each has, and of the column's name, by the rules below. What is
held for no class is an error, and a recipe that names its task (`data.task`) or its classes is taken at its word.

Several labels: `_LEAST_JOINED` texts or more have a separator (; | ,), and of the parts at it half or more stand in
several texts, as in `young;female`, `young;male`, `old;male`. Parts of `tench, Tinca tinca`, or of
`Animalia;Chordata;Aves`, are mostly those of one class alone.

Numbers: all texts are, and either some have decimals (and there are more than `_FEW_DECIMALS`), or they are whole, more
than `_FEW_NUMBERS`, and of one of three kinds: fewer than two images each; in a column that is called as a quantity is;
or neither from 0 nor from 1 on, and with more than half of their range in use, as ages or years have it. Whole numbers
in a column that is called as classes are (`weight_class`, `species_id`) are classes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

SEPARATORS = (";", "|", ",")
_LEAST_JOINED = 3
_FEW_DECIMALS, _FEW_NUMBERS = 10, 20
_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,15}(?:\.[0-9]{0,15})?|\.[0-9]{1,15})(?:[eE][+-]?[0-9]{1,2})?")
_QUANTITIES = re.compile(
    "ages?|amount|angle|area|cost|count|degrees?|density|depth|diameter|distance|height|income|latitude|length|"
    "longitude|mass|percent(age)?|price|quantity|rating|salary|score|speed|temperature|thickness|value|volume|weight|"
    "width|years?"
)
_CLASSES = re.compile("bins?|categor(y|ies)|class(es)?|codes?|groups?|ids?|kinds?|species|types?")


def separator_of(names: Mapping[str, int]) -> str | None:
    """Return the separator at which these labels are several labels; None where they are one each.

    Args:
        names: with the number of images of each.
    """
    return next((separator for separator in SEPARATORS if _are_joined(list(names), separator)), None)


def _are_joined(names: list[str], separator: str) -> bool:
    if sum(separator in name for name in names) < _LEAST_JOINED:
        return False
    found = Counter(part for name in names for part in {part.strip() for part in name.split(separator)})
    # Of the texts without a separator only those count that are parts of others: they say nothing else of them.
    joined = {part.strip() for name in names if separator in name for part in name.split(separator)}
    return sum(found[part] > 1 for part in joined) * 2 >= len(joined)


def are_numbers(names: Mapping[str, int], column: str | None = None) -> bool:
    """Return whether these labels are numbers, and no names of classes.

    Args:
        names: with the number of images of each.
        column: its name, as far as it is known.
    """
    if len(names) <= _FEW_DECIMALS or not all(_NUMBER.fullmatch(name) for name in names):
        return False
    values = sorted({float(name) for name in names})
    if not all(value.is_integer() for value in values):
        return True
    if len(values) <= _FEW_NUMBERS:
        return False
    words = re.split(r"[^a-z]+", (column or "").lower())
    if any(map(_CLASSES.fullmatch, words)):
        return False
    is_dense = (values[-1] - values[0] + 1) < 2 * len(values)
    are_alone = sum(names.values()) < 2 * len(names)
    return are_alone or any(map(_QUANTITIES.fullmatch, words)) or (values[0] not in (0.0, 1.0) and is_dense)
