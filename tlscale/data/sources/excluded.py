"""Read which files of a data set are left out, and why: a CSV file with the columns `path` and `reason`.

Promise: what is left out stands in a file that the recipe names, never only on a screen; `tlscale new` writes it, and a
person can.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from tlscale.errors import DataError, first_few, one_line, quoted
from tlscale.recipe.schema import DataSection
from tlscale.storage.files import make_folder, refuse_endless_file, replacing

COLUMNS = ("path", "reason")
FORMULAS = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")  # the last four are those of wide scripts
"""What a cell begins with that a spreadsheet would run."""
_MOST_BYTES = 1 << 30


def excluded_paths(section: DataSection, root: Path, *, anywhere: bool = False) -> frozenset[str]:
    """Return the files and folders that the table of `data.exclude` names, as `whole_path`; none without such a table.

    Args:
        section: of the data.
        root: the folder that they are below.
        anywhere: they may be elsewhere, too, as a table of images may name them.

    Raises:
        DataError: no such table, no column `path`, or a path that is absolute or leads out of the data.
    """
    if section.exclude is None:
        return frozenset()
    rows = read_excluded(Path(section.exclude).expanduser())
    shortest = [PurePosixPath(os.path.normpath(path)) for path, _ in rows]
    outside = [str(path) for path in shortest if path.is_absolute() or path.parts[:1] in ((), ("..",))]
    if outside and not anywhere:
        problem = f"{one_line(section.exclude)}: not below the data: {first_few(quoted(outside))}"
        raise DataError(problem, key="data.exclude", remedy="Write paths as they are below the folder of the data")
    return frozenset(whole_path(root, str(path)) for path in shortest)


def read_excluded(place: Path) -> list[tuple[str, str]]:
    """Read the rows `(path, reason)` of a table; an empty path is none.

    Raises:
        DataError: no such table, or no column `path`.
    """
    try:
        refuse_endless_file(place, _MOST_BYTES)
        with place.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file, _any_length():
            rows = csv.DictReader(file)
            if COLUMNS[0] not in (rows.fieldnames or ()):
                remedy = "Write path,reason into the first line, and a file into each of the others"
                raise DataError(f"{one_line(place)} has no column 'path'", key="data.exclude", remedy=remedy)
            return [(row["path"], row.get("reason") or "") for row in rows if row["path"]]
    except (OSError, ValueError, csv.Error) as error:
        why = getattr(error, "strerror", None) or error
        remedy = "Name a table with the columns path,reason, or take the key out"
        raise DataError(f"{one_line(place)} cannot be read: {why}", key="data.exclude", remedy=remedy) from None


@contextmanager
def _any_length() -> Iterator[None]:
    """Let the process's reader of CSV take cells of any length within the context: a table of images may hold them."""
    before = csv.field_size_limit(_MOST_BYTES)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def path_below(file: Path, place: str) -> str:
    """Return a path as `data.exclude` names it: below the data at `place`, a folder or a table, if it is there."""
    root = place if os.path.isdir(place) else os.path.dirname(os.path.abspath(place))
    whole = os.path.abspath(file)
    below = os.path.relpath(whole, os.path.abspath(root))
    return whole if below.split(os.sep)[0] == os.pardir else below


def whole_path(root: Path, path: str) -> str:
    """Return a path in the one spelling by which what is left out is known, whether it begins at `root` or at `/`."""
    return os.path.normpath(os.path.join(os.path.abspath(root), path))


def write_excluded(place: Path, rows: Iterable[tuple[str, str]]) -> None:
    """Write a table of `(path, reason)`, sorted by path, or remove it where there is nothing to leave out."""
    lines = sorted(rows)
    if not lines:
        place.unlink(missing_ok=True)
        return
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\r\n")  # a name may hold either, and both are put in quotes then
    table.writerow(COLUMNS)
    table.writerows((_no_formula(path), one_line(reason)) for path, reason in lines)
    make_folder(place.parent)
    with replacing(place) as aside:
        aside.write_bytes(text.getvalue().encode("utf-8", "surrogateescape"))


def _no_formula(path: str) -> str:
    """Return the same path such that no spreadsheet runs it."""
    return f"./{path}" if path.startswith(FORMULAS) else path
