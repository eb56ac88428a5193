"""Compare what makes up for classes of unequal sizes with doing nothing: losses and sampling, over several seeds.

    python benchmarks/unequal_classes.py [--seeds 5] [--most 1000] [--ratio 100] [--freeze '.*'] [--epochs 20]

Real Fashion-MNIST, of whose training images the classes keep from `--most` down to `--most / --ratio`, in equal steps
of their logarithm (which class is rare is drawn by seed, and which images); all 10,000 test images. The bundled
ResNet-10-T at 48 px, by default all frozen but a linear head, so that its codes are computed once for all runs. The
weights are those of the last step: with as few images of a rare class, a validation split would choose by luck.

Prints Markdown: for each way the median over seeds of balanced accuracy (which is top1, as the test images of all
classes are equally many) and of the accuracy of the three rarest and the three most frequent classes; and the
difference to doing nothing, seed by seed, with the interval of its mean (Student's t). The images are kept below
`$TLSCALE_CACHE/unequal_classes`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from by_seed import arguments, bundled_recipe, cache_folder, folder_name, put_rows, run_quietly, show_medians

from tlscale.data.sources.open import open_data
from tlscale.recipe.schema import DataSection, Recipe

WAYS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "loss.class_weights: balanced": {"loss": {"class_weights": "balanced"}},
    "loss.logit_adjustment: 1": {"loss": {"logit_adjustment": 1.0}},
    "loss.kind: focal": {"loss": {"kind": "focal"}},
    "data.sampling: balanced": {"sampling": "balanced"},
    "data.sampling: 0.5": {"sampling": 0.5},
}


def put_images(folder: Path, seed: int, most: int, ratio: float) -> list[str]:
    """Write the training images of a seed and all test images; return the classes from the rarest on."""
    data = open_data(DataSection(source="fashion_mnist", validation_fraction=0.0), 0)
    rng, classes = np.random.default_rng(seed), np.array(data.classes)
    order_C = rng.permutation(len(classes))
    counts_C = np.round(most * ratio ** -(np.arange(len(classes)) / (len(classes) - 1))).astype(int)
    assert data.test is not None
    if not folder.exists():
        for split, role in ((data.train, "train"), (data.test, "test")):
            for number, count in zip(order_C, counts_C, strict=True):
                rows = np.flatnonzero(split.labels_N == number)
                rows = rng.permutation(rows)[:count] if role == "train" else rows
                put_rows(split, rows.tolist(), folder / role / folder_name(classes[number]))
    return [folder_name(classes[number]) for number in order_C[::-1]]


def recipe_of(folder: Path, seed: int, args: argparse.Namespace, way: dict[str, Any]) -> Recipe:
    data = {"source": "folder", "path": str(folder), "image_size": 48, "validation_fraction": 0.0}
    data |= {"sampling": way.get("sampling", "natural")}
    return bundled_recipe("unequal", seed, data, way.get("loss", {}), args)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--most", type=int, default=1000, help="images of the most frequent class")
    parser.add_argument("--ratio", type=float, default=100.0, help="of the most frequent class to the rarest")
    args = parser.parse_args()
    cache = cache_folder("unequal_classes")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    for seed in range(args.seeds):
        folder = cache / f"{args.most}_{args.ratio:g}_{seed}"
        by_size = put_images(folder, seed, args.most, args.ratio)
        for name, way in WAYS.items():
            result = run_quietly(recipe_of(folder, seed, args, way))
            recalls = [result["per_class"][label]["accuracy"] for label in by_size]
            found[name].append(
                {
                    "balanced": result["balanced_accuracy"],
                    "rare": float(np.mean(recalls[:3])),
                    "frequent": float(np.mean(recalls[-3:])),
                }
            )
    head = "| | balanced accuracy | three rarest classes | three most frequent | against nothing, 95 % interval |"
    show_medians(head, found)


if __name__ == "__main__":
    main()
