"""Copy an exported model, and say how one is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tlscale.errors import RunFolderError
from tlscale.models.model_folder import CONFIG_FILE, fault_of_model
from tlscale.storage.files import flush, make_folder, remove_left_overs, replacing


def how_to_load(folder: Path, *, whole: bool) -> str:
    """Say how an exported model is loaded: by timm alone, where it is a network of timm's as a `whole`."""
    return f"timm.create_model('local-dir:{folder}', pretrained=True)" if whole else f"tlscale.load('{folder}')"


def copy_model(source: Path, target: Path) -> str:
    """Copy an exported model to another folder, whole or not at all; return how to load it there.

    Raises:
        RunFolderError: it is damaged.
    """
    if fault := fault_of_model(source):
        raise RunFolderError(fault)
    ours = json.loads((source / CONFIG_FILE).read_text(encoding="utf-8"))["tlscale"]
    make_folder(target)
    (target / CONFIG_FILE).unlink(missing_ok=True)  # last of all there again: it says what the others hold
    flush(target)
    for file in (*ours["sha256"], CONFIG_FILE):
        remove_left_overs(target / file)
        with replacing(target / file) as aside:
            shutil.copyfile(source / file, aside)
    return how_to_load(target, whole=ours["whole"])
