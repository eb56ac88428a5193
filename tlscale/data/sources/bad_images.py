"""Find the images that cannot be read, for `data.on_bad_image: skip`, before anything is drawn from the splits.

Promise: every image of every split is tried, by its content: what was found sound once is not decoded again, wherever
it is and whatever its name is then. The findings below `$TLSCALE_CACHE/checked` only save time; none is relied on
for anything else, and a folder that cannot be written is no error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import PIL

from tlscale.data.content import content_digest
from tlscale.data.decode import decode_image
from tlscale.data.sources.tables import ImageSplit, RawStore, Role, SourceSplit
from tlscale.data.workers import map_in_threads
from tlscale.errors import DataError
from tlscale.recipe.schema import DataSection
from tlscale.storage.cache import cache_root, make_cache_folder, say_not_cached, share_with_group
from tlscale.storage.files import replacing, text_sha256

_BLOCK = 256  # images that a thread takes at once
_RULES = 2  # raise it when `decode_image` comes to refuse what it took before
_DIGEST_BYTES = 32


@dataclass(frozen=True)
class BadImages:
    """Images that a run skips, each with the reason."""

    found: Mapping[Role, Sequence[tuple[int, str]]] = field(default_factory=dict)
    """For each split of the source: rows of the whole split, ascending."""
    is_late: bool = False
    """Of a run of an older version: positions in the training split after the limit and the hold-out were drawn."""

    def __len__(self) -> int:
        return sum(map(len, self.found.values()))

    @property
    def counts(self) -> dict[Role, int]:
        """Number of skipped images by split, without those that have none."""
        return {role: len(rows) for role, rows in self.found.items() if rows}

    def reasons(self) -> Iterable[str]:
        """Yield one line an image."""
        return (f"{role} image {row}: {why}" for role, rows in self.found.items() for row, why in rows)

    def to_plain(self) -> Any:
        """Return plain values for `run.json`."""
        plain = {role: [[row, why] for row, why in rows] for role, rows in self.found.items() if rows}
        return plain.get("train", []) if self.is_late else plain

    @classmethod
    def from_plain(cls, plain: Any) -> BadImages:
        """Read what `to_plain` gave; a list is what older versions wrote."""
        if isinstance(plain, list):
            return cls({"train": [(int(row), str(why)) for row, why in plain]}, is_late=True)
        return cls({role: [(int(row), str(why)) for row, why in rows] for role, rows in plain.items()})


def find_bad(section: DataSection, splits: Mapping[Role, SourceSplit]) -> BadImages:
    """Try every image of every split."""
    max_pixels = round(section.max_megapixels * 1e6)
    known = _Checked(max_pixels)
    found = {role: find_bad_images(split.store, max_pixels=max_pixels, known=known) for role, split in splits.items()}
    known.save()
    return BadImages({role: rows for role, rows in found.items() if rows})


def find_bad_images(
    images: RawStore | ImageSplit, *, max_pixels: int, known: _Checked | None = None
) -> list[tuple[int, str]]:
    """Return the images that cannot be read, each with the reason; `known` gets those that are found sound."""

    def reason(row: int) -> tuple[int, str] | None:
        try:
            raw = images.read(row)
            # An array takes no decoding, and so nothing is remembered of it.
            digest = content_digest(raw) if known is not None and isinstance(raw, bytes) else None
            if known is None or digest not in known:
                decode_image(raw, in_chans=3, max_pixels=max_pixels, where=images.where(row))
            if known is not None and digest is not None:
                known.add(digest)
        except DataError as error:
            return row, error.problem
        return None

    rows = range(len(images))
    blocks = [rows[start : start + _BLOCK] for start in range(0, len(rows), _BLOCK)]
    found = map_in_threads(lambda block: [reason(row) for row in block], blocks)
    return [bad for block in found for bad in block if bad is not None]


class _Checked:
    """Digests of images that were decoded and found sound, by these rules and this Pillow."""

    def __init__(self, max_pixels: int) -> None:
        rules = f"{_RULES} {PIL.__version__} {max_pixels}"
        self._folder = cache_root() / "checked" / text_sha256(rules)[:16]
        self._known: set[bytes] = set()
        self._new: set[bytes] = set()
        for path in self._folder.glob("*.sha256"):
            try:
                held = path.read_bytes()
            except OSError:
                continue
            ends = range(_DIGEST_BYTES, len(held) + 1, _DIGEST_BYTES)
            self._known.update(held[end - _DIGEST_BYTES : end] for end in ends)

    def __contains__(self, digest: bytes | None) -> bool:
        return digest in self._known

    def add(self, digest: bytes) -> None:
        if digest not in self._known:
            self._new.add(digest)

    def save(self) -> None:
        """Write what is new to a file of its own, so that other processes lose nothing."""
        if not self._new:
            return
        content = b"".join(sorted(self._new))
        try:
            make_cache_folder(self._folder)
            with replacing(self._folder / f"{hashlib.sha256(content).hexdigest()[:32]}.sha256") as aside:
                aside.write_bytes(content)
                share_with_group(aside)
        except OSError as error:
            say_not_cached(self._folder, error)
