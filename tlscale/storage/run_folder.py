"""The run folder: who may write in it, and how, so that no run is lost to another.

Promise: one job at a time; a folder that already holds a run is neither gone on with nor replaced unless the user
said so; nothing is deleted that tlscale did not make; a file is either the old one or the new one, never half.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from tlscale import faults
from tlscale.errors import RunFolderError, TlscaleError

Mode = Literal["fresh", "resume", "overwrite"]


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run; see design.md for what each holds."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def run_json(self) -> Path:
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def predictions(self) -> Path:
        return self.path / "predictions.parquet"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def lock(self) -> Path:
        return self.path / ".lock"

    @property
    def stop(self) -> Path:
        """Somebody who wants the run to stop puts it there."""
        return self.path / "STOP"

    @property
    def stopped(self) -> Path:
        """Says that the run stopped because it was asked to, and goes on with --resume."""
        return self.path / "STOPPED"

    @property
    def written_whole(self) -> tuple[Path, ...]:
        """What `write_text` and `replacing` write there."""
        return self.run_json, self.recipe, self.result, self.stopped, self.predictions


def clear(folder: RunFolder) -> None:
    """Remove the run that is in a claimed folder.

    Not done when the folder is claimed: a new run may yet turn out to be wrong, and then the old one is still there.
    Who is killed here leaves a run that never began: its recipe goes first, and last what says that it is ours.
    """
    folder.recipe.unlink(missing_ok=True)
    faults.at("clear")
    for entry in sorted(_entries(folder), key=lambda entry: entry == folder.run_json):
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


@contextmanager
def claim(path: Path, mode: Mode) -> Iterator[RunFolder]:
    """Hold the folder for this job.

    Args:
        path: is made if it is not there.
        mode: `fresh` refuses a folder that holds anything; `resume` goes on with a run of tlscale or starts one;
            `overwrite` takes a run of tlscale as well, to be removed by `clear` when the new one is ready to begin.

    Raises:
        RunFolderError: in use, not ours, holding a run already, or not to be written.
    """
    folder = RunFolder(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        _refuse_foreign(folder)  # before the lock's file is put there
        lock = FileLock(folder.lock, timeout=0)
        lock.acquire()
    except Timeout:
        raise RunFolderError(
            f"another job is writing to '{path}'. Wait for it, or give this one a folder of its own: --out DIR"
        ) from None
    except OSError as error:
        raise RunFolderError(f"cannot write to the run folder '{path}': {error.strerror or error}") from error
    try:
        _make_ready(folder, mode)
        faults.at("claimed")
        yield folder
    finally:
        lock.release()


def _make_ready(folder: RunFolder, mode: Mode) -> None:
    _refuse_foreign(folder)
    for path in folder.written_whole:
        remove_left_overs(path)
    if mode == "fresh" and _entries(folder):
        raise RunFolderError(
            f"'{folder.path}' already holds a run. --resume goes on with it, --overwrite replaces it, --out DIR "
            "writes elsewhere"
        )


def _entries(folder: RunFolder) -> list[Path]:
    """What is there of a run; words to a run, and files that a killed writer had not finished, are none of it."""
    others = {folder.lock, folder.stop, folder.stopped}
    others.update(left for path in folder.written_whole for left in _left_overs(path))
    return [entry for entry in folder.path.iterdir() if entry not in others]


def _refuse_foreign(folder: RunFolder) -> None:
    if _entries(folder) and not _is_run(folder):
        raise RunFolderError(
            f"'{folder.path}' is not empty and not a run of tlscale (it has no run.json), so nothing is written there. "
            "Give another folder: --out DIR"
        )


def _is_run(folder: RunFolder) -> bool:
    # run.json is written first of all, so a run that was killed at birth is known by it as well.
    try:
        facts = json.loads(folder.run_json.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(facts, dict) and "tlscale" in facts


@contextmanager
def naming_disk_errors(path: Path) -> Iterator[None]:
    """Within: a full or failing disk is an error that says where, and how the run goes on.

    Raises:
        TlscaleError: in place of what the disk, or safetensors for it, raised.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise TlscaleError(
            f"cannot write to '{path}': {error}. The checkpoints are untouched; make room and go on with --resume"
        ) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Within: a file aside to write to, which takes the place of `path` when it is on the disk; never if that fails."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield aside
        flush(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `path` whole or not at all, and to the disk before it gets its name."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        faults.at("file.rename")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Have a file's content, or a folder's names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_left_overs(path: Path) -> None:
    """Remove what writers of `path` that were killed left beside it; for who knows that none is at work."""
    for left in _left_overs(path):
        left.unlink(missing_ok=True)


def _left_overs(path: Path) -> list[Path]:
    return [left for left in path.parent.glob(f".{path.name}.*") if left.suffix[1:].isdecimal() and left.is_file()]


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` as JSON, as `write_text` does."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
