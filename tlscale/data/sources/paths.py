"""Find `data.path` on this machine."""

from __future__ import annotations

from pathlib import Path

from tlscale.errors import DataError
from tlscale.recipe.schema import DataSection


def local_path(section: DataSection) -> Path:
    """Return `data.path` as a place on this machine; relative paths start at the current folder."""
    assert section.path is not None, "the schema requires it of sources that have a path"
    return Path(section.path).expanduser()


def local_folder(section: DataSection) -> Path:
    """Return `data.path` as a folder.

    Raises:
        DataError: it is not there, or no folder.
    """
    folder = local_path(section)
    if not folder.is_dir():
        raise DataError(f"{folder} {'is not a folder' if folder.exists() else 'does not exist'}", key="data.path")
    return folder
