"""Read labels: from a column of text or numbers to label texts and, by row, their ids.

Promise: label 007 is not label 7, no row goes without a label, and the order of the texts hangs on the texts alone.

Shape letters: N rows, C label texts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tlscale.data.sources.quoting import first_few, quoted
from tlscale.data.sources.tables import Ints
from tlscale.errors import DataError

_INTEGER = re.compile(r"-?(0|[1-9][0-9]*)")


def is_integer(text: str) -> bool:
    """Return whether a label is an integer as a computer writes it (`7`, not `007` and not `7.0`)."""
    return _INTEGER.fullmatch(text) is not None


def sort_labels(names: Iterable[str]) -> tuple[str, ...]:
    """Sort names, each once: by number where all of them are integers, else by code point."""
    distinct = set(names)
    return tuple(sorted(distinct, key=int) if all(map(is_integer, distinct)) else sorted(distinct))


def is_text(kind: pa.DataType) -> bool:
    """Return whether a column of this type holds text, also as a dictionary."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def encode_labels(labels_N: pa.ChunkedArray, where: str) -> tuple[tuple[str, ...], Ints]:
    """Return the label texts, sorted, and the place of each row's label among them.

    Args:
        labels_N: a column of text, whole numbers, booleans, or a dictionary of such.
        where: the column, for messages.

    Raises:
        DataError: another type, or rows with an empty label.
    """
    if pa.types.is_dictionary(labels_N.type):
        labels_N = labels_N.cast(labels_N.type.value_type)
    kind = labels_N.type
    if not (is_text(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        raise DataError(f"{where}: labels are of type {kind}; expected text or whole numbers")
    text_N = labels_N.cast(pa.large_string()).combine_chunks()
    empty = len(text_N) - (pc.sum(pc.not_equal(pc.utf8_trim_whitespace(text_N), "")).as_py() or 0)
    if empty:
        raise DataError(f"{where}: {empty:,} of {len(text_N):,} rows have no label; fill them in or take them out")
    encoded = text_N.dictionary_encode()
    texts = encoded.dictionary.to_pylist()
    spaced = [text for text in texts if text != text.strip()]
    if spaced:
        raise DataError(f"{where}: labels with spaces around them: {first_few(quoted(spaced))}; take the spaces out")
    names = sort_labels(texts)
    place = {name: i for i, name in enumerate(names)}
    sorted_C = np.array([place[text] for text in texts], dtype=np.int64)
    return names, sorted_C[encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)]
