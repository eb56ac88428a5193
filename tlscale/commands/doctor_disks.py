"""Where a run writes: whether there is room, and whether this user may; one function a subject, as `doctor_checks`."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tlscale.commands.doctor_finding import Finding
from tlscale.errors import TlscaleError, first_line, one_line, option
from tlscale.storage.cache import cache_root, nearest_folder

_GIB = 2**30
_LEAST_DISK, _LEAST_SHARED = 5 * _GIB, 1 * _GIB


@dataclass(frozen=True)
class _Remedies:
    """What to do about a place where a run writes."""

    room: str
    """Where its disk is nearly full."""
    place: str
    """Where this user cannot write to it."""
    is_needed: bool
    """Without it a run does not work."""


_REMEDIES = {
    "runs": _Remedies(
        "Write runs elsewhere (" + option("out", "DIR").shell + "), or make room",
        "Write runs to a folder that you may write to (" + option("out", "DIR").shell + ")",
        is_needed=True,
    ),
    "cache": _Remedies(
        "`tlscale codes prune` makes room; or set TLSCALE_CACHE to a folder on a larger disk",
        "Set TLSCALE_CACHE to a folder that you may write to; until then runs do not share what is computed",
        is_needed=False,
    ),
    "hub's cache": _Remedies(
        "Set HF_HOME to a folder on a larger disk, or remove there what is not needed (`hf cache`)",
        "Set HF_HOME to a folder that you may write to; until then only weights that are there can be used",
        is_needed=False,
    ),
    "temporary files": _Remedies(
        "Make room there, or set TMPDIR to a folder on a larger disk",
        "Set TMPDIR to a folder that you may write to",
        is_needed=True,
    ),
}


def _cache() -> Iterator[Finding]:
    try:
        root = cache_root()
    except TlscaleError as error:
        yield Finding("cache", "wrong", error.problem, error.remedy or "")
        return
    yield Finding("cache", "ok", f"'{one_line(root)}'")


def _disks() -> Iterator[Finding]:
    from huggingface_hub.constants import HF_HUB_CACHE

    places = {"runs": Path("runs"), "hub's cache": Path(HF_HUB_CACHE)}
    with suppress(TlscaleError):  # no home folder: a finding of its own
        places["cache"] = cache_root()
    try:
        places["temporary files"] = Path(tempfile.gettempdir())
    except OSError as error:
        remedy = _REMEDIES["temporary files"].place
        yield Finding("disk for temporary files", "wrong", one_line(first_line(error)), remedy)
    for name, place in places.items():
        yield from _disk(name, place)
    yield from _ignored_tmpdir()
    shared = Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(shared).total < _LEAST_SHARED:
        what = f"{shutil.disk_usage(shared).total / 2**20:.0f} MiB in /dev/shm, through which workers send images"
        yield Finding(
            "shared memory", "note", what, "Give the container more (docker run --shm-size=8g), or data.workers=0"
        )


def _disk(name: str, place: Path) -> Iterator[Finding]:
    """Tell of one place whether it can be written to, or else how much room it has."""
    remedies, subject = _REMEDIES[name], f"disk for {name}"
    for folder in (place, *_folders_in(place)) if name == "cache" else (place,):
        if problem := _cannot_write(folder):
            what = f"'{one_line(folder)}' {problem}"
            yield Finding(subject, "wrong" if remedies.is_needed else "note", what, remedies.place)
            return
    free = shutil.disk_usage(nearest_folder(place)).free
    what = f"{free / _GIB:.1f} GiB free in '{one_line(place)}'"
    yield Finding(subject, "note", what, remedies.room) if free < _LEAST_DISK else Finding(subject, "ok", what)


def _folders_in(place: Path) -> list[Path]:
    """Return the folders in a folder: in a cache one for each kind of what is cached, some perhaps of other users."""
    with suppress(OSError):
        return sorted(folder for folder in place.iterdir() if folder.is_dir())
    return []


def _cannot_write(place: Path) -> str:
    """Return why nothing can be written to a folder, or to the nearest one above it; empty where it can."""
    if place.exists() and not place.is_dir():
        return "is no folder"
    if os.path.lexists(place) is False and any(parent.is_file() for parent in place.absolute().parents):
        return "lies below a file"
    folder = nearest_folder(place)
    try:
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        reason = error.strerror or str(error)
        if isinstance(error, PermissionError):
            reason = f"{reason}, it belongs to {_owner(folder)}"
        if folder != place:
            return f"cannot be made: '{one_line(folder.absolute())}' cannot be written to ({reason})"
        return f"cannot be written to ({reason})"


def _owner(folder: Path) -> str:
    try:
        return f"'{folder.owner()}'"
    except (KeyError, OSError, NotImplementedError):  # of another machine, or where files have no owners
        return "another user"


def _ignored_tmpdir() -> Iterator[Finding]:
    """Tell of a TMPDIR that cannot be written to: Python takes another folder, and tells nobody."""
    name = next((name for name in ("TMPDIR", "TEMP", "TMP") if os.environ.get(name)), None)
    if name is None:
        return
    wanted = Path(os.environ[name])
    with suppress(OSError):
        used = tempfile.gettempdir()
        if os.path.abspath(wanted) != used:
            problem = _cannot_write(wanted) if wanted.exists() else "is not there"
            what = f"{name}='{one_line(wanted)}' {problem or 'was not used'}, so '{one_line(used)}' is used instead"
            remedy = f"Make that folder, or set {name} to a folder with room that you may write to"
            yield Finding("temporary files", "note", what, remedy)


DISK_CHECKS = (_cache, _disks)
