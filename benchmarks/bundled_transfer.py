"""How the bundled weights transfer: linear probes on data they were not made from, compared with random weights.

    python benchmarks/bundled_transfer.py [--size 48] [--seeds 3] [--only digits] [--layer layer3]

For each data set the best layer (by the validation split) of the bundled ResNet-10-T and of the same network with
random weights, each fitted by logistic regression on the same labelled images, for several choices of these.
Fashion-MNIST is evaluated on all of its 10,000 test images; the others are split once into halves:

- digits: the 1,797 digits of 8 x 8 pixels that scikit-learn ships, 10 classes, 100 labels;
- icons: icons of Debian's oxygen-icon-theme by what they are for, 7 classes, 200 labels (needs apt-get and dpkg-deb);
- patterns: made here: stripes, checks, dots, rings, crosses, triangles, noise and bricks, of any size, angle and grey,
  half hidden by noise; 8 classes, 100 labels.

Prints Markdown: each, and the difference between the two over the choices of labels. The data sets are kept below
`$TLSCALE_CACHE/bundled_transfer`.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from scipy import stats
from sklearn.datasets import load_digits

import tlscale
from tlscale.training.metrics import wilson

NETWORK = "resnet10t"
LAYERS = ["layer3.0.act1", "layer3", "layer4"]
POOLS = ["avg", "avgmax"]
Labelled = tuple[str, Image.Image]


def digits() -> Iterator[Labelled]:
    for image_HW, label in zip(*load_digits(return_X_y=True), strict=True):
        yield str(label), Image.fromarray((image_HW.reshape(8, 8) * 255 / 16).astype(np.uint8))


def icons() -> Iterator[Labelled]:
    """Each icon once, on white, under its folder's name; small folders, and one of letters and signs, are skipped."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["apt-get", "download", "-qq", "oxygen-icon-theme"], cwd=folder, check=True)
        (package,) = Path(folder).glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", str(package), folder], check=True)
        seen = set()
        for kind in ("actions", "apps", "categories", "devices", "mimetypes", "places", "status"):
            for path in sorted((Path(folder) / "usr/share/icons/oxygen/base/64x64" / kind).glob("*.png")):
                drawn = Image.open(path).convert("RGBA")
                digest = hashlib.sha256(drawn.tobytes()).digest()
                if digest not in seen and not path.is_symlink():
                    seen.add(digest)
                    yield kind, Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn).convert("RGB")


def patterns(count: int = 1600, side: int = 48) -> Iterator[Labelled]:
    """Shapes as functions of turned and scaled coordinates, with two greys and noise."""
    rng = np.random.default_rng(0)
    row_HW, column_HW = np.mgrid[:side, :side] - side / 2
    for number in range(count):
        name = list(_SHAPES)[number % len(_SHAPES)]
        angle, period = rng.uniform(0, 2 * np.pi), rng.uniform(8, 20)
        u_HW = (row_HW * np.cos(angle) + column_HW * np.sin(angle) + rng.uniform(0, 20)) / period
        v_HW = (column_HW * np.cos(angle) - row_HW * np.sin(angle) + rng.uniform(0, 20)) / period
        inside_HW = _SHAPES[name](u_HW, v_HW, rng)
        one, two = rng.uniform(0, 110), rng.uniform(140, 255)
        one, two = (one, two) if rng.random() < 0.5 else (two, one)
        grey_HW = np.where(inside_HW, one, two) + rng.normal(0, rng.uniform(5, 50), (side, side))
        yield name, Image.fromarray(grey_HW.clip(0, 255).astype(np.uint8))


def _turned(x: np.ndarray) -> np.ndarray:
    """Distance from the nearest whole number."""
    return np.abs(x - np.round(x))


Shape = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]
_SHAPES: dict[str, Shape] = {
    "stripes": lambda u, v, rng: u % 1 < 0.5,
    "checks": lambda u, v, rng: (u % 1 < 0.5) != (v % 1 < 0.5),
    "dots": lambda u, v, rng: np.hypot(_turned(u), _turned(v)) < 0.3,
    "rings": lambda u, v, rng: np.hypot(u - 1, v - 1) % 1 < 0.5,
    "crosses": lambda u, v, rng: (
        (np.minimum(_turned(u), _turned(v)) < 0.1) & (np.maximum(_turned(u), _turned(v)) < 0.35)
    ),
    "triangles": lambda u, v, rng: u % 1 > 2 * np.abs(v % 1 - 0.5),
    "noise": lambda u, v, rng: rng.random(u.shape) < 0.5,
    "bricks": lambda u, v, rng: (u % 1 < 0.12) | ((v + 0.5 * (np.floor(u) % 2)) % 1.6 < 0.12),
}


DATASETS: dict[str, tuple[Callable[[], Iterator[Labelled]] | None, tuple[int, ...]]] = {
    "fashion_mnist": (None, (500, 5000)),
    "digits": (digits, (100,)),
    "icons": (icons, (200,)),
    "patterns": (patterns, (100,)),
}


def put(name: str, make: Callable[[], Iterator[Labelled]]) -> Path:
    """Write the data set as a folder per class, every second image of a class a test image."""
    cache = Path(os.environ.get("TLSCALE_CACHE") or Path.home() / ".cache" / "tlscale")
    folder = cache / "bundled_transfer" / name
    if folder.is_dir():
        return folder
    count: dict[str, int] = {}
    aside = folder.with_name(f".{name}.{os.getpid()}")
    for label, image in make():
        number = count[label] = count.get(label, -1) + 1
        split = aside / ("test" if number % 2 else "train") / label
        split.mkdir(parents=True, exist_ok=True)
        image.save(split / f"{number:05}.png")
    aside.rename(folder)
    return folder


def probe(
    data: dict[str, Any], weights: str, options: argparse.Namespace, labels: int, seed: int, out: Path
) -> dict[str, Any]:
    recipe = {
        "name": "probe",
        "seed": seed,
        "data": {**data, "image_size": options.size, "train_limit": labels, "validation_fraction": 0.2},
        "backbone": {"name": NETWORK, "weights": weights},
        "probe": {"kind": "logistic"},
        "codes": {"layer": options.layer or LAYERS, "pool": options.pool or POOLS},
        "compute": {"channels_last": True},
    }
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(recipe))
    return tlscale.run(tlscale.load_recipe(file), out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="bundled", help="or the path of a file")
    parser.add_argument("--size", type=int, default=48, help="pixels")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--layer", action="append", help=f"in place of {', '.join(LAYERS)}")
    parser.add_argument("--pool", action="append", help=f"in place of {', '.join(POOLS)}")
    parser.add_argument("--labels", type=int, action="append", help="only these numbers of labels")
    parser.add_argument("--only", choices=list(DATASETS), action="append")
    options = parser.parse_args()
    rows: list[str] = []
    differences = []
    with tempfile.TemporaryDirectory() as folder:
        for name, (make, sizes) in DATASETS.items():
            if options.only and name not in options.only:
                continue
            data = {"source": "fashion_mnist"} if make is None else {"source": "folder", "path": str(put(name, make))}
            for labels in options.labels or sizes:
                pair = []
                for weights in (options.weights, "none"):
                    found = [
                        probe(data, weights, options, labels, seed, Path(folder) / f"{len(rows)}_{seed}")
                        for seed in range(options.seeds)
                    ]
                    rows.append(_row(name, labels, weights, found))
                    pair.append([result["top1"] for result in found])
                if options.seeds > 1:
                    differences.append(_difference(name, labels, *pair))
    print("\n| data | labels | weights | top1, mean | each | 95 % interval of the mean's images | layers |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(rows))
    if differences:
        print("\n| data | labels | bundled - random, mean | 95 % interval over seeds | bundled is better |")
        print("|---|---|---|---|---|")
        print("\n".join(differences))


def _row(name: str, labels: int, weights: str, found: list[dict[str, Any]]) -> str:
    top1s = [result["top1"] for result in found]
    mean, count = statistics.fmean(top1s), found[0]["num_images"]
    low, high = wilson(round(mean * count), count) or (0.0, 1.0)
    layers = ", ".join(f"{result['probe']['layer']} {result['probe']['pool']}" for result in found)
    each = ", ".join(f"{top1:.4f}" for top1 in top1s)
    shown = "random" if weights == "none" else "bundled"
    return f"| {name} | {labels:,} | {shown} | **{mean:.4f}** | {each} | {low:.4f} to {high:.4f} | {layers} |"


def _difference(name: str, labels: int, bundled: list[float], random: list[float]) -> str:
    """Of the same labels and test images, by Student's t; two seeds or more."""
    each = [one - other for one, other in zip(bundled, random, strict=True)]
    count, mean = len(each), statistics.fmean(each)
    half = stats.t.ppf(0.975, count - 1) * statistics.stdev(each) / count**0.5
    wins = sum(difference > 0 for difference in each)
    return f"| {name} | {labels:,} | **{mean:+.4f}** | {mean - half:+.4f} to {mean + half:+.4f} | {wins} of {count} |"


if __name__ == "__main__":
    main()
