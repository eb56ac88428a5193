"""Write and hash files such that none is ever half written.

Promise: what `write_text`, `write_json`, `replacing` and `make_folder` leave is there after a power loss, its name
included: files are forced to the disk before they get their names, and then the folder that has the name.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tlscale.errors import EXIT_BAD_INPUT, TlscaleError, flag, irregular, quoted
from tlscale.storage import faults

_NOT_FLUSHED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


def refuse_endless_file(path: Path, most_bytes: int) -> None:
    """Refuse a file whose reading as a whole may not end: a pipe, a device, or one that is too large.

    Raises:
        ValueError: it is such a file.
        OSError: it cannot be looked at.
    """
    if (what := irregular(path)) is not None:
        raise ValueError(f"it is {what}")
    if path.stat().st_size > most_bytes:
        raise ValueError(f"it has over {most_bytes:,} bytes")


def file_sha256(path: Path) -> str:
    """Hash a file's bytes: 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_sha256(text: str) -> str:
    """Hash a text as UTF-8: 64 hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def naming_disk_errors(path: Path) -> Iterator[None]:
    """Turn what a full or failing disk raises within into an error that names `path` and how to resume the run."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise TlscaleError(
            f"cannot write to '{path}': {error}",
            remedy="The checkpoints are untouched; make room and resume with " + flag("resume"),
        ) from error


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Give the name of the file to what a disk raises within: errors of `write` and `fsync` have none."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


@contextmanager
def reporting_disk_errors() -> Iterator[None]:
    """Turn what a disk raises within, and nobody has reported, into an error that names the file and the reason.

    Raises:
        TlscaleError: in place of any OSError, but that of an output that nobody reads any more.
    """
    try:
        yield
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise
        raise disk_error(error) from error


def is_full(error: OSError) -> bool:
    """Report whether there is no room, for all or for this user."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def disk_error(error: OSError) -> TlscaleError:
    """Make the error of a file that cannot be read or written, for those that nobody has said more about."""
    files = " and ".join(f"'{os.fsdecode(name)}'" for name in (error.filename, error.filename2) if name is not None)
    if error.errno == errno.ENAMETOOLONG:  # whoever gave the name, and not the disk
        (files,) = quoted([os.fsdecode(error.filename or "")])
        refused = TlscaleError(f"{files}: the name is too long for this file system", remedy="Give a shorter one")
        refused.exit_code = EXIT_BAD_INPUT
        return refused
    return TlscaleError(
        f"{files or 'a file'} cannot be read or written: {error.strerror or error}",
        remedy="What is finished stays; make sure that the disk is well, and go on with the same line (run, predict: "
        + flag("resume")
        + ")",
    )


def refuse_no_place(path: Path, key: str) -> None:
    """Refuse the name of a file that cannot be written there, whatever the disk.

    Raises:
        TlscaleError: its folder is not there, or a folder has its name.
    """
    problem = None
    if not path.parent.is_dir():
        what = "a file is in the way of" if path.parent.exists() else "there is no"
        problem = f"{what} folder '{path.parent}'", "Make it first, or name a file in another one"
    elif path.is_dir():
        problem = f"'{path}' is a folder", "Name a file in it"
    if problem is not None:
        refused = TlscaleError(problem[0], key=key, remedy=problem[1])
        refused.exit_code = EXIT_BAD_INPUT
        raise refused


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary file to write to, which replaces `path` when it is on the disk, and never if writing fails."""
    aside = _aside(path)
    try:
        with naming_file(path):
            yield aside
        flush(aside)
        aside.replace(path)
        flush(path.parent)
    finally:
        _remove_if_there(aside)


def write_text(path: Path, text: str) -> None:
    """Write `path` whole or not at all, and to the disk before it gets its name."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")
        faults.at("file.rename")


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` as JSON, as `write_text` does."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, where they are not there yet."""
    missing = [place for place in (path, *path.parents) if not place.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for place in reversed(missing):
        flush(place.parent)


def flush(path: Path) -> None:
    """Force a file's content, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming_file(path):
            os.fsync(descriptor)
    except OSError as error:
        # Some file systems flush no folders: those of other machines mostly, which do it when they are asked to rename.
        if error.errno not in _NOT_FLUSHED or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def flush_and_hash(path: Path) -> tuple[int, str]:
    """Force a file to the disk and read it back, in one opening; return its bytes and SHA-256."""
    with naming_file(path), path.open("rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")


def _remove_if_there(aside: Path) -> None:
    """Remove a temporary file, unless the disk refuses that too: then the next writer removes it, or its next start."""
    with suppress(OSError):
        aside.unlink(missing_ok=True)


def left_overs(path: Path) -> list[Path]:
    """List the temporary files that writers of `path` left when they were killed."""
    return [left for left in path.parent.glob(f".{path.name}.*") if left.suffix[1:].isdecimal() and left.is_file()]


def remove_left_overs(path: Path) -> None:
    """Remove the `left_overs` of `path`; for a caller who knows that no writer is at work."""
    for left in left_overs(path):
        left.unlink(missing_ok=True)
