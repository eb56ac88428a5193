"""Write predictions as Parquet: part after part to `FILE.parts/`, which are put together at the end.

Promise: as that of `prediction_files`; the file is complete, or not there. Only this module of those that predict
writes Parquet, and it is imported where Parquet is asked for.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tlscale.errors import ResumeError, first_line, option
from tlscale.storage.files import flush, make_folder, replacing
from tlscale.storage.run_folder import refuse_not_utf8
from tlscale.training.prediction_files import (
    FORMAT,
    Ends,
    Resumed,
    Unfinished,
    make_folder_of,
    not_ours,
    other_images,
)
from tlscale.training.prediction_rows import Answers, Cell, Columns
from tlscale.training.predictions import readable

_PART_ROWS = 65_536  # most that are lost when the process is killed
_PART_S = 60.0  # likewise
_GROUP_ROWS = 65_536  # of the file, whatever the parts were


class ParquetFile:
    """Write Parquet."""

    def __init__(self, path: Path, columns: Columns, about: dict[str, Any], ends: Ends) -> None:
        """As `TextFile`."""
        self._path, self._columns, self._ends = path, columns, ends
        self._folder = path.with_name(f"{path.name}.parts")
        self._mark = Unfinished(self._folder / "about.json", about)
        self._held: list[list[Cell]] = []
        self._num_written = 0
        self._wrote_s = time.monotonic()

    @property
    def is_complete(self) -> bool:
        return self._path.exists() and not self._mark.exists and self._is_ours()

    def begin(self) -> None:
        refuse_not_utf8(self._path)
        self._mark.refuse_loss(self._path)
        if self._path.exists() and not self._is_ours():
            raise not_ours(self._path)
        for part in self._parts():
            part.unlink()
        make_folder_of(self._path)
        make_folder(self._folder)
        self._mark.put()

    def _is_ours(self) -> bool:
        if not self._path.is_file():  # to open a pipe waits for ever
            return False
        try:
            return bool(pq.read_schema(self._path).names[:3] == self._columns.names[:3])
        except (pa.ArrowException, OSError):
            return False

    def _parts(self) -> list[Path]:
        return sorted(self._folder.glob("rows-*.parquet"))

    def resume(self, images: Iterator[str]) -> Resumed:
        if not self._mark.exists:
            self.begin()
            return Resumed(images)
        self._mark.refuse_other(self._path)
        num_read, ends = 0, self._ends()
        for part in self._parts():
            table = self._checked(part)
            after = self._num_written + len(table)
            if next(end for end in ends if end >= after) != after:  # the end of all images: asked for once more
                part.unlink()
                break
            self._compare(table["path"].to_pylist(), images)
            num_read += table["error"].null_count
            self._num_written += len(table)
        return Resumed(images, self._num_written, num_read)

    def _checked(self, part: Path) -> pa.Table:
        try:
            table = pq.read_table(part, columns=["path", "error"])
        except (pa.ArrowException, OSError) as error:
            raise self._lost(part, first_line(error)) from error
        if part != self._part(self._num_written):
            raise self._lost(part, f"rows before it are missing, from {self._num_written:,} on")
        return table

    def _lost(self, part: Path, why: str) -> ResumeError:
        remedy = f"Bring it back; or, to begin anew, remove '{self._folder}'"
        return ResumeError(f"'{part}' cannot be used: {why}", key=option("resume"), remedy=remedy)

    def _compare(self, paths: Iterable[str], images: Iterator[str]) -> None:
        for number, then in enumerate(paths, self._num_written + 1):
            now = next(images, None)
            if now is None or readable(now) != then:
                raise other_images(self._path, number, now)

    def _part(self, first_row: int) -> Path:
        return self._folder / f"rows-{first_row:012}.parquet"

    def write(self, paths: list[str], answers: Answers) -> None:
        self._held += self._columns.rows([readable(path) for path in paths], answers)
        if len(self._held) >= _PART_ROWS or time.monotonic() - self._wrote_s >= _PART_S:
            self._write_part()

    def _write_part(self) -> None:
        columns = [
            pa.array(cells, kind) for cells, kind in zip(zip(*self._held, strict=True), self._schema.types, strict=True)
        ]
        with replacing(self._part(self._num_written)) as aside:
            pq.write_table(pa.table(columns, schema=self._schema), aside, compression="zstd")
        self._num_written += len(self._held)
        self._held, self._wrote_s = [], time.monotonic()

    @property
    def _schema(self) -> pa.Schema:
        kinds = [_kind(name) for name in self._columns.names]
        about = {"format": FORMAT, "classes": list(self._columns.classes)}
        fields = [pa.field(name, kind) for name, kind in zip(self._columns.names, kinds, strict=True)]
        return pa.schema(fields, {"tlscale": json.dumps(about, ensure_ascii=False)})

    def keep(self) -> None:
        if self._held:
            self._write_part()

    def end(self) -> None:
        self.keep()
        with replacing(self._path) as aside, pq.ParquetWriter(aside, self._schema, compression="zstd") as writer:
            for group in self._groups():
                writer.write_table(group, row_group_size=_GROUP_ROWS)
        self._mark.remove()  # first: the file is complete, whatever becomes of its parts
        shutil.rmtree(self._folder)
        flush(self._path.parent)

    def _groups(self) -> Iterator[pa.Table]:
        """Give all rows, the same number at a time, so that the file does not tell where it was stopped."""
        held = self._schema.empty_table()
        for part in self._parts():
            held = pa.concat_tables([held, pq.read_table(part)])
            while len(held) >= _GROUP_ROWS:
                yield held.slice(0, _GROUP_ROWS).combine_chunks()
                held = held.slice(_GROUP_ROWS)
        if len(held):
            yield held.combine_chunks()


def _kind(name: str) -> pa.DataType:
    if name == "unknown":
        return pa.bool_()
    return pa.string() if _is_text(name) else pa.float64()


def _is_text(name: str) -> bool:
    is_next = name.startswith("label_") and name[6:].isdecimal()
    return name in ("path", "set", "error", "label", "labels") or is_next
