"""The backbone of a run as weights that ship with tlscale: half precision, with what images it was made with.

    python scripts/bundle_weights.py runs/pretrain_resnet10t [--image-size 64]

Writes `tlscale/weights/NAME.safetensors` and `NAME.json`; the model card next to them, `NAME.md`, is written by hand.
For those who make the weights of a release: a run takes them by `backbone: {name: NAME, weights: bundled}`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import tlscale
from tlscale.models.bundled import FOLDER
from tlscale.recipe.image_size import height_width

MOST_BYTES = 12 * 10**6
"""What ships with every installation has to be small."""
MOST_DIFFERENCE = 0.02
"""Of features in half-precision weights, as a share of their deviation."""


def backbone_of(run: Path) -> tuple[nn.Module, Any]:
    """Return the run's backbone without its classifier, and the spec of its input."""
    trained = tlscale.load(run)
    model: Any = trained.model
    if hasattr(model, "backbone"):
        return model.backbone, trained.input_spec
    model.reset_classifier(0)
    return model, trained.input_spec


def in_half(model: nn.Module) -> dict[str, Tensor]:
    """Return the state with its numbers in float16; counters as they are."""
    state = {}
    for name, tensor in model.state_dict().items():
        half = tensor.to(torch.float16) if tensor.is_floating_point() else tensor
        if not half.isfinite().all():
            sys.exit(f"'{name}' has numbers up to {float(tensor.abs().max()):g}, too large for float16")
        state[name] = half.contiguous()
    return state


def difference(model: nn.Module, state: dict[str, Tensor], name: str, spec: Any) -> float:  # noqa: ANN401
    """Root mean square of how far the features move, as a share of their deviation over random images."""
    other = timm.create_model(name, num_classes=0, in_chans=spec.in_chans).eval()
    other.load_state_dict({key: value.float() for key, value in state.items()})
    images = torch.randn(64, *spec.shape_CHW, generator=torch.Generator())
    with torch.no_grad():
        one, two = model.eval()(images), other(images)
    return float((one - two).square().mean().sqrt() / one.std())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--image-size", type=int, help="that the weights are best used at; default: that of the run")
    options = parser.parse_args()
    model, spec = backbone_of(options.run)
    name = str(model.pretrained_cfg["architecture"])  # type: ignore[index]
    state = in_half(model)
    moved = difference(model, state, name, spec)
    if moved > MOST_DIFFERENCE:
        sys.exit(
            f"half precision moves the features by {moved:.3f} of their deviation; at most {MOST_DIFFERENCE} may be"
        )
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.safetensors"
    save_file(state, path, metadata={"format": "pt"})
    path.chmod(0o644)
    height, width = height_width(options.image_size or spec.image_size)
    cfg = {
        "input_size": [spec.in_chans, height, width],
        "mean": list(spec.mean),
        "std": list(spec.std),
        "interpolation": spec.interpolation,
        "crop_pct": 1.0,
        "crop_mode": spec.crop_mode,
    }
    facts = {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "pretrained_cfg": cfg}
    (FOLDER / f"{name}.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    num_bytes = path.stat().st_size
    print(f"{path}: {num_bytes:,} bytes, {len(state)} tensors; features move by {moved:.4f} of their deviation")
    if num_bytes > MOST_BYTES:
        sys.exit(f"more than {MOST_BYTES:,} bytes: this cannot ship")


if __name__ == "__main__":
    main()
