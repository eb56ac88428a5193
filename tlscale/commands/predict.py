"""`tlscale predict`: a label and a probability for each image that somebody gives.

Promise: one row an image, in the order given, whatever the number of processes and however often the work was stopped.
An image that cannot be read is a row with the reason. Images and rows pass through, so that memory does not grow.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import BinaryIO

from tlscale.data.given import find_images, lines_of
from tlscale.data.sources.folds import ABOUT_FOLDS, FOLDS
from tlscale.distributed.processes import Processes
from tlscale.distributed.signals import StopRequest
from tlscale.errors import DataError, Stopped, first_few, flag, option, speaks_python
from tlscale.models.model_folder import CONFIG_FILE
from tlscale.storage.files import file_sha256, reporting_disk_errors
from tlscale.tracking.console import Console, visible
from tlscale.tracking.progress import Pace
from tlscale.training.batching import Batching
from tlscale.training.image_classifier import (
    ImageClassifier,
    Images,
    Predictions,
    checked_columns,
    load,
    refuse_none_read,
)
from tlscale.training.prediction_files import SUFFIXES, Screen, Sink, TextFile, TextFormat
from tlscale.training.prediction_rows import Answers, Columns, answer
from tlscale.training.run_path import RunPath, computing

_SAY_EVERY_S = 10.0  # where there is no terminal
_LONG_CHUNK = 1024  # images; a shorter one is finished when a signal comes


@speaks_python
def predict(
    run: str | os.PathLike[str],
    images: Images,
    out: str | os.PathLike[str] | None = None,
    *,
    top_k: int = 1,
    all_probabilities: bool = False,
    resume: bool = False,
) -> Predictions | Path:
    """Classify images by the model of a run.

    Args:
        run: its folder.
        images: as `ImageClassifier.predict` takes them; with `out` paths, folders and globs alone.
        out: a file for the rows, .csv, .jsonl or .parquet: for more images than memory holds answers of.
        top_k: so many labels a row of the file.
        all_probabilities: a column a class in the file.
        resume: go on where the file ends.

    Returns:
        Predictions; with `out` the path of the file.

    Raises:
        TlscaleError: no such run, nothing found, or not one image can be read; with `out` also `Stopped`.
    """
    if out is None:
        _refuse_idle(top_k=top_k != 1, all_probabilities=all_probabilities, resume=resume)
        return load(run).predict(images)
    places = [images] if isinstance(images, str | os.PathLike) else images
    if not isinstance(places, Iterable) or not all(isinstance(place, str | os.PathLike) for place in places):
        raise DataError("with a file for the rows, images are paths", key="images", remedy="Give paths, or no file")
    wanted = _Wanted(top_k, all_probabilities, resume=resume)
    write_rows(run, [os.fspath(place) for place in places], Path(out), wanted)  # type: ignore[arg-type]
    return Path(out)


def _refuse_idle(**given: bool) -> None:
    """Refuse arguments that choose what a file holds, where none is written."""
    for name, is_given in given.items():
        if is_given:
            remedy = "Name a file (out)" + ("" if name == "resume" else ", or give it to to_csv or to_pandas")
            raise DataError("it is of a file, and none is written", key=name, remedy=remedy)


@dataclass(frozen=True)
class _Wanted:
    """Hold the options."""

    top_k: int = 1
    all_probabilities: bool = False
    resume: bool = False


def predict_for_people(
    run: str, places: Sequence[str], out: str | None, images_from: str | None, **wanted: int | bool
) -> None:
    """Do what the command line says: `-` among the places stands for paths on standard input."""
    if out is None and wanted["resume"]:
        remedy = "Name the unfinished file"
        raise DataError("only a file can be resumed", key=option("resume"), remedy=remedy)
    if not places and images_from is None:
        raise DataError("no image was named", remedy="Name files, folders or globs; - takes paths from standard input")
    write_rows(run, places, None if out is None else Path(out), _Wanted(**wanted), images_from)  # type: ignore[arg-type]


@reporting_disk_errors()
def write_rows(
    run: str | os.PathLike[str],
    places: Sequence[str],
    out: Path | None,
    wanted: _Wanted,
    images_from: str | None = None,
) -> None:
    """Write a row for each image to a file, or to standard output.

    Raises:
        TlscaleError: as `predict`.
    """
    if out is not None and out.suffix.lower() not in SUFFIXES:
        raise DataError(
            f"'{out}' has no ending of a kind that is written",
            key=option("out"),
            remedy=f"End it in one of {', '.join(SUFFIXES)}",
        )
    trained = load(run)
    columns = checked_columns(trained.columns(), wanted.top_k, all_probabilities=wanted.all_probabilities)
    with ExitStack() as stack:
        processes = stack.enter_context(computing(trained.facts))
        stop = stack.enter_context(StopRequest())
        path = RunPath(trained, trained.facts, processes)
        columns = replace(columns, unknown_from=trained.columns(path).unknown_from)
        if path.note is not None:
            _say(processes, path.note)
        # Rows on the terminal are the progress that somebody sees there.
        shown = processes.is_main and (out is not None or not sys.stdout.isatty())
        pace = Pace(None, "predicting", Console(enabled=shown, stderr=True), every_s=_SAY_EVERY_S)
        work = _Work(path, columns, processes, stop, stack.enter_context(pace), out)
        sink = _sink(out, columns, trained, path.batching)
        if wanted.resume and processes.run_on_main(lambda: sink.is_complete):
            _say(processes, f"'{out}' is complete already")
            return
        paths = stack.enter_context(_Paths(places, images_from)) if processes.is_main else None
        try:
            processes.run_on_main(work.begin, sink, paths, resume=wanted.resume)
            work.go_on(sink)
        finally:
            if processes.is_main:
                sink.keep()
    if trained.scored_on == FOLDS:
        _say(processes, ABOUT_FOLDS)
    _say(processes, work.summary())


def _sink(out: Path | None, columns: Columns, trained: ImageClassifier, batching: Batching) -> Sink:
    if out is None:
        return Screen(columns)
    config = trained.folder / "model" / CONFIG_FILE
    config = config if config.is_file() else trained.folder / CONFIG_FILE
    # The settings hold the checksums of the tensors.
    about = {"model": file_sha256(config), "columns": columns.names, "batches": asdict(batching)}

    def ends() -> Iterator[int]:
        return accumulate(map(sum, batching.chunks()))

    if out.suffix.lower() == ".parquet":
        from tlscale.training.prediction_parts import ParquetFile

        return ParquetFile(out, columns, about, ends)
    form = TextFormat.csv(columns) if out.suffix.lower() == ".csv" else TextFormat.jsonl(columns)
    return TextFile(out, form, columns, about, ends)


class _Paths(ExitStack):
    """Give the paths of all images, one after the other, and remember what was not found."""

    def __init__(self, places: Sequence[str], images_from: str | None) -> None:
        super().__init__()
        self.notes: list[str] = []
        self._is_shown = False
        found = (self._of(place) for place in places)
        lists = [] if images_from is None else [self._listed(images_from)]
        self.images: Iterator[str] = chain(chain.from_iterable(found), *lists)

    def _of(self, place: str) -> Iterator[str]:
        return self._listed(place) if place == "-" else find_images([place], self._note)

    def _listed(self, name: str) -> Iterator[str]:
        yield from find_images(lines_of(self._opened(name)), self._note, expand=False)

    def _opened(self, name: str) -> BinaryIO:
        if name == "-":
            return sys.stdin.buffer
        try:
            return self.enter_context(open(name, "rb"))
        except OSError as error:
            raise DataError(f"'{name}' cannot be read: {error.strerror or error}", key=option("images-from")) from None

    def _note(self, text: str) -> None:
        if len(self.notes) < 10:  # a list may name a million
            self.notes.append(text)
            if self._is_shown:
                self._show(text)

    @staticmethod
    def _show(text: str) -> None:
        print(f"tlscale: {visible(text)}", file=sys.stderr)

    def show_notes(self) -> None:
        """Show what was not found so far, and from now on at once: where nothing is found the error has it."""
        for text in self.notes:
            self._show(text)
        self._is_shown = True

    def nothing_found(self) -> DataError:
        """Make the error of places that hold no image."""
        return DataError((not self._is_shown and first_few(self.notes)) or "no image was found")


@dataclass(frozen=True)
class _Chunk:
    """Hold what a process does in a round."""

    paths: list[str]
    sizes: list[int]
    """Of its batches."""


@dataclass
class _Work:
    """Take the images in rounds: a chunk for each process, and the main one writes them in order."""

    path: RunPath
    columns: Columns
    processes: Processes
    stop: StopRequest
    pace: Pace
    out: Path | None
    paths: _Paths | None = None
    images: Iterator[str] = field(default_factory=lambda: iter(()))
    num_given: int = 0
    num_read: int = 0
    num_resumed: int = 0
    num_unknown: int = 0
    """Of this start."""
    first_error: tuple[str, str | None] = ("", None)
    chunks: Iterator[list[int]] = field(init=False)
    _began_s: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        """Begin with the first chunk."""
        self.chunks = self.path.batching.chunks()

    def begin(self, sink: Sink, paths: _Paths | None, *, resume: bool) -> None:
        """Open the file, and go to where it ends."""
        assert paths is not None
        self.paths, self.images = paths, paths.images
        if not resume:
            first = next(self.images, None)  # before a file is made, or replaced
            if first is None:
                raise paths.nothing_found()
            paths.show_notes()
            self.images = chain([first], self.images)
            sink.begin()
            return
        paths.show_notes()
        resumed = sink.resume(self.images)
        self.images, self.num_given, self.num_read = resumed.images, resumed.num_rows, resumed.num_read
        self.num_resumed, done = self.num_given, 0
        while done < self.num_given:
            done += sum(next(self.chunks))

    def go_on(self, sink: Sink) -> None:
        """Do all that is left.

        Raises:
            Stopped: a signal came; what is finished is written.
            DataError: there was nothing, or nothing that can be read.
        """
        processes = self.processes
        while (given := processes.run_on_main(self._next_round))[0].paths:
            own = given[processes.rank]
            answered = processes.run_on_all(answer, own.paths, own.sizes, self.path, processes, self._show)
            processes.run_on_main(self._write, sink, given, processes.gather(answered))
            if processes.any(self.stop.requested):
                raise self._stopped("")
        processes.run_on_main(self._end, sink)

    def _next_round(self) -> list[_Chunk]:
        sizes = list(islice(self.chunks, self.processes.world_size))
        return [_Chunk(list(islice(self.images, sum(some))), some) for some in sizes]

    def _write(self, sink: Sink, given: list[_Chunk], parts: list[Answers]) -> None:
        for chunk, answers in zip(given, parts, strict=True):
            paths = chunk.paths
            if not paths:
                break
            sink.write(paths, answers)
            self.num_given += len(paths)
            self.num_unknown += self.columns.unknown(answers).count(True)
            good = answers.errors.count(None)
            if self.first_error[1] is None and good < len(answers):
                at = next(at for at, why in enumerate(answers.errors) if why is not None)
                self.first_error = paths[at], answers.errors[at]
            self.num_read += good

    def _end(self, sink: Sink) -> None:
        if self.num_given == 0:
            assert self.paths is not None
            raise self.paths.nothing_found()
        sink.end()
        refuse_none_read(self.num_given, self.num_read, *self.first_error)

    def _show(self, num_images: int) -> None:
        # Nobody waits for minutes after a signal; several processes have to end at the same place.
        if self.stop.requested and self.path.batching.size > _LONG_CHUNK and self.processes.world_size == 1:
            raise self._stopped(" and a part of a batch")
        self.pace.add(num_images * self.processes.world_size)  # they have about equal shares

    def _stopped(self, rest: str) -> Stopped:
        remedy = None if self.out is None else "The same line with " + flag("resume") + f" completes '{self.out}'"
        return Stopped(f"stopped after {_images(self.num_given)}{rest}", remedy=remedy)

    def _speed(self, num_images: int) -> str:
        return f"{num_images / max(time.monotonic() - self._began_s, 1e-9):.0f} images/s"

    def summary(self) -> str:
        """Return a line on all that was done."""
        failed = self.num_given - self.num_read
        without = f", {failed:,} without an answer (column error)" if failed else ""
        if self.columns.unknown_from is not None:
            without += f", {self.num_unknown:,} unlike anything trained on (column unknown)"
        where = "" if self.out is None else f" -> {self.out}"
        speed = self._speed(self.num_given - self.num_resumed)
        return f"{_images(self.num_given)}{without}; {speed}{where}"


def _images(count: int) -> str:
    return f"{count:,} image{'s' * (count != 1)}"


def _say(processes: Processes, text: str) -> None:
    if processes.is_main:
        print(visible(text), file=sys.stderr)
