"""Find the images that cannot be read, before anything is drawn from the splits: for `data.on_bad_image: skip`, and for
`tlscale plan --check-images`.

Promise: every image of every split is tried, by its content: what was found sound once is not decoded again, wherever
it is and whatever its name is then, and not read again where the index of contents knows it. The findings below
`$TLSCALE_CACHE/checked` only save time; none is relied on for anything else, and a folder that cannot be written is no
error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import PIL

from tlscale.data.content import ContentIndex, content_digest
from tlscale.data.decode import PLAIN, Reading, decode_image
from tlscale.data.sources.tables import ImageSplit, RawStore, Role, SourceSplit
from tlscale.data.workers import map_in_threads
from tlscale.distributed.host import num_cores
from tlscale.distributed.signals import is_stopping, stopped_by
from tlscale.errors import DataError, Stopped
from tlscale.recipe.schema import DataSection
from tlscale.storage import faults
from tlscale.storage.cache import cache_root, make_cache_folder, say_not_cached, share_with_group
from tlscale.storage.files import replacing, text_sha256
from tlscale.tracking.progress import Pace

_DOING = "checking images"
_BLOCK = 256  # images that a thread takes at once
_RULES = 2  # raise it when `decode_image` comes to refuse what it took before
_DIGEST_BYTES = 32
_SAVE_EVERY = 20_000  # images, so that who is killed loses no more


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

    @property
    def rows(self) -> dict[Role, list[int]]:
        """Return which images are skipped, whatever the reasons: these name places, which `run.json` does not keep."""
        return {role: [row for row, _ in rows] for role, rows in self.found.items() if rows}

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


def find_bad(
    section: DataSection,
    splits: Mapping[Role, SourceSplit],
    *,
    in_chans: int | None = None,
    on_images: Callable[[int], None] | None = None,
) -> BadImages:
    """Try every image of every split.

    Args:
        in_chans: channels that the network takes; None: as many as an image has.
        on_images: called with a number of images whenever so many more are tried.

    Raises:
        Stopped: it was asked to stop; what was found sound by then stays known.
    """
    max_pixels = round(section.max_megapixels * 1e6)
    reading = Reading.of(section)
    known, found = _Checked(max_pixels, reading, in_chans), {}
    try:
        for role, split in splits.items():
            found[role] = find_bad_images(
                split.store,
                max_pixels=max_pixels,
                in_chans=in_chans,
                reading=reading,
                known=known,
                on_images=on_images,
            )
    finally:
        known.save()
    return BadImages({role: rows for role, rows in found.items() if rows})


def find_bad_images(
    images: RawStore | ImageSplit,
    *,
    max_pixels: int,
    in_chans: int | None = None,
    reading: Reading = PLAIN,
    rows: Sequence[int] | None = None,
    known: _Checked | None = None,
    on_images: Callable[[int], None] | None = None,
) -> list[tuple[int, str]]:
    """Return the images that cannot be read, each with the reason.

    Args:
        in_chans: as `find_bad`.
        rows: which to try; None: all.
        known: what was found sound before, of images of a store; what is found now is added.
        on_images: as `find_bad`.

    Raises:
        Stopped: as `find_bad`.
    """

    def try_block(block: Sequence[int]) -> tuple[list[tuple[int, str]], _Sound]:
        """Return the bad images, and the sound ones that were read."""
        bad: list[tuple[int, str]] = []
        sound: _Sound = {}
        for row, stamp in known.unknown(images, block) if known is not None else [(row, None) for row in block]:
            if _is_stopping():  # also of a block that has not begun: nobody waits for it
                break
            try:
                raw = images.read(row)
                # An array takes no decoding, and so nothing is remembered of it.
                digest = content_digest(raw) if known is not None and isinstance(raw, bytes) else None
                if known is None or digest not in known:
                    where = images.where(row)
                    decode_image(raw, in_chans=in_chans, max_pixels=max_pixels, where=where, reading=reading)
                if digest is not None:
                    sound[digest] = stamp
            except DataError as error:
                bad.append((row, error.problem))
        return bad, sound

    rows = range(len(images)) if rows is None else rows
    blocks = [rows[start : start + _BLOCK] for start in range(0, len(rows), _BLOCK)]
    found: list[tuple[int, str]] = []
    pace = Pace(len(rows), _DOING)
    for block, (bad, sound) in zip(blocks, map_in_threads(try_block, blocks, most=num_cores()), strict=True):
        found += bad
        if known is not None:
            known.add(sound)
        if not _is_stopping():
            (on_images or pace.add)(len(block))
    if _is_stopping():
        raise Stopped(f"stopped by {stopped_by()} while {_DOING}", remedy="Those that are sound are not decoded again")
    return found


def _is_stopping() -> bool:
    faults.ask_to_stop(_DOING)
    return is_stopping()


_Sound = dict[bytes, bytes | None]


class _Checked:
    """Digests of images that were decoded and found sound, by these rules and this Pillow."""

    def __init__(self, max_pixels: int, reading: Reading, in_chans: int | None) -> None:
        rules = f"{_RULES} {PIL.__version__} {max_pixels}" + ("" if reading == PLAIN else f" {reading}")
        rules += "" if in_chans in (1, 3) else f" channels: {in_chans}"  # of grey and RGB each becomes the other
        self._folder = cache_root() / "checked" / text_sha256(rules)[:16]
        self._known: set[bytes] = set()
        self._new: set[bytes] = set()
        self._index = ContentIndex()
        for path in self._folder.glob("*.sha256"):
            try:
                held = path.read_bytes()
            except OSError:
                continue
            ends = range(_DIGEST_BYTES, len(held) + 1, _DIGEST_BYTES)
            self._known.update(held[end - _DIGEST_BYTES : end] for end in ends)

    def __contains__(self, digest: bytes | None) -> bool:
        return digest in self._known

    def unknown(self, images: Any, rows: Sequence[int]) -> list[tuple[int, bytes | None]]:  # noqa: ANN401 (a store)
        """Return the rows that have to be read, each with its stamp: all but files that the index knows to be sound."""
        stamps = images.stamps(np.asarray(rows, dtype=np.int64))
        if stamps is None:
            return [(row, None) for row in rows]
        digests = self._index.look_up(stamp for stamp in stamps if stamp is not None) if self._known else {}
        return [(row, stamp) for row, stamp in zip(rows, stamps, strict=True) if digests.get(stamp) not in self]

    def add(self, sound: _Sound) -> None:
        """Take sound images by digest, each with the stamp that its file had before it was read."""
        self._new.update(digest for digest in sound if digest not in self._known)
        self._index.add({stamp: digest for digest, stamp in sound.items() if stamp is not None})
        if len(self._new) >= _SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Write what is new to a file of its own, so that other processes lose nothing."""
        if not self._new:
            return
        content = b"".join(sorted(self._new))
        self._known |= self._new
        self._new = set()
        try:
            make_cache_folder(self._folder)
            with replacing(self._folder / f"{hashlib.sha256(content).hexdigest()[:32]}.sha256") as aside:
                aside.write_bytes(content)
                share_with_group(aside)
        except OSError as error:
            say_not_cached(self._folder, error)
