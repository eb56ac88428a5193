"""Find the columns of a table: the one of the images, the one of the labels, and those that nothing reads."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from tlscale.data.sources.split_names import role_of
from tlscale.errors import DataError, first_few, quoted, quoted_list, sentences, suggestion
from tlscale.recipe.schema import DataSection

LABEL_COLUMNS = ("label", "labels", "class", "class_name", "target")
"""Usual names of the column of labels."""


def pick_column(given: str | None, usual: Sequence[str], columns: Sequence[str], key: str, where: str) -> str:
    """Pick the column that the recipe names, or the one with a usual name.

    Raises:
        DataError: not there; none or several have a usual name.
    """
    if given is not None:
        if given not in columns:
            raise DataError(
                f"{where} has no column {given!r}",
                key=f"data.{key}",
                remedy=sentences(f"It has {quoted_list(columns)}.", suggestion(given, columns)),
            )
        return given
    found = [column for column in columns if column.strip().lower() in usual]
    if len(found) != 1:
        what = f"columns {quoted_list(found)} may all be it" if found else f"no column is called {' or '.join(usual)}"
        raise DataError(f"{where}: {what}", remedy=f"Say which in data.{key}. The columns are {quoted_list(columns)}")
    return found[0]


def pick_label_columns(section: DataSection, columns: Sequence[str], where: str) -> list[str]:
    """Pick the column of the labels, or the columns of 0 and 1 that the recipe names.

    Raises:
        DataError: as `pick_column`.
    """
    if section.label_columns is None:
        return [pick_column(section.label_column, LABEL_COLUMNS, columns, "label_column", where)]
    return [pick_column(name, (), columns, "label_columns", where) for name in section.label_columns]


def column_note(column: str, values: Collection[str], where: str, remedy: str) -> str:
    """Return the note on a column that names splits, and that nothing reads."""
    shown = first_few(quoted(list(values)))
    roles = {role for role in map(role_of, values) if role is not None}
    held = " and ".join(sorted(roles - {"train"}))
    treated = f"rows of {held} are treated like all others" if roles else "all rows are treated alike"
    return f"SPLITS IGNORED: {where}, column {column!r} is not used: it has the values {shown}, but {treated}. {remedy}"
