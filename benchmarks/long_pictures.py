"""Measure how long pictures are best shown to a network: cropped, squashed, padded, or in their own proportions.

    python benchmarks/long_pictures.py [--seeds 5] [--train 300] [--test 600]

An article of Fashion-MNIST, enlarged to 72 pixels, lies anywhere in a picture of noise of 240 x 80 pixels. A probe on
codes of the bundled ResNet-10-T, as `tlscale new` writes it for so few images, with inputs of about as many pixels.

Prints Markdown: the accuracy on test images by seed, and the mean difference to squashing, seed by seed, with its 95 %
interval (Student's t).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from by_seed import against, run_quietly
from PIL import Image

from tlscale.data.sources.open import open_data
from tlscale.recipe.schema import DataSection, Recipe

SHOWN: dict[str, dict[str, Any]] = {
    "squash 84 x 84": {"image_size": 84, "crop_mode": "squash"},
    "centre 84 x 84": {"image_size": 84, "crop_mode": "center"},
    "border 84 x 84": {"image_size": 84, "crop_mode": "border"},
    "48 x 144": {"image_size": [48, 144], "crop_mode": "squash"},
}
PROBE: dict[str, Any] = {
    "backbone": {"name": "resnet10t", "weights": "bundled"},
    "codes": {"layer": ["layer2", "layer3", "layer4"], "pool": ["avg", "max"]},
    "probe": {"kind": "logistic"},
}


def put_pictures(folder: Path, seed: int, args: argparse.Namespace) -> None:
    """Write the pictures of a seed, a folder a class."""
    data = open_data(DataSection(source="fashion_mnist", validation_fraction=0.0, fallback="sample"), 0)
    assert data.test is not None
    draws = np.random.default_rng(seed)
    for split, role, count in ((data.train, "train", args.train), (data.test, "test", args.test)):
        for row in draws.permutation(len(split))[:count].tolist():
            article = Image.fromarray(np.asarray(split.read(row)).squeeze()).resize((72, 72))
            picture_HW = draws.integers(0, 60, (80, 240)).astype(np.uint8)
            top, left = int(draws.integers(0, 8)), int(draws.integers(0, 168))
            place_HW = picture_HW[top : top + 72, left : left + 72]
            np.maximum(place_HW, np.asarray(article), out=place_HW)
            place = folder / role / str(split.labels_N[row])
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture_HW).save(place / f"{row:05}.png")


def accuracy(folder: Path, keys: dict[str, Any]) -> float:
    """Run a probe on the pictures of a folder."""
    data = {"source": "folder", "path": str(folder / "data"), "validation_fraction": 0.2, **keys}
    return float(run_quietly(Recipe.model_validate({"name": "long", "data": data, **PROBE})).top1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--train", type=int, default=300)
    parser.add_argument("--test", type=int, default=600)
    args = parser.parse_args()
    found: dict[str, list[float]] = {name: [] for name in SHOWN}
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as place:
            put_pictures(Path(place) / "data", seed, args)
            for name, keys in SHOWN.items():
                found[name].append(accuracy(Path(place), keys))
    print("| input | accuracy | by seed | against squashing, 95 % interval |\n|---|---|---|---|")
    first = next(iter(found.values()))
    for name, scores in found.items():
        by_seed = " ".join(f"{score:.4f}" for score in scores)
        print(f"| {name} | {np.mean(scores):.4f} | {by_seed} | {against(scores, first)} |")


if __name__ == "__main__":
    main()
