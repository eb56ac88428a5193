"""Write `result.json`, and what it tells of the data: the same for training and for a probe."""

from __future__ import annotations

from typing import Any

from tlscale import faults
from tlscale.storage.files import naming_disk_errors, write_json
from tlscale.storage.run_folder import RunFolder
from tlscale.tracking.redact import places_of, without_places
from tlscale.tracking.stopwatch import Stopwatch
from tlscale.training.setup import RunSetup


def about_data(setup: RunSetup) -> dict[str, Any]:
    """Return the keys that tell of the data what a reader of the figures has to know."""
    return {
        "is_sample": setup.data.is_sample,
        "notes": without_places(list(setup.data.notes), places_of(setup.recipe)),
        "num_bad_images": len(setup.bad_images),
        "skipped_images": setup.bad_images.counts,
    }


def write_result(result: dict[str, Any], folder: RunFolder, watch: Stopwatch) -> dict[str, Any]:
    """Write the last file of a run: where it is there, the run is complete.

    Args:
        watch: of the run. It is read here, last of all, so that its seconds are all that there were until this file.

    Returns:
        What was written: `result`, and the seconds.

    Raises:
        TlscaleError: the disk is full or cannot be written.
    """
    faults.at("result")
    with naming_disk_errors(folder.result):
        result |= watch.figures(result["images_seen"])
        write_json(folder.result, result)
    return result
