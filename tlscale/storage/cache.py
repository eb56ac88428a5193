"""Place what is cached between runs: where, for whom, and what to say where nothing can be.

Promise: a cache that a group shares stays the group's, whoever writes and whatever the umask. One that is read-only or
another user's ends no run that can compute what is not there.
"""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from pathlib import Path

from tlscale.errors import EXIT_BAD_INPUT, TlscaleError, is_unicode


def cache_root() -> Path:
    """Return `$TLSCALE_CACHE`, by default `~/.cache/tlscale`: the folder of what is cached between runs.

    Raises:
        TlscaleError: this user has no home folder, or the name of the folder is not UTF-8.
    """
    try:
        root = Path(os.environ.get("TLSCALE_CACHE") or Path.home() / ".cache" / "tlscale")
    except RuntimeError as error:
        raise TlscaleError(
            "there is no home folder to cache in: HOME is not set, and the system knows none of this user",
            key="TLSCALE_CACHE",
            remedy="Set TLSCALE_CACHE to a folder that you may write to, or set HOME",
        ) from error
    if not is_unicode(str(root)):  # safetensors writes to no such place
        refused = TlscaleError(f"'{root}' is not UTF-8", key="TLSCALE_CACHE", remedy="Set it to a folder whose name is")
        refused.exit_code = EXIT_BAD_INPUT
        raise refused
    return root


def is_forbidden(error: OSError) -> bool:
    """Report whether a folder is another user's or read-only, so that no room and no second try would help."""
    return error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)


def is_no_folder(error: OSError) -> bool:
    """Report whether something else is in the place of a folder, or none of such a name can be."""
    return error.errno in (errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL)


def make_cache_folder(folder: Path) -> None:
    """Make a folder and those above it, which the group may write to where it may write to the one they are put in."""
    if folder.is_dir():
        return
    try:
        folder.mkdir()
    except FileNotFoundError:
        make_cache_folder(folder.parent)
        folder.mkdir(exist_ok=True)
    except FileExistsError:  # made just now, or a file
        folder.mkdir(exist_ok=True)
    share_with_group(folder)


def share_with_group(path: Path) -> None:
    """Let the group write a file or folder of the cache, whatever the umask, where it may write to its folder."""
    with suppress(OSError):  # another user's, or gone
        bits = 0o070 if path.is_dir() else 0o060
        mode, is_shared = path.stat().st_mode, path.parent.stat().st_mode & 0o020
        if is_shared and mode & bits != bits:
            path.chmod(mode & 0o7777 | bits)


_announced: set[Path] = set()


def say_not_cached(folder: Path, error: OSError) -> None:
    """Warn once a process, on the main one, that nothing is cached there; for what can be done without it."""
    root = cache_root() if folder.is_relative_to(cache_root()) else folder
    if root not in _announced and os.environ.get("RANK", "0") == "0":
        print(
            f"tlscale: WARNING: nothing is cached in '{root}' ({error.strerror or error}), so it is computed in each "
            "run. Set TLSCALE_CACHE to a folder that you may write to",
            file=sys.stderr,
        )
    _announced.add(root)


def nearest_folder(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    return next(place for place in (path, *path.absolute().parents) if os.path.isdir(place))
