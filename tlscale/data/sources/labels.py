"""Read labels: from a column of text or numbers to label texts and, by row, their ids.

Promise: label 007 is not label 7, no row goes without a label, and the order of the texts hangs on the texts alone.

Shape letters: N rows, C label texts.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tlscale.data.sources.label_kinds import separator_of
from tlscale.data.sources.tables import Ints
from tlscale.errors import DataError, first_few, quoted

_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,999}")
_WHOLE = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.0+)?")
_MISSING = frozenset(("nan", "na", "<na>", "n/a", "none", "null"))
_CELLS = frozenset(("nat", "#n/a", "#value!", "#ref!"))
REGRESSION = "Regression is not supported: divide the numbers into classes, such as 'under 18' and '18 and over'"
# Characters that Unicode has shown as nothing, and that are neither controls nor formats: joiners, fillers, selectors.
_UNSEEN = frozenset(
    map(chr, (0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, *range(0x180B, 0x1810), 0x3164, *range(0xFE00, 0xFE10), 0xFFA0))
) | {*map(chr, range(0xE0100, 0xE01F0))}


def is_integer(text: str) -> bool:
    """Return whether a label is an integer as a computer writes it (`7`, not `007` and not `7.0`)."""
    return _INTEGER.fullmatch(text) is not None


def sort_labels(names: Iterable[str]) -> tuple[str, ...]:
    """Sort names, each once: by number where all of them are integers, else by code point."""
    distinct = set(names)
    return tuple(sorted(distinct, key=int) if all(map(is_integer, distinct)) else sorted(distinct))


def check_alike(
    names: Iterable[str], place: str, *, called: tuple[str, str] = ("labels", "classes"), key: str | None = None
) -> None:
    """Check that no two names look alike: they would be one class to whoever wrote them, and two to us.

    Args:
        called: what the names are, and what they name.
        key: that they are read by.

    Raises:
        DataError: two differ in nothing but their Unicode form, in characters that are not seen, or as `1` and `1.0`.
    """
    by_look: dict[str, str] = {}
    for name in names:
        other = by_look.setdefault(_look(name), name)
        if other != name:
            are_numbers = _WHOLE.fullmatch(name) is not None
            raise DataError(
                f"{place}: the {called[0]} {ascii(other)} and {ascii(name)} are "
                f"{'one number' if are_numbers else 'the same to the eye'}, but two {called[1]}",
                key=key,
                remedy="Write them alike (in Unicode's form NFC, without invisible characters), or name them apart",
            )


def _look(name: str) -> str:
    """Return what is seen of a name, the same for names that look alike."""
    if name.isascii() and name.isprintable():
        return str(int(float(name))) if _WHOLE.fullmatch(name) and len(name) < 16 else " ".join(name.split())
    seen = (
        sign
        for sign in name
        if sign.isspace() or (unicodedata.category(sign) not in ("Cf", "Cc") and sign not in _UNSEEN)
    )
    return " ".join(unicodedata.normalize("NFC", "".join(seen)).split())


def is_text(kind: pa.DataType) -> bool:
    """Return whether a column of this type holds text, also as a dictionary."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def encode_labels(labels_N: pa.ChunkedArray, where: str) -> tuple[tuple[str, ...], Ints]:
    """Return the label texts, sorted, and the place of each row's label among them.

    Args:
        labels_N: a column of text, whole numbers, booleans, or a dictionary of such.

    Raises:
        DataError: another type, or rows with an empty label.
    """
    if pa.types.is_dictionary(labels_N.type):
        labels_N = labels_N.cast(labels_N.type.value_type)
    kind = labels_N.type
    try:
        labels_N.validate(full=True)
    except pa.ArrowInvalid as error:
        raise DataError(f"{where}: labels are not readable as text: {error}") from None
    if not (is_text(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        raise DataError(f"{where}: labels are of type {kind}; expected text or whole numbers", remedy=_other_task(kind))
    text_N = labels_N.cast(pa.large_string()).combine_chunks()
    empty = len(text_N) - (pc.sum(pc.not_equal(pc.utf8_trim_whitespace(text_N), "")).as_py() or 0)
    if empty:
        counts = {one["values"]: one["counts"] for one in pc.value_counts(text_N).to_pylist() if one["values"]}
        separator = separator_of(counts)
        joined = f"They look like several an image, with {separator!r} between them, and none where there is no text"
        remedy = f"{joined}: if so, write data.task: multi_label" if separator else "Fill them in or take them out"
        raise DataError(f"{where}: {empty:,} of {len(text_N):,} rows have no label", remedy=remedy)
    encoded = text_N.dictionary_encode()
    texts = encoded.dictionary.to_pylist()
    spaced = [text for text in texts if text != text.strip()]
    if spaced:
        raise DataError(
            f"{where}: labels with spaces around them: {first_few(quoted(spaced))}", remedy="Take the spaces out"
        )
    names = sort_labels(texts)
    _refuse_missing(names, where)
    place = {name: i for i, name in enumerate(names)}
    sorted_C = np.array([place[text] for text in texts], dtype=np.int64)
    return names, sorted_C[encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)]


def _other_task(kind: pa.DataType) -> str | None:
    """Return what to do about labels whose type is that of another task."""
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return REGRESSION
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return "Where an image has several labels, write data.task: multi_label"
    return None


def missing_labels(names: Iterable[str]) -> list[str]:
    """Return the names that programs write for what is missing, and people hardly for a class."""
    return [name for name in names if name.lower() in _MISSING - {"none"} | _CELLS]


def _refuse_missing(names: tuple[str, ...], where: str) -> None:
    """Refuse what programs write for a missing number, where all other labels are numbers."""
    missing = [name for name in names if name.lower() in _MISSING]
    if missing and len(missing) < len(names) and all(_WHOLE.fullmatch(name) for name in names if name not in missing):
        raise DataError(
            f"{where}: rows have the label {missing[0]!r} among numbers, as if it were missing",
            remedy="Fill it in, or take the rows out",
        )
