"""One entry of the store: its manifest, what of it can be relied on, and what is wrong with it.

Promise: a row is found only in a shard that is as it was written. What writes or removes here is for the holder of the
entry's lock.

Shape letters: N images that are asked for, M rows of all shards, R rows of one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tlscale import faults
from tlscale.codes.key import FORMAT, CodesKey, json_digest
from tlscale.codes.shards import (
    DamagedError,
    Ints,
    Shard,
    ValueSpec,
    check_values,
    map_values,
    read_record,
    read_rows,
    seal,
    shard_from_plain,
    specs_from_plain,
    unseal,
    write_record,
)
from tlscale.cores import num_cores
from tlscale.run_folder import flush, write_text

Say = Callable[[str], object]
MANIFEST = "manifest.json"
USED = "used"


@dataclass(frozen=True)
class Entry:
    """Facts about an entry, for lists."""

    digest: str
    key: Mapping[str, Any] | None
    """None where nothing can tell it any more."""
    path: Path
    num_bytes: int
    num_rows: int
    last_used_s: float
    """Seconds since 1970."""
    complete: bool
    """It has a manifest, and every file that it names, of the right size."""


@dataclass(frozen=True)
class Manifest:
    """What readers may see of an entry."""

    key: Mapping[str, Any]
    values: tuple[ValueSpec, ...]
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class Survey:
    """Where the rows that are asked for lie."""

    shards: tuple[Shard, ...]
    """Those whose rows are known and that are not known to be damaged."""
    shard_N: Ints
    """Place in `shards`; -1 where no shard has the row."""
    offset_N: Ints
    """Place in the shard."""
    damaged: tuple[Shard, ...] = ()

    @property
    def used(self) -> list[int]:
        """Places in `shards` of those that have a row that is asked for."""
        return [int(number) for number in np.unique(self.shard_N) if number >= 0]


def damage(folder: Path, error: DamagedError) -> str:
    """The line that a user reads about it."""
    return f"codes in '{folder}' are damaged, and not used: {error}"


def read_manifest(folder: Path, key: Mapping[str, Any] | None) -> Manifest:
    """The manifest of a folder; `key` None: whatever key it has, if it is the folder's.

    Raises:
        FileNotFoundError: there is none.
        DamagedError: it is not as it was written, or another key's.
    """
    plain = unseal(folder / MANIFEST)
    other = json_digest({"format": FORMAT, **plain["key"]}) != folder.name if key is None else plain["key"] != key
    if other:
        raise DamagedError(f"{MANIFEST} belongs to other codes")
    shards = tuple(map(shard_from_plain, plain["shards"]))
    return Manifest(plain["key"], specs_from_plain(plain["values"]), shards)


def write_manifest(folder: Path, key: Mapping[str, Any], values: Sequence[ValueSpec], shards: Sequence[Shard]) -> None:
    """Make exactly these shards visible; `OSError` where the disk does not take it."""
    ordered = sorted({shard.name: shard for shard in shards}.values(), key=lambda shard: shard.name)
    for shard in ordered:
        _renew_record(folder, key, shard, values)
    plain = {"format": FORMAT, "key": key, "values": [spec.to_plain() for spec in values]}
    faults.at("codes.manifest")
    write_text(folder / MANIFEST, seal({**plain, "shards": [shard.to_plain() for shard in ordered]}))
    flush(folder)


def _renew_record(folder: Path, key: Mapping[str, Any], shard: Shard, values: Sequence[ValueSpec]) -> None:
    try:
        sound = read_record(folder, shard.name, key) == (shard, tuple(values))
    except (DamagedError, FileNotFoundError):
        sound = False
    if not sound:
        write_record(folder, key, shard, values)


def look_for(folder: Path, shards: Sequence[Shard], rows_N: Ints, *, verify: bool, say: Say) -> Survey:
    """Find the rows; of the values only those of shards that are used are read, and each once."""
    held, damaged = _checked(shards, lambda shard: read_rows(folder, shard), folder, say)
    sound: set[str] = set()
    while True:
        survey = _located(held, rows_N)
        unsure = [survey.shards[number] for number in survey.used if survey.shards[number].name not in sound]
        passed, failed = _checked(unsure, lambda shard: check_values(folder, shard, verify=verify), folder, say)
        if not failed:
            return replace(survey, damaged=tuple(damaged))
        sound |= {shard.name for shard, _ in passed}
        damaged += failed
        gone = {shard.name for shard in failed}  # another shard may have its rows
        held = [(shard, rows_R) for shard, rows_R in held if shard.name not in gone]


def _checked(
    shards: Sequence[Shard], check: Callable[[Shard], Any], folder: Path, say: Say
) -> tuple[list[tuple[Shard, Any]], list[Shard]]:
    """The shards that pass, each with what `check` gives, and those that do not."""

    def outcome_of(shard: Shard) -> Any:
        try:
            return check(shard)
        except DamagedError as error:
            return error

    passed, failed = [], []
    with ThreadPoolExecutor(num_cores()) as pool:  # hashing releases the interpreter's lock
        for shard, outcome in zip(shards, pool.map(outcome_of, shards), strict=True):
            if isinstance(outcome, DamagedError):
                say(damage(folder, outcome))
                failed.append(shard)
            else:
                passed.append((shard, outcome))
    return passed, failed


def _located(held: Sequence[tuple[Shard, Ints]], rows_N: Ints) -> Survey:
    shards = tuple(shard for shard, _ in held)
    if not held:
        return Survey(shards, np.full(len(rows_N), -1), np.zeros(len(rows_N), np.int64))
    rows_M = np.concatenate([rows_R for _, rows_R in held])
    shard_M = np.repeat(np.arange(len(held)), [len(rows_R) for _, rows_R in held])
    offset_M = np.concatenate([np.arange(len(rows_R)) for _, rows_R in held])
    order_M = np.argsort(rows_M, kind="stable")
    at_N = order_M[np.minimum(np.searchsorted(rows_M, rows_N, sorter=order_M), len(rows_M) - 1)]
    return Survey(shards, np.where(rows_M[at_N] == rows_N, shard_M[at_N], -1), offset_M[at_N])


def unlisted_shards(
    folder: Path, key: CodesKey, listed: Collection[str], values: tuple[ValueSpec, ...], say: Say
) -> tuple[list[Shard], tuple[ValueSpec, ...]]:
    """Finished shards that no manifest names, and the values of all.

    Args:
        listed: names of the shards that the manifest has.
        values: what the manifest has; without one, the first shard's count.
    """
    found = []
    for path in sorted(folder.glob("[0-9a-f]*.json")):
        if path.stem in listed:
            continue
        try:
            shard, its_values = read_record(folder, path.stem, key.to_plain())
        except DamagedError as error:
            say(damage(folder, error))
            continue
        values = values or its_values
        if its_values == values:
            found.append(shard)
    return found, values


def remove_strays(folder: Path, kept: Collection[str]) -> None:
    """Remove files of no shard in `kept`: only the lock's holder writes, so nobody is at work on them."""
    for path in folder.glob("*"):
        if path.name not in (MANIFEST, USED) and path.name.split(".")[0] not in kept:
            path.unlink(missing_ok=True)


def faults_of(folder: Path) -> list[str]:
    """What is wrong in the folder of an entry; every byte is read."""
    try:
        manifest = read_manifest(folder, None)
    except FileNotFoundError:
        return []  # a writer was killed, or is at work
    except DamagedError as error:
        return [str(error)]
    return [fault for shard in manifest.shards for fault in _faults_of_shard(folder, shard, manifest)]


def _faults_of_shard(folder: Path, shard: Shard, manifest: Manifest) -> list[str]:
    def check_arrays() -> None:
        read_rows(folder, shard)
        check_values(folder, shard, verify=True)
        map_values(folder, shard, manifest.values)

    def check_record() -> None:
        if read_record(folder, shard.name, manifest.key) != (shard, manifest.values):
            raise DamagedError(f"{shard.name}.json does not agree with {MANIFEST}")

    faults = []
    for check in (check_arrays, check_record):
        try:
            check()
        except FileNotFoundError:
            faults.append(f"{shard.name}.json is missing")
        except DamagedError as error:
            faults.append(str(error))
    return faults


def facts_of(folder: Path) -> Entry | None:
    """The facts of an entry; None where it was removed just now."""
    key: Mapping[str, Any] | None = None
    shards: tuple[Shard, ...] = ()
    complete = False
    try:
        manifest = read_manifest(folder, None)
        key, shards = manifest.key, manifest.shards
        complete = all(_is_there(folder, shard) for shard in shards)
    except (FileNotFoundError, DamagedError):
        for path in sorted(folder.glob("[0-9a-f]*.json")):
            with suppress(OSError, DamagedError):
                plain = unseal(path)
                key, shards = plain["key"], (*shards, shard_from_plain(plain["shard"]))
    try:
        used = folder / USED if (folder / USED).exists() else folder
        last_used_s, num_bytes = used.stat().st_mtime, size_of(folder)
    except FileNotFoundError:
        return None
    num_rows = sum(shard.num_rows for shard in shards)
    return Entry(folder.name, key, folder, num_bytes, num_rows, last_used_s, complete)


def _is_there(folder: Path, shard: Shard) -> bool:
    try:
        check_values(folder, shard, verify=False)
    except DamagedError:
        return False
    return True


def size_of(folder: Path) -> int:
    """Bytes of its files."""
    total = 0
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total
