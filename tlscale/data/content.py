"""Content digests: an image is identified by a hash of its bytes, whatever its name and place.

Promise: equal digests mean equal images, in every process and on every machine. The index saves reading twice; it never
vouches for a file that may have changed since: what it remembers is bound to the inode, size and times of the file, and
files that were changed just before they were checked are not remembered.

Shape letters: N images.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tlscale.storage.cache import cache_root, make_cache_folder, say_not_cached, share_with_group

Digests = npt.NDArray[np.bytes_]
DIGEST = np.dtype("S32")
"""SHA-256. NumPy drops zero bytes at the end of single items; among items of one width that loses nothing."""
_SETTLED_NS = 2 * 10**9  # the coarsest clock of a file system (FAT) ticks once in two seconds
_BUSY_S = 5.0
_MASK63 = 2**63 - 1
_TABLE = "CREATE TABLE IF NOT EXISTS contents (stamp BLOB PRIMARY KEY, digest BLOB, seal BLOB) WITHOUT ROWID"


def content_digest(raw: bytes | npt.NDArray[Any]) -> bytes:
    """Return the SHA-256 of an encoded image as it is, or of decoded pixels with their type and shape; 32 bytes."""
    if isinstance(raw, bytes):
        return hashlib.sha256(raw).digest()
    total = hashlib.sha256(f"tlscale pixels {raw.dtype.str} {raw.shape} ".encode())
    total.update(np.ascontiguousarray(raw).data)
    return total.digest()


def digest_of_parts(parts: Iterable[bytes | str]) -> str:
    """Return the SHA-256, in hex, of parts and their lengths."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "little"))
        total.update(data)
    return total.hexdigest()


def digest_array(digests: Sequence[bytes]) -> Digests:
    """Return digests as an array."""
    return np.array(list(digests), dtype=DIGEST)


def digest_bytes(digests_N: Digests) -> list[bytes]:
    """Return digests as bytes, all of full width."""
    width, whole = digests_N.dtype.itemsize, digests_N.tobytes()
    return [whole[start : start + width] for start in range(0, len(whole), width)]


def file_stamp(found: os.stat_result) -> tuple[int, int, int, int, int]:
    """Return what changes when a file does: device, inode, size, times of the last write and of the last change, ns."""
    # Numbers of devices and inodes may have 64 bits; in 63 they fit into signed integers.
    device, inode = found.st_dev & _MASK63, found.st_ino & _MASK63
    return device, inode, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def stamp_bytes(stats: Iterable[int], looked_ns: int) -> bytes | None:
    """Return what the index knows a file by; None where it cannot be relied on.

    Args:
        stats: of `file_stamp`.
        looked_ns: when they were looked up. A file that was changed just before may change again within one tick of
            its clock; one of the future was changed by another clock.
    """
    device, inode, size, written_ns, changed_ns = map(int, stats)
    if not inode or max(written_ns, changed_ns) + _SETTLED_NS > looked_ns:
        return None
    return b"".join(v.to_bytes(16, "little", signed=True) for v in (device, inode, size, written_ns, changed_ns))


class ContentIndex:
    """Digests of files that were read before, in one small database; where it cannot be used, files are read again."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path if path is not None else cache_root() / "contents.sqlite"

    def look_up(self, stamps: Iterable[bytes]) -> dict[bytes, bytes]:
        """Return the digests of those of the stamps that are known."""
        found: dict[bytes, bytes] = {}
        wanted = list(stamps)
        if not wanted or not os.path.exists(self.path):  # unlike pathlib's, False where we may not look
            return found
        with suppress(sqlite3.Error, OSError), closing(sqlite3.connect(self.path, timeout=_BUSY_S)) as database:
            for start in range(0, len(wanted), 500):
                some = wanted[start : start + 500]
                query = f"SELECT stamp, digest, seal FROM contents WHERE stamp IN ({','.join('?' * len(some))})"
                rows = database.execute(query, some).fetchall()
                found |= {stamp: digest for stamp, digest, seal in rows if seal == _seal(stamp, digest)}
        return found

    def add(self, digests: Mapping[bytes, bytes]) -> None:
        """Remember digests by stamp."""
        if not digests:
            return
        rows = [(stamp, digest, _seal(stamp, digest)) for stamp, digest in digests.items()]
        try:
            make_cache_folder(self.path.parent)
            with suppress(sqlite3.Error):
                with closing(sqlite3.connect(self.path, timeout=_BUSY_S)) as database, database:
                    database.execute(_TABLE)
                    database.executemany("INSERT OR REPLACE INTO contents VALUES (?, ?, ?)", rows)
                share_with_group(self.path)
        except OSError as error:
            say_not_cached(self.path.parent, error)


def _seal(stamp: bytes, digest: bytes) -> bytes:
    return hashlib.sha256(stamp + digest).digest()[:8]  # a database may be damaged


class Contents:
    """The digests of the images of a table, as far as they are known."""

    def __init__(self, num_images: int) -> None:
        self.digests_N = np.zeros(num_images, DIGEST)
        self.known_N = np.zeros(num_images, dtype=bool)
        self.read_N = np.zeros(num_images, dtype=bool)
        """Whether the digest is of what was read here, and not from the index or another process."""
        self.saved_N = np.zeros(num_images, dtype=bool)
        """Whether the index has it."""

    def note(self, row: int, raw: bytes | npt.NDArray[Any]) -> bytes:
        """Hash what was read, and keep its digest."""
        digest = content_digest(raw)
        if self.saved_N[row] and digest != self.digests_N[row].ljust(DIGEST.itemsize, b"\0"):
            self.saved_N[row] = False  # the file changed since it was looked up
        self.digests_N[row] = digest
        self.known_N[row] = self.read_N[row] = True
        return digest

    def recall(self, rows_N: npt.NDArray[np.int64], stamps_N: Sequence[bytes | None], index: ContentIndex) -> None:
        """Take from the index what it knows of these rows."""
        found = index.look_up(stamp for stamp in stamps_N if stamp is not None)
        for row, stamp in zip(rows_N.tolist(), stamps_N, strict=True):
            if stamp is not None and stamp in found:
                self.digests_N[row] = found[stamp]
                self.known_N[row] = self.saved_N[row] = True

    def take(self, rows_N: npt.NDArray[np.int64], digests_N: Digests) -> None:
        """Take what another process read."""
        self.digests_N[rows_N] = digests_N
        self.known_N[rows_N] = True

    def unsaved(self) -> npt.NDArray[np.int64]:
        """Return the rows that were read here and that the index does not have."""
        return np.flatnonzero(self.read_N & ~self.saved_N)

    def remember(self, rows_N: npt.NDArray[np.int64], stamps_N: Sequence[bytes | None], index: ContentIndex) -> None:
        """Give the index what was read of these rows."""
        digests = digest_bytes(self.digests_N[rows_N])
        index.add({stamp: digest for stamp, digest in zip(stamps_N, digests, strict=True) if stamp is not None})
        self.saved_N[rows_N] = True
