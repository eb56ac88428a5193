"""End a run at an image that cannot be read, such that it goes on when the image is repaired.

Promise: what was trained is saved before (`loop`), the message names the image and what to do, and `run.json` notes by
which of its images the run may differ when it is resumed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tlscale.data.decode import BadImageError, Reading
from tlscale.data.identity import used_identity
from tlscale.data.sources.bad_images import find_bad_images
from tlscale.distributed.processes import Processes
from tlscale.errors import DataError, Text, Wording, flag
from tlscale.storage.files import naming_disk_errors, write_json
from tlscale.storage.run_folder import RunFolder
from tlscale.training.loop_state import LoopState
from tlscale.training.run_info import read_run_info
from tlscale.training.setup import RunSetup
from tlscale.training.specs import pipeline_spec

_FIND_ALL = Wording("'tlscale plan RECIPE --check-images'", "tlscale.plan(recipe, check_images=True)") + (
    " lists all that cannot be read"
)
_BLOCK = 256  # images between two looks at the clock
_SEARCH_S = 5.0

Unread = list[tuple[str, int, str]]  # split, position there, why


@contextmanager
def telling_of_unread_images(
    setup: RunSetup, loop: LoopState, folder: RunFolder, processes: Processes
) -> Iterator[None]:
    """Tell of an image that cannot be read within what is saved and what to do, and note it for when it is repaired.

    Raises:
        DataError: on every process.
    """
    try:
        yield
    except BadImageError as error:
        unread = processes.run_on_main(_note_unread, folder, setup, error)
        raise _unread_image(error, unread, loop, folder) from error


def _note_unread(folder: RunFolder, setup: RunSetup, error: BadImageError) -> Unread:
    """Note in `run.json` of a run that has begun which of its images cannot be read; return those besides this one.

    With the identity of all others: when one is repaired its size, or its content, is another, and nothing else is.
    """
    if (run_info := read_run_info(folder)) is None or error.image is None or error.image[0] == "test":
        return []
    others = [bad for bad in _find_more(setup) if bad[:2] != error.image]
    images = [error.image, *((split, position) for split, position, _ in others)]
    rest = used_identity(setup.data, run_info["data"].get("used_by"), without=images)
    run_info["data"]["unread"] = {"images": [list(image) for image in images], "rest_sha256": rest.sha256}
    with naming_disk_errors(folder.run_json):
        write_json(folder.run_json, run_info)
    return others


def _find_more(setup: RunSetup) -> Unread:
    """Try training and validation images for some seconds: who has several to repair should not find one a start."""
    end = time.monotonic() + _SEARCH_S
    bad: Unread = []
    section = pipeline_spec(setup, torch.device("cpu")).section
    max_pixels, reading = round(section.max_megapixels * 1e6), Reading.of(section)
    in_chans = setup.recipe.backbone.in_chans
    for split in (setup.data.train, setup.data.validation):
        for start in range(0, 0 if split is None else len(split), _BLOCK):
            if time.monotonic() > end:
                return bad
            assert split is not None
            rows = range(start, min(start + _BLOCK, len(split)))
            found = find_bad_images(split, max_pixels=max_pixels, in_chans=in_chans, reading=reading, rows=rows)
            bad += [(split.name, position, why) for position, why in found]
    return bad


def _unread_image(error: DataError, others: Unread, loop: LoopState, folder: RunFolder) -> DataError:
    also = f". {len(others):,} more, the first being {others[0][2]}" if others else ""
    saved = f"Up to step {loop.step} all is saved in '{folder.path}': repair" if loop.step else "Repair"
    what = "the images" if others else "the image"
    then = _FIND_ALL + ". skip, in a run of its own, trains without them."
    remedy = f"{saved} {what}, and " + flag("resume") + " goes on; " + then
    return _about_image(error, error.problem + also, remedy)


def unread_test_image(error: DataError, folder: RunFolder) -> DataError:
    """Tell that an image of the scored split cannot be read when the model is exported, and what to do."""
    remedy = (
        f"The model is in '{folder.model}', its figures are not written. Repair the image, or take it out, and "
        + flag("resume")
        + " (or "
        + Wording(f"'tlscale evaluate {folder.path}'", f"tlscale.evaluate('{folder.path}')")
        + ") computes them; "
        + _FIND_ALL
        + "."
    )
    return _about_image(error, error.problem, remedy)


def _about_image(error: DataError, problem: str, remedy: Text) -> DataError:
    told = DataError(problem, key=error.key or "data.on_bad_image", remedy=remedy)
    told.reported_by_main = error.reported_by_main
    return told
