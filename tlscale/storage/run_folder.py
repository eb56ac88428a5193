"""Claim a run folder, so that no run is lost to another, and name the paths in it.

Promise: one job at a time; a folder that already holds a run is neither resumed nor replaced unless the user said so;
nothing is deleted that tlscale did not make.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from tlscale.errors import EXIT_BAD_INPUT, EXIT_FAILED, RunFolderError, flag, irregular, is_unicode, option
from tlscale.storage import faults
from tlscale.storage.cache import is_forbidden
from tlscale.storage.files import flush, left_overs, make_folder, remove_left_overs

Mode = Literal["fresh", "resume", "overwrite"]
_NO_PLACE = {
    errno.ENOENT: "no folder can be made there",
    errno.EEXIST: "there is something that is no folder",
    errno.EISDIR: "there is a folder in place of its .lock",
    errno.ENOTDIR: "a part of it is no folder",
    errno.ELOOP: "it leads through a circle of links",
    errno.ENAMETOOLONG: "the name is too long for this file system",
    errno.EINVAL: "the file system takes no such name",
    errno.EILSEQ: "the file system takes no such name",
}
"""Why no folder can be made at a place, whoever asks and however much room there is."""


class RunFolder:
    """Name the paths of one run; docs/run_folder.md lists what each holds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.run_json = path / "run.json"
        self.metrics = path / "metrics.jsonl"
        self.contents = path / "contents.npy"
        self.result = path / "result.json"
        self.predictions = path / "predictions.parquet"
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"
        self.folds = path / "folds"
        """Holds the runs of a cross-validation, each in a folder of its own."""
        self.lock = path / ".lock"
        self.stop = path / "STOP"
        """The control file that whoever wants the run to stop puts there."""
        self.stopped = path / "STOPPED"
        """Reports that the run stopped because it was asked to, and is resumed with --resume."""
        self.spent = path / ".spent.json"
        """Holds the seconds that were spent, while the run is at work."""
        self.fits = path / ".fits"
        """Holds what a probe has fitted, while it is at work."""
        self.written_whole = (
            *(self.run_json, self.recipe, self.result, self.stopped, self.spent),
            *(self.predictions, self.contents),
        )
        """The files that `write_text` and `replacing` write there."""


def refuse_not_utf8(path: Path) -> None:
    """Refuse to write to a place whose name is not UTF-8, which safetensors, Arrow and ONNX do after all the work.

    Raises:
        RunFolderError: its name is none.
    """
    if not is_unicode(str(path)):
        raise RunFolderError(
            f"cannot write to '{path}': the name is not UTF-8", remedy="Give another place: " + option("out")
        )


def clear(folder: RunFolder) -> None:
    """Remove the run that is in a claimed folder.

    Not done when the folder is claimed: a new run may yet turn out to be wrong, and then the old one is still there.
    A process that is killed here leaves a run that never began: its recipe goes first, and last what tells that it is
    ours. After a power loss, too: a disk may keep these in another order, but for what it was told to flush.
    """
    folder.recipe.unlink(missing_ok=True)
    flush(folder.path)
    faults.at("clear")
    for entry in _entries(folder):
        if entry != folder.run_json:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    flush(folder.path)
    folder.run_json.unlink(missing_ok=True)


def forget_stop(folder: RunFolder) -> bool:
    """Remove a request to stop: a file, a link (not what it leads to), or an empty folder.

    Returns:
        Whether there was one.

    Raises:
        RunFolderError: it is a folder that holds something, or cannot be removed.
    """
    if not os.path.lexists(folder.stop):
        return False
    is_folder = folder.stop.is_dir() and not folder.stop.is_symlink()
    try:
        folder.stop.rmdir() if is_folder else folder.stop.unlink(missing_ok=True)
    except OSError as error:
        raise RunFolderError(
            f"'{folder.stop}' asks each run here to stop, and cannot be removed: {error.strerror or error}",
            remedy="Remove it, or give another folder: " + option("out", "DIR"),
        ) from None
    return True


def refuse_both(*, resume: bool, overwrite: bool) -> None:
    """Refuse to resume a run and to replace it, in one.

    Raises:
        RunFolderError: both are wanted.
    """
    if resume and overwrite:
        problem = flag("resume") + " resumes a run, " + flag("overwrite") + " replaces it"
        raise RunFolderError(problem, remedy="Give one of them")


@contextmanager
def claim(path: Path, mode: Mode) -> Iterator[RunFolder]:
    """Hold the folder for this job.

    Args:
        path: is made if it is not there.
        mode: `fresh` refuses a folder that holds anything; `resume` resumes a run of tlscale or starts one;
            `overwrite` takes a run of tlscale as well, to be removed by `clear` when the new one is ready to begin.

    Raises:
        RunFolderError: in use, not ours, holding a run already, or not to be written.
    """
    folder = RunFolder(path)
    refuse_not_utf8(path)
    try:
        make_folder(path)
        _refuse_foreign(folder)  # before the lock's file is put there
        lock = FileLock(folder.lock, timeout=0)
        lock.acquire()
    except Timeout:
        raise RunFolderError(
            f"another job is writing to '{path}'",
            remedy="Wait for it, or give this one a folder of its own: " + option("out", "DIR"),
        ) from None
    except OSError as error:
        # Another folder helps against the one, and time or room against the other.
        is_place = is_forbidden(error) or error.errno in _NO_PLACE
        why = _NO_PLACE.get(error.errno or 0, error.strerror or str(error))
        refused = RunFolderError(
            f"cannot write to the run folder '{path}': {why}",
            remedy="Give another folder: " + option("out", "DIR") if is_place else None,
        )
        refused.exit_code = EXIT_BAD_INPUT if is_place else EXIT_FAILED
        raise refused from error
    try:
        _refuse_foreign(folder)
        refuse_irregular(folder)
        for written in folder.written_whole:
            remove_left_overs(written)
        if mode == "fresh" and _entries(folder):
            raise RunFolderError(
                f"'{path}' already holds a run",
                remedy=flag("resume")
                + " resumes it, "
                + flag("overwrite")
                + " replaces it, "
                + option("out", "DIR")
                + " writes elsewhere",
            )
        faults.at("claimed")
        yield folder
    finally:
        lock.release()


def refuse_irregular(folder: RunFolder) -> None:
    """Refuse a run in whose folder a pipe, a socket or a device is, or a link to one: reading it may never end.

    Raises:
        RunFolderError: there is one.
    """
    ours = (folder.checkpoints, folder.model, folder.fits)  # others may be trackers', with sockets of theirs
    for path in (*folder.path.glob("*"), *(path for place in ours for path in place.glob("**/*"))):
        what = None if path in (folder.stop, folder.lock) else irregular(path)
        if what is not None and not path.is_dir():
            raise RunFolderError(
                f"'{path}' is {what}, and no part of a run", remedy="Remove it, or bring the file back"
            )


def _entries(folder: RunFolder) -> list[Path]:
    # Control files, and files that a killed writer had not finished, are no part of a run.
    others = {folder.lock, folder.stop, folder.stopped, folder.spent, folder.fits}
    others.update(left for path in folder.written_whole for left in left_overs(path))
    return [entry for entry in folder.path.iterdir() if entry not in others]


def _refuse_foreign(folder: RunFolder) -> None:
    if _entries(folder) and not _is_run(folder):
        raise RunFolderError(
            f"'{folder.path}' is not empty and not a run of tlscale (it has no run.json), so nothing is written there",
            remedy="Give another folder: " + option("out", "DIR"),
        )


def _is_run(folder: RunFolder) -> bool:
    # run.json is written first of all, so a run that was killed at birth is known by it as well.
    try:
        record = json.loads(folder.run_json.read_text()) if folder.run_json.is_file() else None
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and "tlscale" in record
