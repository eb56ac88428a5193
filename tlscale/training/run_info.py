"""Write `run.json`: what made a run, by which its figures are traced, and its inputs and checkpoints known."""

from __future__ import annotations

import platform
import secrets
import sys
from datetime import UTC, datetime
from typing import Any

import torch

from tlscale import __version__
from tlscale.data.identity import run_identity
from tlscale.distributed.host import versions_of
from tlscale.recipe.load import dump_recipe, recipe_digest
from tlscale.storage import faults
from tlscale.storage.files import naming_disk_errors, write_json, write_text
from tlscale.storage.run_folder import RunFolder, clear
from tlscale.tracking.git_state import git_state
from tlscale.tracking.redact import places_of, without_places
from tlscale.training import corrections
from tlscale.training.run_files import read_run_info as read_run_info  # callers find it here, with its writer
from tlscale.training.setup import RunSetup, strategy_of

_PACKAGES = ("torch", "torchvision", "timm", "accelerate", "datasets", "safetensors", "numpy", "pillow")


def make_run_info(setup: RunSetup, *, world_size: int, device: str) -> dict[str, Any]:
    """Return the facts of a run that is about to begin; places on this machine are in its recipe alone."""
    run_info = {
        "tlscale": __version__,
        "name": setup.name,
        "id": secrets.token_hex(8),  # its checkpoints bear it
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "corrections": corrections.names(),  # in force when it began
        "strategy": strategy_of(setup),
        **({} if setup.part is None else {"fold": setup.part.to_plain()}),
        "recipe_sha256": recipe_digest(setup.recipe),
        "git": git_state(),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": versions_of(_PACKAGES),
        "world_size": world_size,
        "device": device,
        "threads": torch.get_num_threads(),
        "batch": setup.split.describe() if setup.stages else None,
        "total_steps": setup.total_steps,
        "data": {
            **setup.data.identity,
            **run_identity(setup.data),
            "is_sample": setup.data.is_sample,
            "notes": list(setup.data.notes),
            "classes": list(setup.data.classes),
        },
        "bad_images": setup.bad_images.to_plain(),
        "input": setup.spec.to_plain(),
        "weights": {
            "origin": setup.weights.origin,
            "sha256": setup.weights.sha256,
            "num_matched": setup.weights.num_matched,
            "num_tensors": setup.weights.num_tensors,
            "prefix": setup.weights.prefix,
            "missing": list(setup.weights.missing),
        },
        "teacher": None if setup.teacher is None else setup.teacher.to_plain(),
        "trainable_params": setup.trainable_params,
        "total_params": setup.total_params,
    }
    plain: dict[str, Any] = without_places(run_info, places_of(setup.recipe))
    return plain


def begin_folder(
    folder: RunFolder, setup: RunSetup, world_size: int, device: str, resumed: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Write what a run begins with, and return `run.json`; what an earlier run left in the folder is removed.

    Args:
        resumed: contents of `run.json` of a probe that begins again, of which the earlier test splits are kept.
    """
    run_info = make_run_info(setup, world_size=world_size, device=device)
    if resumed is not None and (earlier := resumed["data"].get("earlier_scored_sha256")):
        run_info["data"]["earlier_scored_sha256"] = earlier
    with naming_disk_errors(folder.path):
        clear(folder)
        write_json(folder.run_json, run_info)
        faults.at("record")
        write_text(folder.recipe, dump_recipe(setup.recipe))
    return run_info
