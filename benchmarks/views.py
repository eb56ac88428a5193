"""Measure what averaging over views of an image (`evaluate.views`) is worth, over several seeds.

    python benchmarks/views.py [--seeds 5] [--train 300] [--test 1000] [--epochs 8] [--ways WAY ...]

Real Fashion-MNIST (`--train` of its training images and `--test` of its test images, drawn by seed), and patches of
56 x 56 pixels of scikit-learn's two photos, whose class is which third of which photo they are from; training and test
patches are from the upper and the lower half, so that none overlaps another of the other split. The bundled
ResNet-10-T at 48 px with a crop of 0.875, so that there is something to crop: a logistic probe, and fine-tuning of the
whole network with and without `flip` among the augmentations. Fashion-MNIST is enlarged to 55 px for it.

Each network is trained and chosen once a seed, on plain images, then answers the test images by their plain view and
by the means over others: so what is compared is the averaging alone. Prints Markdown: for each way the mean over seeds
of top1 and of the loss, without a temperature; the difference to the plain view, seed by seed, with the interval of its
mean (Student's t); and how long predicting takes against the plain view.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from by_seed import against, run_quietly
from PIL import Image
from sklearn.datasets import load_sample_images

import tlscale
from tlscale.data.sources.open import open_data
from tlscale.recipe.schema import DataSection, Recipe
from tlscale.training.image_classifier import ImageClassifier

VIEWS: dict[str, list[str]] = {"none": [], "flip": ["flip"], "five_crop": ["five_crop"], "both": ["flip", "five_crop"]}
SIDE = 56


def fashion_mnist(folder: Path, seed: int, counts: dict[str, int]) -> None:
    data, rng = open_data(DataSection(source="fashion_mnist", validation_fraction=0.0), 0), np.random.default_rng(seed)
    assert data.test is not None
    for split, role in ((data.train, "train"), (data.test, "test")):
        for row in rng.permutation(len(split))[: counts[role]].tolist():
            image = Image.fromarray(np.asarray(split.read(row)).squeeze())
            _save(image, folder / role / data.classes[split.labels_N[row]].replace("/", " or "), row)


def patches(folder: Path, seed: int, counts: dict[str, int]) -> None:
    photos, rng = load_sample_images().images, np.random.default_rng(seed)
    for role, half in (("train", 0), ("test", 1)):
        for number in range(counts[role]):
            photo, third = int(rng.integers(2)), int(rng.integers(3))
            height, width = photos[photo].shape[0] // 2, photos[photo].shape[1] // 3
            top, left = half * height + rng.integers(height - SIDE), third * width + rng.integers(width - SIDE)
            patch = Image.fromarray(photos[photo][top : top + SIDE, left : left + SIDE])
            _save(patch, folder / role / f"photo {photo}, third {third}", number)


def _save(image: Image.Image, place: Path, number: int) -> None:
    place.mkdir(parents=True, exist_ok=True)
    image.save(place / f"{number:05}.png")


DATA: dict[str, Callable[[Path, int, dict[str, int]], None]] = {
    "Fashion-MNIST": fashion_mnist,
    "patches of photos": patches,
}


def ways(epochs: int) -> dict[str, dict[str, Any]]:
    trained = {"duration": f"{epochs} epochs", "batch_size": 32, "optim": {"name": "adamw", "lr": 1e-3}}
    return {
        "probe": {"probe": {"kind": "logistic", "refit": False}},
        "fine-tuning": trained,
        "fine-tuning, flip augmented": {**trained, "augment": ["flip"]},
    }


def recipe_of(folder: Path, seed: int, name: str, way: dict[str, Any]) -> Recipe:
    data = {"source": "folder", "path": str(folder), "image_size": 48, "crop_pct": 0.875, "validation_fraction": 0.3}
    return Recipe.model_validate(
        {
            "name": "views",
            "seed": seed,
            "data": {**data, "augment": way.get("augment", [])},
            "backbone": {"name": "resnet10t", "weights": "bundled", "in_chans": 1 if name == "Fashion-MNIST" else 3},
            **{key: value for key, value in way.items() if key != "augment"},
        }
    )


def measure(
    model: ImageClassifier, images: Sequence[str], labels_N: np.ndarray, views: Sequence[str]
) -> dict[str, float]:
    """Answer images by the mean over views, by the probabilities as they are."""
    averaging = replace(model, views=tuple(views), calibration=None, _last=[])
    began_s = time.monotonic()
    shares_NC = averaging.predict(images).probabilities.astype(np.float64)
    seconds = time.monotonic() - began_s
    loss = -np.log(shares_NC[np.arange(len(labels_N)), labels_N]).mean()
    return {"top1": float((shares_NC.argmax(1) == labels_N).mean()), "loss": float(loss), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--train", type=int, default=300)
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--ways", nargs="+", default=["probe", "fine-tuning", "fine-tuning, flip augmented"])
    args = parser.parse_args()
    print("Each network was chosen on plain images; a run with `evaluate.views` chooses by the mean over its views.\n")
    print("| images | way | views | top1 | loss | top1 against none | loss against none | time |")
    print("|---|---|---|---|---|---|---|---|")
    counts = {"train": args.train, "test": args.test}
    for name, put in DATA.items():
        for kind in args.ways:
            way = ways(args.epochs)[kind]
            found: dict[str, list[dict[str, float]]] = {views: [] for views in VIEWS}
            for seed in range(args.seeds):
                with tempfile.TemporaryDirectory() as place:
                    put(Path(place) / "data", seed, counts)
                    run_quietly(recipe_of(Path(place) / "data", seed, name, way), Path(place) / "run")
                    model = tlscale.load(Path(place) / "run")
                    files = sorted((Path(place) / "data" / "test").rglob("*.png"))
                    labels_N = np.array([model.classes.index(file.parent.name) for file in files])
                    for views, names in VIEWS.items():
                        found[views].append(measure(model, list(map(str, files)), labels_N, names))
            _show(name, kind, found)


def _show(name: str, kind: str, found: dict[str, list[dict[str, float]]]) -> None:
    columns = {views: {key: [row[key] for row in rows] for key in rows[0]} for views, rows in found.items()}
    none = columns["none"]
    for views, column in columns.items():
        gains = " | ".join(against(column[key], none[key]) for key in ("top1", "loss"))
        times = sum(column["seconds"]) / sum(none["seconds"])
        figures = f"{np.mean(column['top1']):.4f} | {np.mean(column['loss']):.4f}"
        print(f"| {name} | {kind} | {views} | {figures} | {gains} | {times:.1f} x |", flush=True)


if __name__ == "__main__":
    main()
