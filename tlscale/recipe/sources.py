"""The sources of images that a recipe may name, and the keys of `data` that only some of them take.

Promise: each row here has its reader in `tlscale.data.sources.open.SOURCES` (a test compares the two tables); all else
that depends on the source, from the check of a recipe to the keys of `evaluate`, is looked up here.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from tlscale.recipe.mistakes import InvalidValueError


@dataclass(frozen=True)
class SourceKeys:
    """Describe a source as a recipe knows it.

    Attributes:
        about: for the reference page.
        path: what `data.path` is: a folder or a file here, a name on the hub, or nothing that the source takes.
        keys: of those that only some sources take.
    """

    about: str
    path: Literal["folder", "file", "name", "none"]
    keys: frozenset[str] = frozenset()

    @property
    def is_local(self) -> bool:
        """Return whether `data.path` is a place on this machine."""
        return self.path in ("folder", "file")


_COLUMNS = frozenset(("image_column", "label_column", "label_columns", "label_separator", "group_column", "task"))

SOURCES: dict[str, SourceKeys] = {
    "fashion_mnist": SourceKeys("the data set, found by its name", "none", frozenset(("fallback",))),
    "folder": SourceKeys("a folder per class", "folder", frozenset(("class_folder", "exclude", "group_regex"))),
    "manifest": SourceKeys("a CSV or Parquet table", "file", _COLUMNS | {"exclude", "group_regex"}),
    "idx": SourceKeys("(gzipped) IDX files", "folder"),
    "hub": SourceKeys("a data set of the Hugging Face hub", "name", _COLUMNS | {"config", "revision"}),
    "disk": SourceKeys("a data set that `datasets` saved with `save_to_disk`", "folder", _COLUMNS),
}

SOURCE_KEYS: tuple[str, ...] = ("path", *sorted({key for source in SOURCES.values() for key in source.keys}))
"""Keys of `data` that some sources do not take."""


def check_source_keys(source: str, given: Collection[str]) -> None:
    """Check that the source has its path, and takes those of `SOURCE_KEYS` that have a value."""
    if SOURCES[source].path != "none" and "path" not in given:
        raise InvalidValueError(f"missing for source '{source}'", "Write where it is.", keys=["path", "source"])
    for key in SOURCE_KEYS:
        if key in given and not _takes(source, key):
            others = ", ".join(name for name in SOURCES if _takes(name, key))
            remedy = f"Remove it (or set data.{key}=null), or use a source that takes it: {others}."
            raise InvalidValueError(f"has no effect with source '{source}'", remedy, keys=[key, "source"])


def _takes(source: str, key: str) -> bool:
    return SOURCES[source].path != "none" if key == "path" else key in SOURCES[source].keys
