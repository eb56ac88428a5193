"""Read several labels an image: a column of lists, a column of text with a separator, or a column of 0 and 1 a class.

Promise: all three become one column of lists of texts, and then one matrix. An image without any label has none of the
classes, and is not taken for one whose label is missing: null is an error.

Shape letters: N rows, K label texts, V labels of all rows together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tlscale.data.sources.label_kinds import separator_of
from tlscale.data.sources.labels import encode_labels, is_text
from tlscale.data.sources.tables import JOINER
from tlscale.errors import DataError, first_few, quoted, quoted_list

Bools = npt.NDArray[np.bool_]
_YES_NO = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True}
_NONE = pa.array([], pa.large_string())


def sets_of_text(texts_N: pa.ChunkedArray, separator: str, where: str, *, must_occur: bool) -> pa.ChunkedArray:
    """Divide texts at the separator: lists of labels, without blanks around them.

    Args:
        must_occur: it has to be in a row; images that are only scored may have one label each.

    Raises:
        DataError: the column is no text, has a row of null, or lacks a separator that must occur.
    """
    if not is_text(texts_N.type):
        raise DataError(
            f"{where}: of type {texts_N.type}, which has no separator",
            key="data.label_separator",
            remedy="Take it out" if is_list(texts_N.type) else "Name a column of text",
        )
    if texts_N.null_count:
        raise _null(where, texts_N.null_count, len(texts_N))
    if must_occur and len(texts_N) and not pc.any(pc.match_substring(texts_N, separator)).as_py():
        counts = {one["values"]: one["counts"] for one in pc.value_counts(texts_N).to_pylist()}
        other = separator_of(counts)
        raise DataError(
            f"{where}: no row has {separator!r}",
            key="data.label_separator",
            remedy=f"They look as if they had {other!r}" if other else "Name the one that stands between two labels",
        )
    lists_N = pc.split_pattern(texts_N.cast(pa.large_string()), separator).combine_chunks()
    lists_N = lists_N if isinstance(lists_N, pa.Array) else pa.concat_arrays(lists_N.chunks)
    values_V = pc.utf8_trim_whitespace(lists_N.flatten())
    rows_V = pc.list_parent_indices(lists_N).to_numpy(zero_copy_only=False)
    kept_V = pc.not_equal(values_V, "").to_numpy(zero_copy_only=False)  # of an empty cell, or behind a last separator
    return _lists(values_V.filter(pa.array(kept_V)), rows_V[kept_V], len(texts_N))


def sets_of_columns(table: pa.Table, columns: Sequence[str], where: str) -> pa.ChunkedArray:
    """Put columns of 0 and 1 together to lists of the names of those with a 1.

    Raises:
        DataError: a column holds anything else.
    """
    has_NK = np.stack([_yes_no(table[name], f"{where}, column {name!r}") for name in columns], axis=1)
    rows_V, numbers_V = np.nonzero(has_NK)
    return _lists(pa.array(list(columns), pa.large_string()).take(pa.array(numbers_V)), rows_V, len(table))


def _yes_no(column: pa.ChunkedArray, where: str) -> Bools:
    if column.null_count:
        raise _null(where, column.null_count, len(column))
    kind = column.type
    if pa.types.is_boolean(kind):
        return np.asarray(column.to_numpy(), dtype=bool)
    if not (is_text(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        raise DataError(f"{where}: of type {kind}; expected 0 and 1", key="data.label_columns")
    encoded = column.cast(pa.large_string()).combine_chunks().dictionary_encode()
    texts = encoded.dictionary.to_pylist()
    wrong = [text for text in texts if text.strip().lower() not in _YES_NO]
    if wrong:
        raise DataError(
            f"{where}: {first_few(quoted(wrong))}, where 0 and 1 were expected",
            key="data.label_columns",
            remedy="Write 1 where an image has the label, and 0 where it has not",
        )
    is_yes = np.array([_YES_NO[text.strip().lower()] for text in texts], dtype=bool)
    return np.asarray(is_yes[encoded.indices.to_numpy(zero_copy_only=False)], dtype=bool)


def is_list(kind: pa.DataType) -> bool:
    """Return whether a column of this type holds lists."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def encode_label_sets(lists_N: pa.ChunkedArray, where: str) -> tuple[tuple[str, ...], Bools]:
    """Return the label texts, sorted, and which of them each row has: bool (N, K).

    Args:
        lists_N: a column of lists of text or whole numbers.

    Raises:
        DataError: another type, a row of null, or labels that `encode_labels` refuses.
    """
    if not is_list(lists_N.type):
        raise DataError(
            f"{where}: of type {lists_N.type}, and not of lists of labels",
            key="data.task",
            remedy="Name what stands between the labels of an image (data.label_separator), or columns of 0 and 1 "
            "(data.label_columns); or take data.task out, where each image has one label",
        )
    if lists_N.null_count:
        raise _null(where, lists_N.null_count, len(lists_N))
    whole_N = pa.concat_arrays(lists_N.chunks) if lists_N.num_chunks else pa.array([], lists_N.type)
    values_V, rows_V = whole_N.flatten(), pc.list_parent_indices(whole_N).to_numpy(zero_copy_only=False)
    values_V = _NONE if pa.types.is_null(values_V.type) else values_V
    names, ids_V = encode_labels(pa.chunked_array([values_V]), f"{where}, labels in its lists")
    refuse_joiners(names, where)
    has_NK = np.zeros((len(whole_N), len(names)), dtype=bool)
    has_NK[rows_V, ids_V] = True
    return names, has_NK


def refuse_joiners(names: Sequence[str], where: str) -> None:
    """Refuse names that cannot stand among others in an answer.

    Raises:
        DataError: there are such.
    """
    joined = [name for name in names if JOINER in name]
    if joined:
        raise DataError(
            f"{where}: labels with {JOINER!r}, by which the labels of an answer are joined: {quoted_list(joined, 5)}",
            remedy=f"Name them without it, or say that it stands between two labels (data.label_separator: '{JOINER}')",
        )


def _lists(values_V: pa.Array, rows_V: npt.NDArray[np.int64], num_rows: int) -> pa.ChunkedArray:
    ends_N = np.cumsum(np.bincount(rows_V, minlength=num_rows))
    return pa.chunked_array([pa.LargeListArray.from_arrays(np.concatenate([[0], ends_N]).astype(np.int64), values_V)])


def _null(where: str, count: int, total: int) -> DataError:
    remedy = "Write an empty list or text (or 0) where an image has none of the labels, or take the rows out"
    return DataError(f"{where}: {count:,} of {total:,} rows are null", remedy=remedy)
