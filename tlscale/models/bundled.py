"""Find weights that ship with tlscale: small networks with real features, for machines without a hub.

Promise: a file that is not the one that was shipped is an error. With each `NAME.safetensors` in `tlscale/weights`
come `NAME.json`, with its SHA-256 and what images it was made with, and its model card, `NAME.md`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlscale.errors import ModelError, sentences, suggestion

FOLDER = Path(__file__).resolve().parents[1] / "weights"


@dataclass(frozen=True)
class Bundled:
    """The weights of one backbone, without classifier."""

    path: Path
    sha256: str
    pretrained_cfg: dict[str, Any]
    """What timm would have in the model's own: mean, std, input size and so on."""


def bundled(name: str) -> Bundled:
    """Return the bundled weights of a timm model; that none ship for it is a `ModelError`."""
    names = sorted(path.stem for path in FOLDER.glob("*.safetensors"))
    if name not in names:
        there_are = f"There are: {', '.join(names) or 'none'}."
        instead = "Take one of these as backbone.name, or other weights: pretrained, none, or the path of a file"
        remedy = sentences(suggestion(name, names), there_are, instead)
        raise ModelError(f"no weights of '{name}' ship with tlscale", key="backbone.weights", remedy=remedy)
    info = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return Bundled(FOLDER / f"{name}.safetensors", info["sha256"], info["pretrained_cfg"])
