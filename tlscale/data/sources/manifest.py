"""Read a table of images and labels: CSV (`.csv`, or `.tsv` with tabs) or Parquet, with or without a column `split`.

Promise: the table stays in Arrow, and a file that the table names and that is not there is found before anything else
happens, for all splits at once.

Paths are relative to the folder of the manifest and stay inside it; an absolute path is taken as it is. Parquet may
hold the images themselves, as binary or as the struct {bytes, path} of the Hugging Face hub; those are kept in memory,
so there is a limit (`source: hub` with the folder as `path` maps larger tables from disk).

Shape letters: N rows.
"""

from __future__ import annotations

import itertools
import os
import stat
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from tlscale.data.content import digest_of_parts, file_stamp
from tlscale.data.sources.columns import column_note, pick_column, pick_label_columns
from tlscale.data.sources.excluded import excluded_paths, whole_path
from tlscale.data.sources.groups import groups_of_column, refuse_wrong_columns
from tlscale.data.sources.label_sets import encode_label_sets, sets_of_columns, sets_of_text
from tlscale.data.sources.labels import encode_labels, is_text
from tlscale.data.sources.paths import local_path
from tlscale.data.sources.same_files import number_files
from tlscale.data.sources.split_names import (
    SPLIT_COLUMN,
    ScoredSection,
    may_name_splits,
    pick_splits,
    split_values,
)
from tlscale.data.sources.stores import BytesStore, FileStore
from tlscale.data.sources.tables import RawStore, Role, Source, SourceSplit
from tlscale.distributed.signals import check_stop
from tlscale.errors import DataError, first_few, kind_of_file, quoted, suggestion
from tlscale.recipe.schema import DataSection
from tlscale.tracking.console import visible
from tlscale.tracking.progress import Pace

Stats = npt.NDArray[np.int64]
IMAGE_COLUMNS = ("image", "img", "path", "file", "filename", "file_name", "filepath", "file_path", "image_path")
TABLE_ENDINGS = (".csv", ".tsv", ".parquet", ".pq")
MOST_EMBEDDED_BYTES = 2 << 30
FIRST_ROWS = 1024


def is_manifest_source(data: str) -> bool:
    """Return whether `data` is a file with the ending of a table."""
    place = Path(data).expanduser()
    return place.is_file() and place.suffix.lower() in TABLE_ENDINGS


def read_manifest_source(section: DataSection) -> Source:
    """Read all splits of a manifest.

    Raises:
        DataError: not readable, columns missing, unknown splits, rows without a label, files that are not there.
    """
    file = local_path(section)
    if not file.is_file():
        hint = "; for a folder of Parquet files use source 'hub' with the folder as 'path'" if file.is_dir() else ""
        raise DataError(f"{file} {'is not a file' if file.exists() else 'does not exist'}{hint}", key="data.path")
    table, notes = read_table(section, file)
    image, label = table.column_names[:2]
    num_rows = len(table)
    table = _without_excluded(section, table, image)
    if len(table) == 0:
        why = f": data.exclude leaves out all of its {num_rows:,}" if num_rows else ""
        raise DataError(f"{file} has no rows{why}")
    rows = _rows_of_splits(section, file, table)
    column = _image_column(table[image], f"{file}, column {image!r}")
    looked_ns, stats_N5 = time.time_ns(), _stats(file, column)
    content = _content(file, column, stats_N5)
    numbers = None if stats_N5 is None else number_files([stats_N5])
    group = section.group_column
    groups = None if group is None else groups_of_column(table[group], f"{file}, column {group!r}")
    splits: dict[Role, SourceSplit] = {}
    store: RawStore
    encode = encode_labels if section.task != "multi_label" else encode_label_sets
    for role, (name, rows_N) in rows.items():
        names, label_ids_N = encode(table[label].take(rows_N), f"{file}, column {label!r}, split {name!r}")
        if stats_N5 is None:
            store = BytesStore(file.name, column, rows_N, content)
        else:
            paths_N = column.take(rows_N).combine_chunks()
            store = FileStore(str(file.parent), paths_N, content, stats_N5[rows_N], looked_ns)
        files_N = None if numbers is None else numbers[0][rows_N]
        splits[role] = SourceSplit(
            name, store, names, label_ids_N, files_N, None if groups is None else groups.take(rows_N)
        )
    declared = None if section.label_columns is None else tuple(section.label_columns)
    return Source(str(file), splits, declared, notes=notes)


def read_table(section: DataSection, file: Path) -> tuple[pa.Table, tuple[str, ...]]:
    """Read the columns image, label, split (where there is one), group (where named), in this order; and notes.

    Several labels an image are lists, however the table has them.
    """
    read = {".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet, ".pq": _read_parquet}
    if file.suffix.lower() in read:
        try:
            table, notes = read[file.suffix.lower()](section, file)
            table.validate(full=True)  # that text is UTF-8, which Parquet does not promise
            table = _with_label_sets(section, table, file)
        except (pa.ArrowException, OSError, UnicodeError) as error:
            raise DataError(f"{file}: cannot be read as a table: {error}") from None
        return table, notes
    raise DataError(f"{file} has no ending of a table; a manifest ends in {', '.join(TABLE_ENDINGS)}", key="data.path")


def _with_label_sets(section: DataSection, table: pa.Table, file: Path) -> pa.Table:
    """Put lists of labels in place of text with a separator, or of columns of 0 and 1."""
    if section.label_columns is not None:
        columns = section.label_columns
        sets_N = sets_of_columns(table, columns, str(file))
        return table.drop_columns(columns).add_column(1, first_few(columns, 3), sets_N)
    if section.label_separator is not None:
        name, must_occur = table.column_names[1], not isinstance(section, ScoredSection)
        where = f"{file}, column {name!r}"
        sets_N = sets_of_text(table[name], section.label_separator, where, must_occur=must_occur)
        return table.set_column(1, name, sets_N)
    return table


def _without_excluded(section: DataSection, table: pa.Table, image: str) -> pa.Table:
    """Leave out the rows of files that `data.exclude` names."""
    root = local_path(section).parent
    left_out = excluded_paths(section, root, anywhere=True)
    if not left_out:
        return table
    if not is_text(table[image].type):
        remedy = "Leave rows out of the table itself, or write data.on_bad_image: skip for those that cannot be read"
        raise DataError("names files, but the table holds the images themselves", key="data.exclude", remedy=remedy)
    kept = [path is None or whole_path(root, path) not in left_out for path in table[image].to_pylist()]
    return table.filter(pa.array(kept))


def refuse_equal_names(columns: list[str], file: Path) -> None:
    """Refuse a table with columns of the same name.

    Raises:
        DataError: no telling which of them is meant.
    """
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise DataError(
            f"{file} has columns of the same name: {first_few(quoted(twice))}", remedy="Give each a name of its own"
        )


def _columns(section: DataSection, columns: list[str], file: Path) -> list[str]:
    refuse_equal_names(columns, file)
    image = pick_column(section.image_column, IMAGE_COLUMNS, columns, "image_column", str(file))
    labels = pick_label_columns(section, columns, str(file))
    if image in labels:
        raise DataError(f"{file}: column {image!r} cannot be of both the images and the labels")
    split = _split_column([name for name in columns if name not in (image, *labels)], file)
    if section.group_column is None:
        return [image, *labels, *split]
    group = pick_column(section.group_column, (), columns, "group_column", str(file))
    others = {image: "images", **dict.fromkeys(labels, "labels"), **dict.fromkeys(split, "splits")}
    refuse_wrong_columns(group, others, str(file))
    return [image, *labels, *split, group]


def _split_column(columns: list[str], file: Path) -> list[str]:
    """Return the column of the splits, if there is one: 'split' before other spellings of it."""
    found = [name for name in columns if name.strip().lower() == SPLIT_COLUMN]
    found = [SPLIT_COLUMN] if SPLIT_COLUMN in found else found
    if len(found) > 1:
        raise DataError(
            f"{file}: columns {first_few(quoted(found))} may all name the split", remedy=f"Call one {SPLIT_COLUMN!r}"
        )
    return found


def _notes(unread: pa.Table, file: Path) -> tuple[str, ...]:
    """Return notes on columns that name splits and are not read."""
    remedy = f"Call the column {SPLIT_COLUMN!r}, and its values train, validation and test, to have it read"
    notes = []
    for name in unread.column_names:
        values = split_values(name, pc.unique(unread[name].cast(pa.large_string())).to_pylist())
        if values:
            notes.append(column_note(name, values, str(file), remedy))
    return tuple(notes)


def _read_csv(section: DataSection, file: Path) -> tuple[pa.Table, tuple[str, ...]]:
    parse = pyarrow.csv.ParseOptions(delimiter="\t" if file.suffix.lower() == ".tsv" else ",")
    with pyarrow.csv.open_csv(file, parse_options=parse) as reader:
        columns = _columns(section, reader.schema.names, file)
        others = [name for name in _may_name_splits(reader) if name not in columns]
    # All as text: label 007 is not label 7, and a file may be called 1.
    names = [*columns, *others]
    convert = pyarrow.csv.ConvertOptions(
        column_types={name: pa.string() for name in names}, include_columns=names, strings_can_be_null=False
    )
    table = pyarrow.csv.read_csv(file, parse_options=parse, convert_options=convert)
    return table.select(columns), _notes(table.select(others), file)


def _may_name_splits(batches: Iterable[pa.RecordBatch]) -> list[str]:
    """Return the columns whose first values may name splits."""
    first = next(iter(batches), None)
    if first is None:
        return []
    few = {field.name: first[field.name] for field in first.schema if _is_short(field)}
    distinct = {name: pc.unique(column.cast(pa.large_string())).to_pylist() for name, column in few.items()}
    return [name for name, values in distinct.items() if may_name_splits(name, values)]


def _is_short(field: pa.Field) -> bool:
    return is_text(field.type) or pa.types.is_boolean(field.type) or pa.types.is_integer(field.type)


def _read_parquet(section: DataSection, file: Path) -> tuple[pa.Table, tuple[str, ...]]:
    with pq.ParquetFile(file) as parquet:
        columns = _columns(section, parquet.schema_arrow.names, file)
        meta = parquet.metadata
        groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
        size = sum(
            group.column(j).total_uncompressed_size
            for group in groups
            for j in range(group.num_columns)
            if group.column(j).path_in_schema.split(".")[0] in columns
        )
        if size > MOST_EMBEDDED_BYTES:
            raise DataError(
                f"{file}: {size / 2**30:.1f} GiB of images in the table, more than the {MOST_EMBEDDED_BYTES >> 30} GiB "
                f"that are kept in memory; 'source: hub' with 'path: {file.parent}' maps them from disk"
            )
        few = [field.name for field in parquet.schema_arrow if _is_short(field) and field.name not in columns]
        others = _may_name_splits(parquet.iter_batches(FIRST_ROWS, columns=few)) if few else []
        return parquet.read(columns=columns).select(columns), _notes(parquet.read(columns=others), file)


def _rows_of_splits(section: DataSection, file: Path, table: pa.Table) -> dict[Role, tuple[str, npt.NDArray[np.int64]]]:
    if table.num_columns == (2 if section.group_column is None else 3):
        picked = pick_splits(section, [section.train_split], f"{file} (it has no column {SPLIT_COLUMN!r})")
        return {"train": (picked["train"], np.arange(len(table), dtype=np.int64))}
    column = table.column_names[2]
    names_N = table[column].cast(pa.large_string()).combine_chunks()
    available = sorted(pc.unique(names_N).drop_null().to_pylist())
    picked = pick_splits(section, available, f"{file}, column {column!r},")
    strange = [name for name in available if name not in picked.values()]
    if strange or names_N.null_count:
        shown = first_few([*quoted(strange), *(["empty"] if names_N.null_count else [])])
        known = [section.train_split, section.validation_split or "validation", section.test_split]
        raise DataError(
            f"{file}, column {column!r}: unknown split {shown}; the splits are {', '.join(known)} "
            "(data.train_split, data.validation_split, data.test_split)",
            remedy=(suggestion(strange[0], known) if strange else "") or None,
        )
    found = ((role, name, pc.indices_nonzero(pc.equal(names_N, name)).to_numpy()) for role, name in picked.items())
    return {role: (name, rows_N.astype(np.int64)) for role, name, rows_N in found}


def _image_column(column: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    """Return the column as binary (the images) or large_string (their paths)."""
    kind = column.type
    if pa.types.is_struct(kind) and {field.name for field in kind} >= {"bytes", "path"}:
        raw, path = pc.struct_field(column, "bytes"), pc.struct_field(column, "path")
        column, kind = (path, path.type) if raw.null_count == len(raw) else (raw, raw.type)
    if column.null_count:
        raise DataError(f"{where}: {column.null_count:,} of {len(column):,} rows have no image")
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return column
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return column.cast(pa.large_string())
    raise DataError(f"{where}: of type {kind}; expected paths (text), images (binary) or a struct {{bytes, path}}")


def _content(file: Path, column: pa.ChunkedArray, stats_N5: Stats | None) -> str:
    if stats_N5 is None:
        with file.open("rb") as stream:
            return digest_of_parts(iter(lambda: stream.read(1 << 20), b""))
    return digest_of_parts(itertools.chain(_paths(column), [stats_N5[:, 2:4].astype("<i8").tobytes()]))


def _stats(file: Path, column: pa.ChunkedArray) -> Stats | None:
    """Return the `file_stamp` of all files, None where the images are in the table; raise on missing ones."""
    if not pa.types.is_large_string(column.type):
        return None
    root = str(file.parent)
    missing: list[str] = []
    strange: list[str] = []
    stats_N5 = np.zeros((len(column), 5), dtype=np.int64)
    pace = Pace(len(column), f"scanning the images of {visible(file.name)}")
    for row, path in enumerate(_paths(column)):
        check_stop("scanning files")
        pace.add(1)
        _check_inside(file, row, path)
        try:
            found = os.stat(os.path.join(root, path))
        except (OSError, ValueError):
            missing.append(path)
            continue
        if not stat.S_ISREG(found.st_mode):
            strange.append(f"{path!r} is {kind_of_file(found.st_mode)}")
        stats_N5[row] = file_stamp(found)
    if missing:
        raise DataError(
            f"{file}: {len(missing):,} of {len(column):,} files are not there: {first_few(quoted(missing))}; "
            f"paths are relative to {root}"
        )
    if strange:
        raise DataError(f"{file}: {len(strange):,} of {len(column):,} are no regular files: {first_few(strange)}")
    return stats_N5


def _paths(column: pa.ChunkedArray) -> Iterable[str]:
    for chunk in column.chunks:
        for start in range(0, len(chunk), 65536):
            yield from chunk.slice(start, 65536).to_pylist()


def _check_inside(file: Path, row: int, path: str) -> None:
    if "://" in path:
        raise DataError(f"{file} row {row}: {path!r} is an address; a manifest names files")
    if not path.strip():
        raise DataError(f"{file} row {row}: the path is empty")
    if not os.path.isabs(path) and os.path.normpath(path).split(os.sep)[0] == "..":
        raise DataError(
            f"{file} row {row}: {path!r} leaves the manifest's folder {file.parent}",
            remedy="Give an absolute path if that is meant",
        )
