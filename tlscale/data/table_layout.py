"""Find out how a table of images is laid out: the columns of images and labels, and the rows that are of no use.

Promise: no image is opened, and a column that cannot be told is an error, never a guess among several.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from tlscale.data.formats.unread import Reason
from tlscale.data.sources.columns import LABEL_COLUMNS
from tlscale.data.sources.folder import is_image_name
from tlscale.data.sources.label_kinds import separator_of
from tlscale.data.sources.label_sets import is_list
from tlscale.data.sources.labels import is_text
from tlscale.data.sources.manifest import FIRST_ROWS, IMAGE_COLUMNS, read_table, refuse_equal_names
from tlscale.data.sources.paths import local_path
from tlscale.data.sources.split_names import SPLIT_COLUMN, Role, role_of, split_keys
from tlscale.distributed.signals import check_stop
from tlscale.errors import DataError, first_few, irregular_mode, one_line, quoted
from tlscale.recipe.schema import DataSection


def guess_columns(file: Path) -> dict[str, Any]:
    """Return `image_column` and `label_column` of a table where their names are not usual ones.

    The images' is the first column that names files which are there; the labels' the only one that is left. Where
    several are left, those that hold 0 and 1 alone are a label each: `label_columns`.

    Raises:
        DataError: the table cannot be read, or its columns cannot be told.
    """
    try:
        table = _head(file)
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise DataError(f"{file}: cannot be read as a table: {error}") from None
    columns = table.column_names
    refuse_equal_names(columns, file)
    if any(_is_file(file, name) for name in columns):
        problem = f"{file}: its first line names an image, and no columns"
        raise DataError(problem, remedy="Write path,label above it, or what the columns are called")
    usual = {
        key: [name for name in columns if name.strip().lower() in names]
        for key, names in (("image", IMAGE_COLUMNS), ("label", LABEL_COLUMNS))
    }
    images = usual["image"] or [name for name in columns if _names_files(file, table[name])][:1]
    others = [name for name in columns if name not in images and name.strip().lower() != SPLIT_COLUMN]
    labels = usual["label"] or (others if len(others) == 1 else [])
    flags = [name for name in others if _is_flag(table[name])]
    if len(images) == 1 and not labels and len(flags) > 1:
        picked = {} if images == usual["image"] else {"image_column": images[0]}
        return {**picked, "task": "multi_label", "label_columns": flags}
    for what, found in (("image", images), ("label", labels)):
        if len(found) != 1:
            raise DataError(
                f"{file}: no telling which column holds the {what}s; the columns are {first_few(quoted(columns), 20)}",
                remedy=f"Call that column {what!r}, and no other one",
            )
    return {
        f"{what}_column": found[0] for what, found in (("image", images), ("label", labels)) if found != usual[what]
    }


def _is_flag(column: pa.ChunkedArray) -> bool:
    """Return whether a column holds 0 and 1, each of them."""
    if not (is_text(column.type) or pa.types.is_integer(column.type) or pa.types.is_boolean(column.type)):
        return False
    return set(pc.unique(column.cast(pa.string())).to_pylist()) in ({"0", "1"}, {"false", "true"})


def guess_task(section: DataSection) -> dict[str, str]:
    """Return the keys of `data` for a column that holds several labels an image; none where it holds one."""
    if section.task is not None:
        return {}
    table, _ = read_table(section, local_path(section))
    labels = table[table.column_names[1]]
    if is_list(labels.type):
        return {"task": "multi_label"}
    if not is_text(labels.type):
        return {}
    counts = {one["values"]: one["counts"] for one in pc.value_counts(labels).to_pylist() if one["values"]}
    separator = separator_of(counts)
    return {} if separator is None else {"task": "multi_label", "label_separator": separator}


def column_names(file: Path) -> list[str]:
    """Return the columns of a table that was read before."""
    return list(_head(file).column_names)


def name_splits(section: DataSection) -> dict[str, str]:
    """Return the keys of `data` for the splits of a table, however they are spelt: 'Train', 'VAL'.

    Raises:
        DataError: two values of the column may be the same split, or there is nothing to train on.
    """
    file = local_path(section)
    table, _ = read_table(section, file)
    if table.num_columns == 2:
        return {}
    column = table.column_names[2]
    names = sorted(pc.unique(table[column].cast(pa.large_string())).drop_null().to_pylist())
    by_role: dict[Role, str] = {}
    for name in names:
        role = role_of(name)
        if role in by_role:
            problem = f"{file}, column {column!r}: {by_role[role]!r} and {name!r} may both be the {role} split"
            raise DataError(problem, remedy="Write them alike")
        if role is not None:
            by_role[role] = name
    if by_role and "train" not in by_role:
        problem = f"{file}, column {column!r}: nothing to train on, as it holds {first_few(quoted(names))} alone"
        raise DataError(problem, remedy="Write 'train' into the rows of images to train on")
    return split_keys(by_role)


def _head(file: Path) -> pa.Table:
    if file.suffix.lower() in (".parquet", ".pq"):
        with pq.ParquetFile(file) as parquet:
            return pa.Table.from_batches(itertools.islice(parquet.iter_batches(FIRST_ROWS), 1), parquet.schema_arrow)
    parse = pyarrow.csv.ParseOptions(delimiter="\t" if file.suffix.lower() == ".tsv" else ",")
    with pyarrow.csv.open_csv(file, parse_options=parse) as reader:
        names = reader.schema.names
        convert = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()))
    with pyarrow.csv.open_csv(file, parse_options=parse, convert_options=convert) as reader:
        return pa.Table.from_batches(itertools.islice(reader, 1), reader.schema)


def _names_files(file: Path, column: pa.ChunkedArray) -> bool:
    """Return whether the first text of a column is the name of a file."""
    if not is_text(column.type):
        return False
    first = next((text for text in column.to_pylist() if text and text.strip()), None)
    return first is not None and _is_file(file, first)


def _is_file(file: Path, name: str) -> bool:
    return bool(name.strip()) and "\0" not in name and is_image_name(name) and (file.parent / name).is_file()


def rows_to_leave_out(section: DataSection) -> dict[str, Reason]:
    """Return the paths in a table that no run could use, with the reason: no such file, no regular file, no label."""
    file = local_path(section)
    table, _ = read_table(section, file)
    image, label = table.column_names[:2]
    if not is_text(table[image].type):
        return {}
    left_out: dict[str, Reason] = {}
    has_sets = section.task == "multi_label"  # where none is a label set, too
    labels = ["-"] * len(table) if has_sets else table[label].cast(pa.large_string()).to_pylist()
    for row, (path, text) in enumerate(zip(table[image].to_pylist(), labels, strict=True)):
        check_stop("scanning files")
        if path is None or not path.strip():
            raise DataError(f"{file} row {row}: the path is empty", remedy="Take the row out")
        problem = _problem_of_file(file.parent / path) if "\0" not in path else "no name of a file"
        if problem is None and not (text or "").strip():
            problem = "it has no label"
        if problem is not None:
            left_out[path] = Reason(problem)
    if left_out and len(left_out) == len(pc.unique(table[image])):
        path, problem = next(iter(left_out.items()))
        remedy = f"Paths are relative to '{one_line(file.parent)}', with / between folders, and each row has a label"
        raise DataError(f"{file}: none of its images is of use; the first: {path}: {problem}", remedy=remedy)
    return left_out


def _problem_of_file(path: Path) -> str | None:
    try:
        return irregular_mode(path.stat().st_mode)
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"
