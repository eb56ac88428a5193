"""Write predictions to a file as they are made, and go on where such a file ends.

Promise: a file that was stopped, killed or cut anywhere ends, once it is resumed, in the very bytes of one that was
not. While it is unfinished a small file next to it, `FILE.unfinished`, says so, and of which model and columns it is.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from tlscale.errors import ResumeError, RunFolderError, one_line, option
from tlscale.storage.cache import is_no_folder
from tlscale.storage.files import flush, is_full, make_folder, write_json
from tlscale.training.prediction_rows import Answers, Columns, csv_cell, csv_line, json_line
from tlscale.training.predictions import readable

FORMAT = 1
Ends = Callable[[], Iterator[int]]
SUFFIXES = (".csv", ".jsonl", ".parquet")


@dataclass
class Resumed:
    """Tell what a file has already, and which images are left."""

    images: Iterator[str]
    num_rows: int = 0
    num_read: int = 0


class Sink(Protocol):
    """Take rows, in order."""

    @property
    def is_complete(self) -> bool:
        """Whether the file is there and nothing says that it is unfinished."""

    def begin(self) -> None:
        """Begin anew.

        Raises:
            RunFolderError: what is there would be lost.
        """

    def resume(self, images: Iterator[str]) -> Resumed:
        """Find where the file ends.

        Raises:
            ResumeError: it was begun with something else.
        """

    def write(self, paths: list[str], answers: Answers) -> None:
        """Add the rows of a chunk."""

    def keep(self) -> None:
        """Leave what there is to be resumed."""

    def end(self) -> None:
        """Call it complete."""


class Screen:
    """Write CSV to standard output."""

    is_complete = False

    def __init__(self, columns: Columns) -> None:
        self._columns = columns

    def begin(self) -> None:
        self._say(csv_line(self._columns.names))

    def resume(self, images: Iterator[str]) -> Resumed:
        raise AssertionError("standard output ends nowhere")

    def write(self, paths: list[str], answers: Answers) -> None:
        for row in self._columns.rows(paths, answers):
            self._say(csv_line(row))
        sys.stdout.flush()

    def _say(self, line: str) -> None:
        # A terminal obeys what a file only holds.
        sys.stdout.write(f"{one_line(line[:-1])}\n" if sys.stdout.isatty() else line)

    def keep(self) -> None:
        """Do nothing: it is said already."""

    end = keep


@dataclass(frozen=True)
class TextFormat:
    """Lay rows out as text."""

    header: str
    line: Callable[[list[Any]], str]
    start: Callable[[str], str]
    """How the line of an image begins, by its path."""
    good_end: str
    """How a line ends whose image has an answer."""
    known_by: str
    """How any file of ours begins."""
    quotes: bool
    """Whether a record may go over several lines, in quotes."""

    @classmethod
    def csv(cls, columns: Columns) -> TextFormat:
        return cls(csv_line(columns.names), csv_line, lambda path: f"{csv_cell(path)},", ",\n", "path,label", True)

    @classmethod
    def jsonl(cls, columns: Columns) -> TextFormat:
        names = columns.names

        def start(path: str) -> str:
            return f'{{"path": {json.dumps(path, ensure_ascii=False)}, '

        return cls("", lambda row: json_line(names, row), start, '"error": null}\n', '{"path": ', False)

    def records(self, file: BinaryIO) -> Iterator[bytes]:
        """Give the records that are whole."""
        held = b""
        for line in file:
            held += line
            if not held.endswith(b"\n") or (self.quotes and held.count(b'"') % 2):
                continue
            yield held
            held = b""


class TextFile:
    """Write CSV or JSON lines to a file."""

    def __init__(self, path: Path, form: TextFormat, columns: Columns, about: dict[str, Any], ends: Ends) -> None:
        """Open nothing yet.

        Args:
            about: what a file that is resumed must have been begun with.
            ends: gives the numbers of rows after which work can begin again.
        """
        self._path, self._form, self._columns, self._ends = path, form, columns, ends
        self._mark = Unfinished(path.with_name(f"{path.name}.unfinished"), about)
        self._file: BinaryIO | None = None

    @property
    def is_complete(self) -> bool:
        return self._path.exists() and not self._mark.exists and self._is_ours()

    def _is_ours(self) -> bool:
        if not self._path.is_file():  # to open a pipe waits for ever
            return False
        with self._path.open("rb") as file:
            return file.read(len(self._form.known_by)) in (b"", self._form.known_by.encode())

    def begin(self) -> None:
        self._mark.refuse_loss(self._path)
        make_folder_of(self._path)
        if self._path.exists() and not self._is_ours():
            raise not_ours(self._path)
        self._mark.put()
        self._file = self._path.open("wb")
        self._file.write(self._form.header.encode())

    def resume(self, images: Iterator[str]) -> Resumed:
        if not self._mark.exists:  # nothing was begun
            self.begin()
            return Resumed(images)
        self._mark.refuse_other(self._path)
        self._file = self._path.open("r+b" if self._path.exists() else "w+b")
        resumed, end = self._kept(self._file, images)
        self._file.seek(end)
        self._file.truncate()
        if end == 0:
            self._file.write(self._form.header.encode())
        return resumed

    def _kept(self, file: BinaryIO, images: Iterator[str]) -> tuple[Resumed, int]:
        """Return what stands, in whole chunks, and where in the file it ends."""
        header = self._form.header.encode()
        head = file.read(len(header))
        if not header.startswith(head):
            raise self._changed()
        if head != header:
            return Resumed(images), 0  # cut in its first line: the columns are those of the mark
        records = self._form.records(file)
        end = at = len(header)
        kept, again = Resumed(images), list[str]()
        num_read, ends = 0, self._ends()
        until = next(ends)
        for number, record in enumerate(records, 1):
            path = next(images, None)
            if path is None or not record.startswith(self._form.start(readable(path)).encode()):
                is_same = path is not None and readable(path) in record.decode(errors="replace")
                raise self._changed() if is_same else other_images(self._path, number, path)
            at, num_read = at + len(record), num_read + record.endswith(self._form.good_end.encode())
            again.append(path)
            if number == until:
                kept, again, end, until = Resumed(images, number, num_read), [], at, next(ends)
        kept.images = chain(again, images)
        return kept, end

    def _changed(self) -> ResumeError:
        remedy = f"Bring back what was written; or, to begin anew, remove '{self._mark.path}'"
        problem = f"'{self._path}' was changed by another program since, such as a spreadsheet that saved it"
        return ResumeError(problem, key=option("resume"), remedy=remedy)

    def write(self, paths: list[str], answers: Answers) -> None:
        assert self._file is not None
        rows = self._columns.rows([readable(path) for path in paths], answers)
        self._file.write("".join(map(self._form.line, rows)).encode())
        self._file.flush()

    def keep(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # a disk that is full has said so
                self._file.flush()
                os.fsync(self._file.fileno())
            with suppress(OSError):
                self._file.close()
            self._file = None

    def end(self) -> None:
        assert self._file is not None
        self._file.close()
        self._file = None
        flush(self._path)
        self._mark.remove()


@dataclass(frozen=True)
class Unfinished:
    """Mark a file as unfinished, and keep what it was begun with."""

    path: Path
    about: dict[str, Any]

    @property
    def exists(self) -> bool:
        return self.path.exists()

    def put(self) -> None:
        write_json(self.path, {"format": FORMAT, **self.about})

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        flush(self.path.parent)

    def refuse_loss(self, file: Path) -> None:
        """Refuse to begin anew what can be resumed.

        Raises:
            RunFolderError: the file is unfinished.
        """
        if self.exists:
            remedy = f"Resume it; or, to begin anew, remove '{self.path}'"
            raise RunFolderError(f"'{file}' is unfinished", key=option("out"), remedy=remedy)

    def refuse_other(self, file: Path) -> None:
        """Refuse to go on with another model or other columns.

        Raises:
            ResumeError: the file was begun with such.
        """
        try:
            then = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            then = {}
        now = {"format": FORMAT, **self.about}
        names = [name.replace("_", " ") for name in now if not isinstance(then, dict) or then.get(name) != now[name]]
        if names:
            remedy = f"Give what it was begun with; or, to begin anew, remove '{self.path}'"
            problem = f"'{file}' cannot be resumed: it was begun with another {', another '.join(names)}"
            raise ResumeError(problem, key=option("resume"), remedy=remedy)


def other_images(file: Path, number: int, path: str | None) -> ResumeError:
    """Make the error of a file that was begun with other images."""
    now = f"image {number:,} is now '{one_line(path)}'" if path is not None else f"there are now {number - 1:,} images"
    remedy = "Give the images that it was begun with, in the same order"
    return ResumeError(f"'{file}' was begun with other images: {now}", key=option("resume"), remedy=remedy)


def make_folder_of(file: Path) -> None:
    """Make the folder of a file, where it is not there yet.

    Raises:
        RunFolderError: it cannot be made.
    """
    try:
        make_folder(file.parent)
    except OSError as error:
        if is_full(error):
            raise
        why = "a file is in the way" if is_no_folder(error) else error.strerror or str(error)
        problem = f"the folder '{file.parent}' cannot be made: {why}"
        raise RunFolderError(problem, key=option("out"), remedy="Name a file in another folder") from error


def not_ours(file: Path) -> RunFolderError:
    """Make the error of a file that predictions would overwrite."""
    return RunFolderError(f"'{file}' does not hold predictions, so it is not replaced", key=option("out"))
