"""Write a model as a folder that timm loads; where timm has no place for the head, it loads the backbone alone.

Promise: what is written was loaded again, by timm and by tlscale, and compared with the model of the run.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from tlscale.models.exports.check import Evidence, WrongExportError
from tlscale.models.model_folder import CONFIG_FILE, HEAD_FILE, MODEL_FILE, config_digest, load
from tlscale.models.unknown import UNKNOWN_FILE
from tlscale.storage.files import write_text

BACKBONE_ALONE = (
    "timm.create_model builds the backbone of this model alone, as timm has no place for its head: "
    "tlscale.load(FOLDER) builds all of it."
)


def write_timm(model: Path, folder: Path, evidence: Evidence) -> dict[str, Any]:
    """Copy the exported model of a run.

    Args:
        model: the folder with `config.json`, of a run or of a model.
        folder: to write to.

    Returns:
        What the check found; `loads_with`: `timm`, or `tlscale` where timm loads the backbone alone.

    Raises:
        WrongExportError: what was written gives other logits.
    """
    config = json.loads((model / CONFIG_FILE).read_text(encoding="utf-8"))
    whole = config["tlscale"]["whole"]
    also = [UNKNOWN_FILE] if config["tlscale"].get("unknown") is not None else []
    for file in (MODEL_FILE, *also) if whole else (MODEL_FILE, HEAD_FILE, *also):
        shutil.copyfile(model / file, folder / file)
    if not whole:
        config["note"] = BACKBONE_ALONE
        if "config_sha256" in config["tlscale"]:
            config["tlscale"]["config_sha256"] = config_digest(config)
    write_text(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
    again = load(folder)
    report = evidence.compare(again.model.eval())
    if whole:
        report = evidence.compare(_by_timm(folder).eval())
    elif not _same_backbone(_by_timm(folder), evidence):
        raise WrongExportError("timm builds another backbone from it than the run's", key="to")
    return {"loads_with": "timm" if whole else "tlscale", **report}


def _by_timm(folder: Path) -> nn.Module:
    model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=True)
    return model.float().eval()


def _same_backbone(found: nn.Module, evidence: Evidence) -> bool:
    own = evidence.trained.model.backbone
    assert isinstance(own, nn.Module)
    with torch.no_grad():
        ours, other = (_first(network.eval()(evidence.example)) for network in (own, found))
    return ours.shape == other.shape and torch.allclose(ours, other, rtol=1e-4, atol=1e-5)


def _first(value: Tensor | tuple[Tensor, ...]) -> Tensor:
    return value if isinstance(value, Tensor) else value[0]
