"""The store of codes: one folder per key, in it shards of rows, and one manifest that makes them visible.

Promise: what is read agrees with its manifest to the last bit, or counts as missing. A writer that is killed at any
moment leaves nothing that is read, and what it finished is used by the next one. Entries that were not used for longest
go first, never one that a writer holds.

    ROOT/<digest of the key>/manifest.json, <shard>.json, <shard>.*.npy     see `tlscale.codes.shards`
                             used                                           empty; its time is that of the last use
    ROOT/locks/<digest>                                                     held by who writes; dies with the process

Readers hold no lock. On Linux an entry that is evicted under a reader stays readable until that one ends.

Shape letters: N images that are asked for, M rows of all shards, R rows of one, B images of a batch.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from filelock import FileLock, Timeout
from torch import Tensor

from tlscale.codes.entry import (
    USED,
    Entry,
    Manifest,
    Say,
    damage,
    facts_of,
    faults_of,
    look_for,
    read_manifest,
    remove_strays,
    size_of,
    unlisted_shards,
    write_manifest,
)
from tlscale.codes.key import CodesKey
from tlscale.codes.reading import Codes as Codes  # callers find it here, beside the store
from tlscale.codes.shards import (
    SHARD_BYTES,
    DamagedError,
    Ints,
    Shard,
    ValueSpec,
    map_values,
    remove_shard,
    write_error,
    write_shard,
)
from tlscale.errors import DataError, TlscaleError, did_you_mean

_LOCKS = "locks"
_ASIDE = ".removed-"
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)


def _silent(text: str) -> None:
    pass


def codes_root() -> Path:
    """Where codes are kept: `$TLSCALE_CACHE/codes`."""
    return Path(os.environ.get("TLSCALE_CACHE") or Path.home() / ".cache" / "tlscale") / "codes"


@dataclass(frozen=True)
class Stock:
    """What an entry has of the rows that are asked for."""

    values: tuple[ValueSpec, ...]
    """Empty while no shard is there."""
    shards: tuple[Shard, ...]
    """Those that can be relied on."""
    missing_R: Ints
    """Ascending."""
    is_committed: bool
    """The manifest names exactly these shards."""


class CodesStore:
    """Codes below one folder; see the head of this file.

    Args:
        root: by itself `codes_root()`.
        limit_bytes: most bytes of all entries; None: no limit.
        shard_bytes: about the size of a shard.
    """

    def __init__(
        self, root: Path | None = None, limit_bytes: int | None = None, *, shard_bytes: int = SHARD_BYTES
    ) -> None:
        self.root = codes_root() if root is None else root
        self.limit_bytes, self.shard_bytes = limit_bytes, shard_bytes

    def folder(self, key: CodesKey) -> Path:
        """Where the codes of this key are, or would be."""
        return self.root / key.digest()

    # --- Reading, without a lock --------------------------------------------------------------------------------------

    def open(self, key: CodesKey, rows_N: Ints, *, verify: bool = True, say: Say = _silent) -> Codes | None:
        """The codes of these rows of the table, where every one is there and as it was written; else None.

        Args:
            rows_N: distinct rows of the table, in any order.
            verify: compare every byte of the shards that are used with the manifest, not only the sizes.
            say: gets a line for each damage that is found.

        Raises:
            DataError: a row is asked for twice.
        """
        rows_N, folder = checked_rows(rows_N), self.folder(key)
        manifest = self._known(key, say)
        if manifest is None:
            return None
        survey = look_for(folder, manifest.shards, rows_N, verify=verify, say=say)
        if (survey.shard_N < 0).any():
            return None
        try:
            mapped = {number: map_values(folder, survey.shards[number], manifest.values) for number in survey.used}
        except DamagedError as error:
            say(damage(folder, error))
            return None
        with suppress(OSError):  # a cache that we may only read, or an entry that was evicted just now
            (folder / USED).touch()
        maps = [{number: arrays[i] for number, arrays in mapped.items()} for i in range(len(manifest.values))]
        return Codes(folder, manifest.values, rows_N, survey.shard_N, survey.offset_N, maps)

    def open_within(self, key: CodesKey, rows_N: Ints, *, verify: bool = True, say: Say = _silent) -> Codes | None:
        """The codes of these rows from an entry that has the wanted values among others; None where there is none.

        Raises:
            DataError: a row is asked for twice.
        """
        wanted = list(zip(key.layers, key.pools, strict=True))
        for entry in self.entries():
            if entry.key is None or not entry.complete:
                continue
            other = replace(key, layers=tuple(entry.key["layers"]), pools=tuple(entry.key["pools"]))
            there = list(zip(other.layers, other.pools, strict=True))
            if other != key and set(wanted) <= set(there) and other.to_plain() == entry.key:
                codes = self.open(other, rows_N, verify=verify, say=say)
                if codes is not None:
                    return codes.select([there.index(pair) for pair in wanted])
        return None

    def missing(self, key: CodesKey, rows_N: Ints, *, verify: bool = True, say: Say = _silent) -> Ints:
        """Those of the rows that `open` would not find, ascending; arguments and errors as there."""
        rows_N = checked_rows(rows_N)
        manifest = self._known(key, say)
        shards = manifest.shards if manifest is not None else ()
        survey = look_for(self.folder(key), shards, rows_N, verify=verify, say=say)
        return np.sort(rows_N[survey.shard_N < 0])

    def _known(self, key: CodesKey, say: Say) -> Manifest | None:
        folder = self.folder(key)
        try:
            return read_manifest(folder, key.to_plain())
        except FileNotFoundError:
            return None
        except DamagedError as error:
            say(damage(folder, error))
            return None

    # --- Writing, under the lock --------------------------------------------------------------------------------------

    def try_lock(self, key: CodesKey, timeout_s: float) -> FileLock | None:
        """The lock of the entry, held; None where another process holds it for longer than that.

        Raises:
            TlscaleError: the folder cannot be written.
        """
        return self._try_lock(key.digest(), timeout_s)

    def _try_lock(self, digest: str, timeout_s: float) -> FileLock | None:
        try:
            (self.root / _LOCKS).mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.root / _LOCKS / digest, timeout=timeout_s)
            lock.acquire()
        except Timeout:
            return None
        except OSError as error:
            raise write_error(self.root, 0, error) from error
        return lock

    def take_stock(self, key: CodesKey, rows_N: Ints, say: Say = _silent) -> Stock:
        """What is there of these rows, finished shards of killed writers included; the rest of those is removed.

        For who holds the lock. Damaged shards are removed as well, loudly.
        """
        rows_N, folder = checked_rows(rows_N), self.folder(key)
        manifest = self._known(key, say)
        listed = manifest.shards if manifest is not None else ()
        before = {shard.name for shard in listed}
        unlisted, values = unlisted_shards(folder, key, before, manifest.values if manifest is not None else (), say)
        survey = look_for(folder, [*listed, *unlisted], rows_N, verify=True, say=say)
        for shard in survey.damaged:
            remove_shard(folder, shard.name)
        remove_strays(folder, {shard.name for shard in survey.shards})
        wanted = before | {survey.shards[number].name for number in survey.used}
        shards = tuple(shard for shard in survey.shards if shard.name in wanted)
        is_committed = manifest is not None and {shard.name for shard in shards} == before
        return Stock(values if survey.shards else (), shards, np.sort(rows_N[survey.shard_N < 0]), is_committed)

    def write_shard(self, key: CodesKey, rows_R: Ints, values: Sequence[Tensor], specs: Sequence[ValueSpec]) -> Shard:
        """Write the codes of these rows (ascending); they are visible when they are committed.

        Raises:
            TlscaleError: the disk is full or cannot be written.
        """
        return write_shard(self.folder(key), key.to_plain(), rows_R, values, specs)

    def commit(self, key: CodesKey, values: Sequence[ValueSpec], shards: Sequence[Shard]) -> None:
        """Make exactly these shards visible, at once.

        Raises:
            TlscaleError: the disk is full or cannot be written.
        """
        folder = self.folder(key)
        try:
            write_manifest(folder, key.to_plain(), values, shards)
            (folder / USED).touch()
        except OSError as error:
            raise write_error(folder, 0, error) from error

    def make_room(self, key: CodesKey, num_bytes: int, say: Say = _silent) -> None:
        """Evict other entries, those that were not used for longest first, until so many bytes more are allowed.

        Raises:
            TlscaleError: they exceed the limit by themselves, or the disk has no room for them.
        """
        digest = key.digest()
        if self.limit_bytes is not None:
            wanted = num_bytes + sum(entry.num_bytes for entry in self.entries() if entry.digest == digest)
            if wanted > self.limit_bytes:
                raise TlscaleError(
                    f"the codes in '{self.folder(key)}' need {_gib(wanted)}, but all codes may take "
                    f"{_gib(self.limit_bytes)}: raise codes.cache_gib, or keep less (codes.dtype, codes.pool, fewer "
                    "images or views)"
                )
            self._evict(self.limit_bytes - num_bytes, {digest}, say)
        free = shutil.disk_usage(nearest_folder(self.root)).free
        if free < num_bytes:
            raise TlscaleError(
                f"the codes need {_gib(num_bytes)} in '{self.folder(key)}', but that disk has {_gib(free)} left. Make "
                "room there ('tlscale codes prune' removes codes), or set TLSCALE_CACHE to a folder elsewhere"
            )

    # --- Looking after it ---------------------------------------------------------------------------------------------

    def entries(self) -> list[Entry]:
        """All entries, the one that was used last first."""
        found = [facts_of(self.root / digest) for digest in self._digests()]
        return sorted((entry for entry in found if entry), key=lambda entry: (-entry.last_used_s, entry.digest))

    def verify(self, digest: str | None = None) -> list[str]:
        """What is wrong with an entry, or with all: every file is read. Of a writer that was killed, nothing is wrong.

        Args:
            digest: or its first digits.

        Raises:
            TlscaleError: there is no such entry.
        """
        digests = self._digests() if digest is None else [self._resolve(digest)]
        return [f"{self.root / name}: {fault}" for name in digests for fault in faults_of(self.root / name)]

    def prune(self, what: int | Literal["all"] | Collection[str], say: Say = _silent) -> int:
        """Remove entries, none of them while it is being written.

        Args:
            what: the bytes that may stay (those that were used last do), `all`, or digests or their first digits.

        Returns:
            Bytes that were freed.

        Raises:
            TlscaleError: there is no such entry.
        """
        if isinstance(what, int):
            return self._evict(what, set(), say)
        digests = self._digests() if what == "all" else [self._resolve(digest) for digest in what]
        return sum(self._remove(digest, say) for digest in digests)

    def _digests(self) -> list[str]:
        if not self.root.is_dir():
            return []
        return sorted(path.name for path in self.root.iterdir() if _DIGEST.fullmatch(path.name) and path.is_dir())

    def _resolve(self, start: str) -> str:
        there = self._digests()
        matching = [digest for digest in there if start and digest.startswith(start)]
        if len(matching) != 1:
            what = f"several codes in '{self.root}' begin" if matching else f"no codes in '{self.root}' begin"
            names = ", ".join(digest[:12] for digest in matching or there) or "none"
            raise TlscaleError(f"{what} with {start!r}; there are {names}.{did_you_mean(start, there)}")
        return matching[0]

    def _evict(self, limit_bytes: int, sparing: Collection[str], say: Say) -> int:
        entries = self.entries()
        total, freed = sum(entry.num_bytes for entry in entries), 0
        for entry in reversed(entries):
            if total - freed <= limit_bytes:
                break
            if entry.digest not in sparing:
                freed += self._remove(entry.digest, say)
        return freed

    def _remove(self, digest: str, say: Say) -> int:
        """Bytes that were freed: none where somebody writes to the entry."""
        for left in self.root.glob(f"{_ASIDE}*"):  # of a process that was killed while it removed
            shutil.rmtree(left, ignore_errors=True)
        folder = self.root / digest
        lock = self._try_lock(digest, 0)
        if lock is None:
            say(f"codes in '{folder}' are being written, and stay")
            return 0
        try:
            size, aside = size_of(folder), self.root / f"{_ASIDE}{digest}.{os.getpid()}"
            folder.rename(aside)  # gone at once, for all readers
            shutil.rmtree(aside, ignore_errors=True)
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise TlscaleError(f"cannot remove the codes in '{folder}': {error.strerror or error}") from error
        finally:
            lock.release()
        say(f"codes removed: {_gib(size)} in '{folder}'")
        return size


def nearest_folder(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(place for place in (path, *path.absolute().parents) if place.is_dir())


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def checked_rows(rows_N: Ints) -> Ints:
    """The rows as int64.

    Raises:
        DataError: none, a negative one, or one of them twice.
    """
    rows_N = np.array(rows_N, dtype=np.int64)
    rows, counts = np.unique(rows_N, return_counts=True)
    if not len(rows) or rows[0] < 0:
        raise DataError("codes were asked for of no image" if not len(rows) else f"there is no row {rows[0]}")
    if len(rows) < len(rows_N):
        raise DataError(f"the codes of row {rows[counts > 1][0]} were asked for {counts.max()} times; once is enough")
    return rows_N
