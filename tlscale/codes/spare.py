"""Store codes for one run alone, where the cache is read-only or another user's."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable
from pathlib import Path

from tlscale.codes.shards import write_error
from tlscale.storage.cache import is_forbidden, is_no_folder, make_cache_folder, say_not_cached


def obstacle(paths: Iterable[Path]) -> OSError | None:
    """Return why one of these files or folders cannot be written to; None where each that exists can be."""
    for path in paths:
        if os.path.exists(path) and not os.access(path, os.W_OK):
            why = errno.EROFS if os.statvfs(path).f_flag & os.ST_RDONLY else errno.EACCES
            return OSError(why, os.strerror(why), str(path))
    return None


class SpareFolder:
    """Make a temporary folder when codes cannot be stored; it is removed with this object.

    Args:
        root: of the codes.
        locks: the folder of their locks.
    """

    def __init__(self, root: Path, locks: Path) -> None:
        self._root, self._locks = root, locks
        self.must_cache = False
        """Codes that cannot be stored for other runs are an error."""
        self._path: Path | None = None

    def root_for(self, places: Iterable[Path]) -> Path | None:
        """Return the folder where codes go that cannot be stored at these places of the cache; None where they can.

        Raises:
            TlscaleError: they cannot, and `must_cache`; or the disk fails.
        """
        error = self._why_not(places)
        if error is None:
            return None
        if self.must_cache:
            raise write_error(self._root, 0, error)
        say_not_cached(self._root, error)
        if self._path is None:
            self._path = Path(tempfile.mkdtemp(prefix="tlscale-codes-"))
            weakref.finalize(self, shutil.rmtree, self._path, ignore_errors=True)
        return self._path

    def _why_not(self, places: Iterable[Path]) -> OSError | None:
        try:
            make_cache_folder(self._locks)
        except OSError as error:
            if is_forbidden(error) or is_no_folder(error):
                return error
            raise write_error(self._root, 0, error) from error
        return obstacle((self._root, self._locks, *places))
