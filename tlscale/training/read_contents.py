"""Record the contents of a run's images as it reads them, where it began before it knew them all.

Promise: such a run knows the images that it has not read by name and size, and those that it has read (in the main
process) by content: one that is replaced by another of equal size, under whatever times, is noticed by `--resume`.

Shape letters: N training and validation images, in this order.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tlscale.data.content import DIGEST, Digests
from tlscale.data.sources.open import ImageData
from tlscale.data.sources.tables import ImageSplit
from tlscale.storage.files import naming_disk_errors, replacing
from tlscale.storage.run_folder import RunFolder
from tlscale.training.run_files import damaged, read_run_info

_UNKNOWN = np.zeros((), DIGEST)


def record_contents(folder: RunFolder, data: ImageData) -> None:
    """Write what is known by now of a run whose `run.json` identifies its images by place."""
    run_info = read_run_info(folder)
    if run_info is None or run_info["data"].get("used_by") != "place":
        return
    splits = _splits(data)
    noted = [split.noted_digests() for split in splits]
    known_N = np.concatenate([known for _, known in noted])
    earlier_N = _read(folder, len(known_N))
    digests_N = np.where(known_N, np.concatenate([digests for digests, _ in noted]), earlier_N)
    if np.array_equal(digests_N, earlier_N):
        return
    for split in splits:
        split.table.remember()  # so that a resumed run need not read them only to compare
    with naming_disk_errors(folder.contents), replacing(folder.contents) as aside, aside.open("wb") as file:
        np.save(file, digests_N, allow_pickle=False)


def replaced_images(folder: RunFolder, data: ImageData, recorded: dict[str, Any]) -> list[str]:
    """Return where images are whose content is another than when the run read them.

    Args:
        recorded: `data` of `run.json`. Images that could not be read then may be repaired.

    Raises:
        DataError: an image that was read cannot be read any more.
    """
    splits, replaced, start = _splits(data), [], 0
    earlier_N = _read(folder, sum(map(len, splits)))
    for name, position in [*recorded.get("repaired", []), *recorded.get("unread", {"images": []})["images"]]:
        first = 0 if name == "train" else len(data.train)
        earlier_N[first + position] = _UNKNOWN
    for split in splits:
        then_N = earlier_N[start : start + len(split)]
        was_read_N = then_N != _UNKNOWN
        now_N = split.digests(was_read_N)
        replaced += [split.where(int(row)) for row in np.flatnonzero(was_read_N & (now_N != then_N))]
        start += len(split)
    return replaced


def _splits(data: ImageData) -> list[ImageSplit]:
    return [split for split in (data.train, data.validation) if split is not None]


def _read(folder: RunFolder, num_images: int) -> Digests:
    """Return what earlier saves recorded, with `_UNKNOWN` for the rest."""
    if not folder.contents.exists():
        return np.zeros(num_images, DIGEST)
    try:
        digests_N: Digests = np.load(folder.contents, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise damaged(folder.contents, str(error)) from error
    if digests_N.shape != (num_images,) or digests_N.dtype != DIGEST:
        raise damaged(folder.contents, f"it is not of {num_images:,} images")
    return digests_N
