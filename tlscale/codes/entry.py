"""Read one entry of the store: the shards of one key, and which of them are sound.

Promise: an image is found only in a shard that is as it was written. What removes here is for the holder of the entry's
lock. An entry of an older format is never read, only shown and removed.

Shape letters: N images that are requested, M images of all shards, R images of one.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tlscale.codes.key import CodesKey
from tlscale.codes.shards import (
    SUFFIX,
    CorruptError,
    Ints,
    Shard,
    ValueSpec,
    check_values,
    map_values,
    read_ids,
    read_record,
    remove_shard,
    remove_whatever,
)
from tlscale.data.content import DIGEST, Digests
from tlscale.distributed.host import num_cores
from tlscale.errors import DataError

Say = Callable[[str], object]
OLDER_MANIFEST = "manifest.json"
"""What entries of the first format have, and none of today's."""
_OLDER_USED = "used"


@dataclass(frozen=True)
class Entry:
    """Describe an entry, for lists."""

    digest: str
    key: Mapping[str, Any] | None
    """None where no record is readable."""
    path: Path
    num_bytes: int
    num_rows: int
    last_used_s: float
    """Seconds since 1970."""
    complete: bool
    """It has every file that its records name, of the right size."""
    is_older: bool = False
    """Of an older format: never read."""


@dataclass(frozen=True)
class Piece:
    """Name what is evicted at once: a shard, or an entry of an older format."""

    digest: str
    name: str | None
    """Of the shard; None: the whole entry."""
    num_bytes: int
    last_used_s: float


@dataclass(frozen=True)
class Scan:
    """Locate the requested images."""

    shards: tuple[Shard, ...]
    """Those whose images are known and that are not known to be corrupt."""
    shard_N: Ints
    """Place in `shards`; -1 where no shard has the image."""
    offset_N: Ints
    """Place in the shard."""
    corrupt: tuple[Shard, ...] = ()

    @property
    def used(self) -> list[int]:
        """Return the places in `shards` of those that have a requested image."""
        return [int(number) for number in np.unique(self.shard_N) if number >= 0]


def describe_corruption(folder: Path, error: CorruptError) -> str:
    """Return the line that a user reads about it."""
    return f"codes in '{folder}' are corrupt, and not used: {error}"


def read_shards(folder: Path, key: CodesKey, say: Say) -> tuple[tuple[ValueSpec, ...], list[Shard]]:
    """Read the shards of an entry, by name, and what their values are (empty without any); skip corrupt records."""
    found: list[tuple[Shard, tuple[ValueSpec, ...]]] = []
    for name in record_names(folder):
        try:
            found.append(read_record(folder, name, key.to_plain()))
        except FileNotFoundError:  # removed just now
            continue
        except CorruptError as error:
            say(describe_corruption(folder, error))
    if not found:
        return (), []
    values = Counter(values for _, values in found).most_common(1)[0][0]
    return values, [shard for shard, its_values in found if its_values == values]


def record_names(folder: Path) -> list[str]:
    """Return the names of the shards that count, in order."""
    return sorted(path.stem for path in folder.glob("[0-9a-f]*.json"))


def scan_shards(folder: Path, shards: Sequence[Shard], ids_N: Digests, *, verify: bool, say: Say) -> Scan:
    """Find images by address; of the values only those of shards that are used are read, and each once."""
    held, corrupt = _checked(shards, lambda shard: read_ids(folder, shard), folder, say)
    sound: set[str] = set()
    while True:
        scan = _located(held, ids_N)
        unsure = [scan.shards[number] for number in scan.used if scan.shards[number].name not in sound]
        passed, failed = _checked(unsure, lambda shard: check_values(folder, shard, verify=verify), folder, say)
        if not failed:
            return replace(scan, corrupt=tuple(corrupt))
        sound |= {shard.name for shard, _ in passed}
        corrupt += failed
        gone = {shard.name for shard in failed}  # another shard may have its images
        held = [(shard, ids_R) for shard, ids_R in held if shard.name not in gone]


def _checked(
    shards: Sequence[Shard], check: Callable[[Shard], Any], folder: Path, say: Say
) -> tuple[list[tuple[Shard, Any]], list[Shard]]:
    """Return the shards that pass, each with what `check` gives, and those that do not."""

    def outcome_of(shard: Shard) -> Any:
        try:
            return check(shard)
        except CorruptError as error:
            return error

    passed, failed = [], []
    with ThreadPoolExecutor(num_cores()) as pool:  # hashing releases the interpreter's lock
        for shard, outcome in zip(shards, pool.map(outcome_of, shards), strict=True):
            if isinstance(outcome, CorruptError):
                say(describe_corruption(folder, outcome))
                failed.append(shard)
            else:
                passed.append((shard, outcome))
    return passed, failed


def _located(held: Sequence[tuple[Shard, Digests]], ids_N: Digests) -> Scan:
    shards = tuple(shard for shard, _ in held)
    if not held:
        return Scan(shards, np.full(len(ids_N), -1), np.zeros(len(ids_N), np.int64))
    ids_M = np.concatenate([ids_R for _, ids_R in held])
    shard_M = np.repeat(np.arange(len(held)), [len(ids_R) for _, ids_R in held])
    offset_M = np.concatenate([np.arange(len(ids_R)) for _, ids_R in held])
    order_M = np.argsort(ids_M, kind="stable")
    at_N = order_M[np.minimum(np.searchsorted(ids_M, ids_N, sorter=order_M), len(ids_M) - 1)]
    return Scan(shards, np.where(ids_M[at_N] == ids_N, shard_M[at_N], -1), offset_M[at_N])


def ids_there(folder: Path, shards: Sequence[Shard]) -> Digests:
    """Return the addresses of all images of some shards, sorted; a shard whose addresses are corrupt has none."""
    parts = [np.zeros(0, DIGEST)]
    for shard in shards:
        with suppress(CorruptError):
            parts.append(read_ids(folder, shard))
    return np.sort(np.concatenate(parts))


def are_among(ids_N: Digests, sorted_M: Digests) -> Any:
    """Report which of the addresses are among the sorted ones: booleans (N,)."""
    if not len(sorted_M):
        return np.zeros(len(ids_N), dtype=bool)
    return sorted_M[np.minimum(np.searchsorted(sorted_M, ids_N), len(sorted_M) - 1)] == ids_N


def checked_ids(ids_N: Digests) -> Digests:
    """Return the addresses as an array; raise `DataError` where there are none."""
    ids_N = np.asarray(ids_N, dtype=DIGEST)
    if not len(ids_N):
        raise DataError("codes were requested of no image")
    return ids_N


def remove_orphans(folder: Path, is_idle: Callable[[str], bool]) -> None:
    """Remove files of no shard that counts; drafts where the writer of this name is idle: it is gone."""
    counting = set(record_names(folder))
    for path in folder.glob("*"):
        if path.name not in (OLDER_MANIFEST, _OLDER_USED) and _is_orphan(path, counting, is_idle):
            remove_whatever(path)


def _is_orphan(path: Path, counting: set[str], is_idle: Callable[[str], bool]) -> bool:
    first, *rest = path.name.lstrip(".").split(".")
    if not path.name.startswith("."):
        return first not in counting
    return is_idle(first) if path.suffix == SUFFIX else True  # records are written under the lock


def is_older(folder: Path) -> bool:
    return (folder / OLDER_MANIFEST).exists() or next(folder.glob("*.npy"), None) is not None


def problems_in(folder: Path) -> list[str]:
    """Return what is wrong in the folder of an entry; every byte is read."""
    if is_older(folder):
        return []  # nobody reads it
    return [fault for name in record_names(folder) for fault in _problems_in_shard(folder, name)]


def _problems_in_shard(folder: Path, name: str) -> list[str]:
    try:
        shard, values = read_record(folder, name, None)
        read_ids(folder, shard)
        check_values(folder, shard, verify=True)
        map_values(folder, shard, values)
    except FileNotFoundError:
        return []  # removed just now
    except CorruptError as error:
        return [str(error)]
    return []


def pieces_of(folder: Path) -> list[Piece]:
    """List what of an entry can be evicted, each with its size and time of last use."""
    if not os.access(folder, os.R_OK | os.X_OK):
        return []  # another user's own
    if is_older(folder):
        entry = entry_info(folder)
        return [Piece(folder.name, None, entry.num_bytes, entry.last_used_s)] if entry is not None else []
    sizes: Counter[str] = Counter()
    used_s: dict[str, float] = {}
    with suppress(FileNotFoundError):
        for path in folder.iterdir():
            found, name = path.stat(), path.name.split(".")[0]
            sizes[name] += found.st_size
            if path.suffix == ".json" and name:
                used_s[name] = found.st_mtime
    return [Piece(folder.name, name, sizes[name], last_used_s) for name, last_used_s in sorted(used_s.items())]


def remove_piece(folder: Path, piece: Piece) -> None:
    """Remove a shard, and the folder with the last."""
    assert piece.name is not None
    remove_shard(folder, piece.name)
    with suppress(OSError):
        folder.rmdir()  # only where nothing is left


def entry_info(folder: Path) -> Entry | None:
    """Describe an entry; None where it was removed just now."""
    key: Mapping[str, Any] | None = None
    num_rows, complete = 0, True
    for name in record_names(folder) if not is_older(folder) else []:
        try:
            shard, _ = read_record(folder, name, None)
            check_values(folder, shard, verify=False)
            key = json.loads((folder / f"{name}.json").read_text())["key"]
            num_rows += shard.num_rows
        except (OSError, CorruptError):
            complete = False
    try:
        if is_older(folder):
            return _older_entry_info(folder)
        used_s = [path.stat().st_mtime for path in folder.glob("[0-9a-f]*.json")] or [folder.stat().st_mtime]
        return Entry(folder.name, key, folder, size_of(folder), num_rows, max(used_s), complete and key is not None)
    except FileNotFoundError:
        return None


def _older_entry_info(folder: Path) -> Entry:
    key, num_rows = None, 0
    with suppress(OSError, ValueError, KeyError, TypeError):
        plain = json.loads((folder / OLDER_MANIFEST).read_text())
        key, num_rows = plain["key"], sum(shard["num_rows"] for shard in plain["shards"])
    used = folder / _OLDER_USED if (folder / _OLDER_USED).exists() else folder
    return Entry(
        folder.name, key, folder, size_of(folder), num_rows, used.stat().st_mtime, key is not None, is_older=True
    )


def size_of(folder: Path) -> int:
    """Return the bytes of its files."""
    total = 0
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total
