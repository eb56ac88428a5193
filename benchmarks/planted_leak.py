"""Plant a leak, several photos of one scene, and measure what a hold-out with and without groups reports of it.

    python benchmarks/planted_leak.py [--seeds 5]

Two data sets, each of things that are photographed six times (shifted by up to two pixels, brighter or darker, with
noise): `scenes`, whose label is a toss of a coin, so that nothing can be known of a new scene; and `articles`, 100
images of the sample of Fashion-MNIST that ships with tlscale, with their classes. For each seed a probe is chosen and
scored on a hold-out of 25 %, image by image and then by `data.group_regex`; what the same models have on photos of
things that nobody held or trained on is the truth. Prints a table; takes two minutes on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the data sets are those of the tests

import tlscale
from tests.scenes import put_scenes
from tests.small_runs import sample_images
from tlscale.data.sources.fashion_mnist import CLASSES
from tlscale.recipe.schema import Recipe

PHOTOS = 6
PROBES = {"nearest neighbour": {"kind": "knn", "neighbours": [1]}, "logistic": {"kind": "logistic"}}


def put_articles(folder: Path, role: str, count: int, photos: int, seed: int = 0) -> Path:
    """`folder/CLASS/articleN_K.png`, of real images."""
    draws = np.random.default_rng(seed)
    images_NHW, labels_N = sample_images(role, count)
    for article, (image_HW, label) in enumerate(zip(images_NHW, labels_N, strict=True)):
        place = folder / CLASSES[label].replace("/", "-")
        place.mkdir(parents=True, exist_ok=True)
        for photo in range(photos):
            shifted_HW = np.roll(image_HW, draws.integers(-2, 3, 2), axis=(0, 1)) * draws.uniform(0.9, 1.1)
            photo_HW = (shifted_HW + draws.normal(0, 4, shifted_HW.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(photo_HW).save(place / f"article{article}_{photo}.png")
    return folder


def measure(
    place: Path, unseen: Path, probe: dict[str, Any], regex: str | None, seed: int, out: Path
) -> dict[str, Any]:
    """Return the reported score and interval, and the truth."""
    data = {"source": "folder", "path": str(place), "validation_fraction": 0.25, "image_size": 48}
    recipe = Recipe.model_validate(
        {
            "name": "leak",
            "seed": seed,
            "data": {**data, **({} if regex is None else {"group_regex": regex})},
            "backbone": {"name": "resnet10t", "weights": "bundled"},
            "probe": {**probe, "refit": False},
        }
    )
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        result = tlscale.run(recipe, out)
        truth = tlscale.evaluate(out, data=str(unseen)).top1
    low, high = result.interval
    return {"top1": result.top1, "low": low, "high": high, "truth": truth, "holds": low <= truth <= high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        os.environ["TLSCALE_CACHE"] = str(root / "cache")
        sets = {
            "scenes": (put_scenes(root / "scenes", 100, PHOTOS), put_scenes(root / "new scenes", 400, 1, seed=1)),
            "articles": (
                put_articles(root / "articles", "train", 100, PHOTOS),
                put_articles(root / "new articles", "test", 500, 1, seed=1),
            ),
        }
        print("| data | classifier | hold-out | reported top1 | its 95% interval | truth | intervals that hold it |")
        print("|---|---|---|---|---|---|---|")
        for name, (place, unseen) in sets.items():
            for number, (kind, probe) in enumerate(PROBES.items()):
                for regex in (None, rf"({name.rstrip('s')}\d+)_"):
                    out = root / "runs" / f"{name}-{number}-{regex is None}"
                    rows = [measure(place, unseen, probe, regex, s, Path(f"{out}-{s}")) for s in range(args.seeds)]
                    mean = {key: fmean(row[key] for row in rows) for key in rows[0]}
                    how = "by image" if regex is None else "by group"
                    interval = f"{mean['low']:.2f} to {mean['high']:.2f}"
                    holds = f"{sum(row['holds'] for row in rows)} of {len(rows)}"
                    print(
                        f"| {name} | {kind} | {how} | {mean['top1']:.2f} | {interval} | {mean['truth']:.2f} | {holds} |"
                    )


if __name__ == "__main__":
    main()
