"""`tlscale plan --check-images`: decode every image of a recipe's data, and list those that cannot be read.

A run decodes an image when it uses it: to decode all of a large data set beforehand may take longer than to train on a
part of it. What was found sound once, by whatever command, is not decoded again.
"""

from __future__ import annotations

from tlscale.data.sources.bad_images import find_bad
from tlscale.data.sources.open import read_source
from tlscale.errors import DataError
from tlscale.recipe.schema import DataSection
from tlscale.tracking.console import Console
from tlscale.tracking.progress import Pace


def check_images(section: DataSection, in_chans: int, console: Console) -> None:
    """Decode every image of all splits, on all cores.

    Raises:
        DataError: some cannot be read, which would end a run that uses them.
        Stopped: it was asked to stop.
    """
    splits = read_source(section).splits
    num_images = sum(len(split.store) for split in splits.values())
    pace = Pace(num_images, "checking images", console)
    bad_images = find_bad(section, splits, in_chans=in_chans, on_images=pace.add)
    for reason in bad_images.reasons():
        console.say(reason)
    if not len(bad_images):
        console.say(f"all {num_images:,} images can be read")
        return
    problem = (
        f"{len(bad_images):,} of {num_images:,} images cannot be read; the first is {next(iter(bad_images.reasons()))}"
    )
    if section.on_bad_image == "skip":
        console.say(f"{problem}. A run skips them")
        return
    remedy = "Repair them or take them out; with skip a run leaves them out of every split, and counts them."
    raise DataError(problem, key="data.on_bad_image", remedy=remedy)
