"""Store codes: one folder per key, in it shards, each with the codes of some images.

Promise: a row belongs to the address of an image, which follows from its content, and to no place in a split. What is
read agrees with its record to the last bit, or counts as missing. A writer that is killed at any moment leaves nothing
half written that is read, and what it finished is used by the next one. The least recently used shards are evicted
first, never those of an entry that another run writes to.

    ROOT/<digest of the key>/<shard>.json, <shard>.*.safetensors    see `tlscale.codes.shards`
    ROOT/locks/<digest>                                     held for moments: by who gives a shard its place, or removes
    ROOT/locks/<digest>.<request>                           held by who computes this request; dies with the process

Readers hold no lock. Runs that want other images of an entry do not wait for each other. On Linux a shard that is
evicted under a reader stays readable until that one ends.

Shape letters: N images that are requested, R images of a shard.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout
from torch import Tensor

from tlscale.codes.entry import (
    Entry,
    Piece,
    Say,
    are_among,
    checked_ids,
    describe_corruption,
    entry_info,
    ids_there,
    pieces_of,
    problems_in,
    read_shards,
    remove_orphans,
    remove_piece,
    scan_shards,
    size_of,
)
from tlscale.codes.key import CodesKey
from tlscale.codes.reader import Codes, Column
from tlscale.codes.shards import (
    SHARD_BYTES,
    CorruptError,
    ValueSpec,
    map_values,
    place_shard,
    remove_shard,
    write_error,
    write_shard,
)
from tlscale.codes.spare import SpareFolder, obstacle
from tlscale.data.content import Digests
from tlscale.errors import TlscaleError, suggestion
from tlscale.storage.cache import cache_root, make_cache_folder, nearest_folder, share_with_group

Bools = npt.NDArray[np.bool_]
_LOCKS = "locks"
_ASIDE = ".removed-"
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)


def _silent(text: str) -> None:
    pass


@dataclass(frozen=True)
class Inventory:
    """List what an entry has."""

    values: tuple[ValueSpec, ...]
    """Empty while no shard is there."""
    there_M: Digests
    """Addresses of all images, sorted."""
    used: frozenset[str]
    """Names of the shards that have requested images."""

    def has(self, ids_N: Digests) -> Bools:
        found: Bools = are_among(ids_N, self.there_M)
        return found


class CodesStore:
    """Store codes below one folder, by default `$TLSCALE_CACHE/codes`; see the head of this file.

    All entries together have at most `limit_bytes`, where there is a limit; a shard has about `shard_bytes`.
    """

    def __init__(
        self, root: Path | None = None, limit_bytes: int | None = None, *, shard_bytes: int = SHARD_BYTES
    ) -> None:
        self.root = cache_root() / "codes" if root is None else root
        self.limit_bytes, self.shard_bytes = limit_bytes, shard_bytes
        self.spare = SpareFolder(self.root, self.root / _LOCKS)

    def folder(self, key: CodesKey) -> Path:
        """Return the folder of the codes of this key, which need not exist."""
        return self.root / key.digest()

    # --- Reading, without a lock --------------------------------------------------------------------------------------

    def open(self, key: CodesKey, ids_N: Digests, *, verify: bool = True, say: Say = _silent) -> Codes | None:
        """Open the codes of these images, where every one is there and as it was written; else return None.

        The addresses come in any order, also several times. `verify` compares every byte of the shards that are used
        with their records, not only the sizes; `say` gets a line for each corruption that is found.

        Raises:
            DataError: no image is requested.
        """
        ids_N, folder = checked_ids(ids_N), self.folder(key)
        values, shards = read_shards(folder, key, say)
        scan = scan_shards(folder, shards, ids_N, verify=verify, say=say)
        if (scan.shard_N < 0).any():
            return None
        try:
            mapped = {number: map_values(folder, scan.shards[number], values) for number in scan.used}
        except CorruptError as error:
            say(describe_corruption(folder, error))
            return None
        self._touch(key, {scan.shards[number].name for number in scan.used})
        maps = [{number: arrays[i] for number, arrays in mapped.items()} for i in range(len(values))]
        columns = [Column(spec, scan.shard_N, scan.offset_N, its) for spec, its in zip(values, maps, strict=True)]
        return Codes(folder, len(ids_N), columns)

    def _touch(self, key: CodesKey, names: Collection[str]) -> None:
        for name in names:
            with suppress(OSError):  # a cache that we may only read, or a shard that was evicted just now
                os.utime(self.folder(key) / f"{name}.json")

    # --- Writing ------------------------------------------------------------------------------------------------------

    def try_lock(self, keys: Sequence[CodesKey], request: str) -> list[FileLock] | None:
        """Take the locks of a request in the entries of its keys; return None where another process holds one of them.

        `request` tells which images are requested, in hex; a request for others does not wait.

        Raises:
            TlscaleError: the folder cannot be written.
        """
        held: list[FileLock] = []
        for digest in sorted(key.digest() for key in keys):
            with self._entry_lock(digest):
                lock = self._try_lock(f"{digest}.{request}")
            if lock is None:
                self.release(held)
                return None
            held.append(lock)
        return held

    def release(self, locks: Sequence[FileLock]) -> None:
        for lock in locks:
            path = Path(lock.lock_file)
            # Nobody takes it meanwhile; and a file that stays is as good as none once its lock is released.
            with suppress(OSError, TlscaleError), self._entry_lock(path.name.split(".")[0]):
                path.unlink(missing_ok=True)
            lock.release()

    def _try_lock(self, name: str, timeout_s: float = 0) -> FileLock | None:
        path = self.root / _LOCKS / name
        try:
            make_cache_folder(path.parent)
            lock = FileLock(path, timeout=timeout_s)
            lock.acquire()
            share_with_group(path)
        except Timeout:
            return None
        except OSError as error:
            raise write_error(self.root, 0, error) from error
        return lock

    @contextmanager
    def _entry_lock(self, digest: str) -> Iterator[None]:
        lock = self._try_lock(digest, timeout_s=-1)
        assert lock is not None
        with lock:
            yield

    def spare_root(self, keys: Sequence[CodesKey]) -> Path | None:
        """Return a folder for codes of this process alone, where those of the keys cannot be stored; else None."""
        return self.spare.root_for([place for key in keys for place in self._places(key.digest())])

    def _places(self, digest: str) -> tuple[Path, Path]:
        return self.root / digest, self.root / _LOCKS / digest

    def _is_idle(self, digest: str, request: str) -> bool:
        """Report whether nobody works on the request; for the holder of the entry's lock."""
        path = self.root / _LOCKS / f"{digest}.{request}"
        if not path.exists():
            return True
        lock = self._try_lock(path.name)
        if lock is None:
            return False
        path.unlink(missing_ok=True)
        lock.release()
        return True

    def _is_busy(self, digest: str, mine: str = "") -> bool:
        """Report whether a request other than mine is worked on; for the holder of the entry's lock."""
        requests = [path.name.split(".", 1)[1] for path in (self.root / _LOCKS).glob(f"{digest}.*")]
        return not all([self._is_idle(digest, request) for request in requests if request != mine])

    def take_inventory(self, key: CodesKey, ids_N: Digests, request: str, say: Say = _silent) -> Inventory:
        """List what is there; remove corrupt shards that are needed, and report them, and what killed writers left.

        The lock of the request is held; `ids_N` are the addresses of its images, as far as they are known.
        """
        digest, folder = key.digest(), self.folder(key)
        with self._entry_lock(digest):
            values, shards = read_shards(folder, key, say)
            scan = scan_shards(folder, shards, ids_N, verify=True, say=say)
            for shard in scan.corrupt:
                remove_shard(folder, shard.name)
            remove_orphans(folder, lambda writer: writer == request or self._is_idle(digest, writer))
        used = frozenset(scan.shards[number].name for number in scan.used)
        self._touch(key, used)
        return Inventory(values if scan.shards else (), ids_there(folder, scan.shards), used)

    def write_shard(
        self, key: CodesKey, ids_R: Digests, values: Sequence[Tensor], specs: Sequence[ValueSpec], request: str
    ) -> str:
        """Write codes as `shards.write_shard` does, so that they are there for all; return the shard's name."""
        shard = write_shard(self.folder(key), ids_R, values, request)
        with self._entry_lock(key.digest()):
            place_shard(self.folder(key), key.to_plain(), shard, specs, request)
        return shard.name

    def check_room(self, num_wanted: int, num_new: int) -> None:
        """Refuse codes that can never be stored, by the bytes of all and of those that are certainly not there.

        Raises:
            TlscaleError: they alone exceed the limit, or the disk has no room for them.
        """
        if self.limit_bytes is not None and num_wanted > self.limit_bytes:
            raise TlscaleError(
                f"the codes in '{self.root}' need {_gib(num_wanted)}, but all codes may take {_gib(self.limit_bytes)}",
                key="codes.cache_gib",
                remedy="Raise it, or cache less (codes.dtype, codes.pool, fewer images or views)",
            )
        free = shutil.disk_usage(nearest_folder(self.root)).free
        if free < num_new:
            raise TlscaleError(
                f"the codes need {_gib(num_new)} in '{self.root}', but that disk has {_gib(free)} left",
                remedy="Make room there ('tlscale codes prune' removes codes), or set TLSCALE_CACHE to a folder "
                "elsewhere",
            )

    def make_room(
        self, num_bytes: int, sparing: Collection[tuple[str, str]], request: str = "", say: Say = _silent
    ) -> None:
        """Evict least recently used shards until so many bytes more are allowed, but for what the `request` works on.

        Those to be spared are named by the digest of their entry and their name.
        """
        if self.limit_bytes is not None:
            self._evict(self.limit_bytes - num_bytes, sparing, request, say)

    # --- Looking after it ---------------------------------------------------------------------------------------------

    def entries(self) -> list[Entry]:
        """Return all entries, the most recently used first."""
        found = [entry_info(self.root / digest) for digest in self._digests()]
        return sorted((entry for entry in found if entry), key=lambda entry: (-entry.last_used_s, entry.digest))

    def verify(self, digest: str | None = None) -> list[str]:
        """Read every file of an entry (by its digest, or first digits), or of all; return what is wrong.

        Raises:
            TlscaleError: there is no such entry.
        """
        digests = self._digests() if digest is None else [self._resolve(digest)]
        return [f"{self.root / name}: {fault}" for name in digests for fault in problems_in(self.root / name)]

    def prune(self, what: int | Literal["all"] | Collection[str], say: Say = _silent) -> int:
        """Remove codes, none of an entry that is being written to; return the bytes that were freed.

        `what`: the bytes that may stay (of the most recently used), `all`, or entries by digests or their first digits.

        Raises:
            TlscaleError: there is no such entry.
        """
        if isinstance(what, int):
            return self._evict(what, (), "", say)
        digests = self._digests() if what == "all" else [self._resolve(digest) for digest in what]
        return sum(self._remove(digest, say) for digest in digests)

    def _digests(self) -> list[str]:
        if not os.path.isdir(self.root):
            return []
        return sorted(path.name for path in self.root.iterdir() if _DIGEST.fullmatch(path.name) and path.is_dir())

    def _resolve(self, start: str) -> str:
        there = self._digests()
        matching = [digest for digest in there if start and digest.startswith(start)]
        if len(matching) != 1:
            what = f"several codes in '{self.root}' begin" if matching else f"no codes in '{self.root}' begin"
            names = ", ".join(digest[:12] for digest in matching or there) or "none"
            raise TlscaleError(f"{what} with {start!r}; there are {names}", remedy=suggestion(start, there) or None)
        return matching[0]

    def _evict(self, limit_bytes: int, sparing: Collection[tuple[str, str]], mine: str, say: Say) -> int:
        pieces = [piece for digest in self._digests() for piece in pieces_of(self.root / digest)]
        total, freed = sum(piece.num_bytes for piece in pieces), 0
        busy: dict[str, bool] = {}
        for piece in sorted(pieces, key=lambda piece: (piece.last_used_s, piece.digest, piece.name or "")):
            if total - freed <= limit_bytes:
                break
            spared = (piece.digest, piece.name) in sparing or obstacle(self._places(piece.digest))  # another user's
            if spared or busy.get(piece.digest):
                continue
            removed = self._remove(piece.digest, say) if piece.name is None else self._remove_shard(piece, mine, say)
            busy[piece.digest], freed = removed is None, freed + (removed or 0)
        return freed

    def _remove_shard(self, piece: Piece, mine: str, say: Say) -> int | None:
        """Remove a shard; return the bytes that were freed, None where another run writes to the entry."""
        folder = self.root / piece.digest
        with self._entry_lock(piece.digest):
            if self._is_busy(piece.digest, mine):
                say(f"codes in '{folder}' are being written, and stay")
                return None
            try:
                remove_piece(folder, piece)
            except OSError as error:
                raise TlscaleError(f"cannot remove codes in '{folder}': {error.strerror or error}") from error
        say(f"codes removed: {_gib(piece.num_bytes)} in '{folder}'")
        return piece.num_bytes

    def _remove(self, digest: str, say: Say) -> int:
        """Remove an entry; return the bytes that were freed, 0 where somebody writes to the entry."""
        for left in self.root.glob(f"{_ASIDE}*"):  # of a process that was killed while it removed
            shutil.rmtree(left, ignore_errors=True)
        folder = self.root / digest
        with self._entry_lock(digest):
            if self._is_busy(digest):
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
        say(f"codes removed: {_gib(size)} in '{folder}'")
        return size


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
