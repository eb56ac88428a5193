"""Compare LoRA with full fine-tuning and with a linear head, on a vision transformer and a ConvNeXt, at equal time.

    python benchmarks/adapters.py [--seeds 3] [--images 500] [--epochs 20] [--pretrain-epochs 10] [--size 64]

Pretrained weights of neither are on every machine, so both small networks (timm's test_vit and test_convnext) are
trained here first: on five classes of Fashion-MNIST, all 30,000 images of them. Transfer is to the other five, of which
`--images` training images are drawn by seed; scored are all 5,000 test images of these. Adapters stand in the second
half of the network, whose first half is cached as codes; full fine-tuning trains everything, as does `suffix` the
second half alone. Each way but the first is made as long as full fine-tuning takes in seconds: two short runs of each,
of unequal length, tell what an epoch costs. The learning rate of each is the best of three by the validation split.

Prints Markdown: for each network and way trained parameters, epochs, seconds of training, and top1 by seed, with the
difference to full fine-tuning and the interval of its mean (Student's t).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from by_seed import against, cache_folder, folder_name, put_rows, run_quietly

from tlscale.data.sources.open import open_data
from tlscale.recipe.schema import DataSection, Recipe

NETWORKS: dict[str, dict[str, str]] = {
    "test_vit": {
        "first half": r"(cls_token|pos_embed|patch_embed\..*|blocks\.[012]\..*)",
        "layers": r"blocks\.[345]\.(attn|mlp)\..*",
    },
    "test_convnext": {"first half": r"(stem|stages\.[01])\..*", "layers": r"stages\.[23]\..*"},
}
RATES = {
    "full": (3e-4, 1e-3, 3e-3),
    "suffix": (3e-4, 1e-3, 3e-3),
    "lora": (1e-3, 3e-3, 1e-2),
    "head": (3e-3, 1e-2, 3e-2),
}


def put_images(folder: Path, classes: range, per_split: dict[str, int | None], seed: int) -> Path:
    """Write images of some classes as a folder, so many of each split (None: all), drawn by seed."""
    data = open_data(DataSection(source="fashion_mnist", validation_fraction=0.0), 0)
    rng = np.random.default_rng(seed)
    assert data.test is not None
    for split, role in ((data.train, "train"), (data.test, "test")):
        rows = np.flatnonzero(np.isin(split.labels_N, classes))
        chosen = rng.permutation(rows)[: per_split[role]]
        for label in np.unique(split.labels_N[chosen]).tolist():
            own = chosen[split.labels_N[chosen] == label].tolist()
            put_rows(split, own, folder / role / folder_name(data.classes[label]))
    return folder


def recipe_of(
    network: str, way: str, folder: Path, weights: str, epochs: float, lr: float, seed: int, size: int
) -> Recipe:
    spec = NETWORKS[network]
    more: dict[str, dict[str, Any]] = {
        "full": {},
        "suffix": {"freeze": spec["first half"]},
        "lora": {"freeze": spec["first half"], "adapters": {"lora": {"layers": spec["layers"], "rank": 8}}},
        "head": {"freeze": ".*"},
    }
    return Recipe.model_validate(
        {
            "name": "adapters",
            "seed": seed,
            "data": {"source": "folder", "path": str(folder), "image_size": size, "validation_fraction": 0.2},
            "backbone": {"name": network, "weights": weights, "in_chans": 1},
            "duration": f"{max(round(epochs * 10) / 10, 0.1):g} epochs",
            "batch_size": 64,
            "optim": {"name": "adamw", "lr": lr, "weight_decay": 0.01},
            "evaluate": {"choose": "best"},
            **more[way],
        }
    )


def pretrained(network: str, folder: Path, args: argparse.Namespace, root: Path) -> str:
    """Train a network on the first five classes; the weights of its run, for `backbone.weights`."""
    out = root / f"{network}_{args.size}_{args.pretrain_epochs}"
    if not (out / "result.json").is_file():
        recipe = recipe_of(network, "full", folder, "none", args.pretrain_epochs, 2e-3, 0, args.size)
        run_quietly(recipe, out)
    return f"run:{out}"


def epochs_of_equal_time(ways: list[str], cost: Callable[[str, float], float], epochs: int) -> dict[str, float]:
    """Return how many epochs of each way take as long as those of the first, from two short runs of each."""
    seconds = {way: statistics.median([(cost(way, 4) - cost(way, 2)) / 2 for _ in range(3)]) for way in ways}
    return {way: epochs * seconds[ways[0]] / max(seconds[way], 1e-6) for way in ways}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=20, help="of full fine-tuning")
    parser.add_argument("--pretrain-epochs", type=int, default=10)
    parser.add_argument("--pretrain-images", type=int, help="[default: all 30,000]")
    parser.add_argument("--size", type=int, default=64, help="of images, in pixels")
    args = parser.parse_args()
    root = cache_folder("adapters")
    before = root / f"first_{args.pretrain_images}"
    if not before.exists():
        put_images(before, range(5), {"train": args.pretrain_images, "test": None}, 0)
    print("| network | way | trained | epochs | seconds | top1 by seed | against full, 95 % interval |")
    print("|---|---|---|---|---|---|---|")
    for network in NETWORKS:
        weights = pretrained(network, before, args, root)
        folders = []
        for seed in range(args.seeds):
            folders.append(root / f"second_{args.images}_{seed}")
            if not folders[-1].exists():
                put_images(folders[-1], range(5, 10), {"train": args.images, "test": None}, seed)
        _compare(network, weights, folders, args)


def _compare(network: str, weights: str, folders: list[Path], args: argparse.Namespace) -> None:
    def made(way: str, seed: int, epochs: float, lr: float) -> dict[str, Any]:
        return run_quietly(recipe_of(network, way, folders[seed], weights, epochs, lr, seed, args.size))

    def cost(way: str, epochs: float) -> float:
        return float(made(way, 0, epochs, RATES[way][1])["seconds"]["train"])

    lengths = epochs_of_equal_time(list(RATES), cost, args.epochs)
    full: list[float] = []
    for way, rates in RATES.items():
        tried = {lr: made(way, 0, lengths[way], lr) for lr in rates}
        best = max(tried, key=lambda lr: float(tried[lr]["choice"]["figure"]))
        runs = [tried[best], *(made(way, seed, lengths[way], best) for seed in range(1, args.seeds))]
        scores = [one["top1"] for one in runs]
        full = full or scores
        seconds = statistics.median(one["seconds"]["train"] for one in runs)
        trained = f"{runs[0]['trainable_params']:,}"
        row = [network, f"{way}, lr {best:g}", trained, f"{lengths[way]:.1f}", f"{seconds:.1f}"]
        row += [" ".join(f"{score:.4f}" for score in scores), against(scores, full)]
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
