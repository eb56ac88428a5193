"""Compare losses for several labels an image: binary cross-entropy, weighted or not, and the asymmetric one.

    python benchmarks/several_labels.py [--seeds 5] [--images 1500] [--freeze '.*'] [--epochs 20]

Pictures of 56 x 56 pixels made of real Fashion-MNIST: one to three garments in the corners of a square, drawn by seed;
the labels are the kinds of garments in it. The classes are unequal: the k-th of a permutation by seed is drawn with a
chance of 0.6^k of the first, so that the rarest is in about 1 % of the pictures. Train and test pictures are made of
the train and test images of the data set. The bundled ResNet-10-T at 56 px, by default all frozen but a linear head, so
that its codes are computed once for all runs of a seed; a fifth of the training pictures is held out, and chooses the
step and the thresholds.

Prints Markdown: for each way the median over seeds of mAP, of the AP of the three rarest and the three most frequent
classes, and of macro-F1 and micro-F1 at the thresholds; and the difference in mAP to binary cross-entropy, seed by
seed, with the interval of its mean (Student's t). The pictures are kept below `$TLSCALE_CACHE/several_labels`.
"""

from __future__ import annotations

import argparse
import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from by_seed import arguments, bundled_recipe, cache_folder, folder_name, run_quietly, show_medians
from PIL import Image

from tlscale.data.sources.open import ImageSplit, open_data
from tlscale.recipe.schema import DataSection, Recipe

WAYS: dict[str, dict[str, Any]] = {
    "binary cross-entropy": {},
    "loss.class_weights: balanced": {"class_weights": "balanced"},
    "loss.kind: asymmetric": {"kind": "asymmetric"},
    "asymmetric, negative_gamma: 2": {"kind": "asymmetric", "negative_gamma": 2.0},
    "asymmetric, balanced": {"kind": "asymmetric", "class_weights": "balanced"},
}
_SIDE = 28
_CORNERS = ((0, 0), (0, _SIDE), (_SIDE, 0), (_SIDE, _SIDE))
_DECAY = 0.6


def put_pictures(folder: Path, seed: int, num_train: int, num_test: int) -> list[str]:
    """Write the pictures of a seed and their table; return the classes from the rarest on."""
    data = open_data(DataSection(source="fashion_mnist", validation_fraction=0.0), 0)
    assert data.test is not None
    classes = [folder_name(name) for name in data.classes]
    draws = np.random.default_rng(seed)
    order_C = draws.permutation(len(classes))
    chances_C = np.empty(len(classes))
    chances_C[order_C] = _DECAY ** np.arange(len(classes))
    if not (folder / "list.csv").exists():
        folder.mkdir(parents=True, exist_ok=True)
        rows = [
            (name, ";".join(sorted(classes[label] for label in labels)), role)
            for role, split, count in (("train", data.train, num_train), ("test", data.test, num_test))
            for name, labels in _pictures(folder, role, split, count, chances_C / chances_C.sum(), draws)
        ]
        with (folder / "list.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([("path", "label", "split"), *rows])
    return [classes[label] for label in order_C[::-1]]


def _pictures(
    folder: Path,
    role: str,
    split: ImageSplit,
    count: int,
    chances_C: npt.NDArray[np.float64],
    draws: np.random.Generator,
) -> list[tuple[str, list[int]]]:
    by_class = [np.flatnonzero(split.labels_N == label) for label in range(len(chances_C))]
    found = []
    for number in range(count):
        labels = draws.choice(len(chances_C), size=draws.integers(1, 4), replace=False, p=chances_C)
        canvas_HW = np.zeros((2 * _SIDE, 2 * _SIDE), np.uint8)
        for label, corner in zip(labels.tolist(), draws.permutation(len(_CORNERS)).tolist(), strict=False):
            top, left = _CORNERS[corner]
            garment_HW = _grey(split, int(draws.choice(by_class[label])))
            canvas_HW[top : top + _SIDE, left : left + _SIDE] = garment_HW
        name = f"{role}_{number:05}.png"
        Image.fromarray(canvas_HW).save(folder / name)
        found.append((name, labels.tolist()))
    return found


def _grey(split: ImageSplit, row: int) -> npt.NDArray[np.uint8]:
    raw = split.read(row)
    pixels = np.asarray(Image.open(io.BytesIO(raw)).convert("L")) if isinstance(raw, bytes) else np.asarray(raw)
    return pixels.squeeze().astype(np.uint8)


def recipe_of(folder: Path, classes: list[str], seed: int, args: argparse.Namespace, loss: dict[str, Any]) -> Recipe:
    table = {"source": "manifest", "path": str(folder / "list.csv"), "task": "multi_label", "label_separator": ";"}
    data = {**table, "classes": classes, "image_size": 2 * _SIDE, "validation_fraction": 0.2}
    return bundled_recipe("several", seed, data, loss, args)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--images", type=int, default=1500, help="pictures to train on and to validate")
    parser.add_argument("--test-images", type=int, default=1500)
    args = parser.parse_args()
    cache = cache_folder("several_labels")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    for seed in range(args.seeds):
        folder = cache / f"{args.images}_{args.test_images}_{seed}"
        by_size = put_pictures(folder, seed, args.images, args.test_images)
        for name, loss in WAYS.items():
            result = run_quietly(recipe_of(folder, sorted(by_size), seed, args, loss))
            known = [
                ap
                for label in by_size
                if (ap := result["per_class"].get(label, {}).get("average_precision")) is not None
            ]
            found[name].append(
                {
                    "mean_average_precision": result["mean_average_precision"],
                    "rare": float(np.mean(known[:3])),
                    "frequent": float(np.mean(known[-3:])),
                    "macro_f1": result["macro_f1"],
                    "micro_f1": result["micro_f1"],
                }
            )
    show_medians(
        "| | mAP | AP of the three rarest | of the three most frequent | macro-F1 | micro-F1 | mAP against the first |",
        found,
    )


if __name__ == "__main__":
    main()
