"""What it costs to address codes by the content of images: hashing, and a second run on the codes.

    python benchmarks/content_hashing.py [--images 2000] [--repeats 3] [--before CHECKOUT]

It makes JPEG photos of 500 x 375, reads them once, so that the file cache is warm, and then, `--repeats` times each:

- hashes the bytes of all of them in one thread;
- runs a ridge probe on them with an empty `$TLSCALE_CACHE` (the first run), and the same once more (the second run),
  each a process of its own, timed from outside.

With `--before`, another checkout of tlscale runs the same, turn by turn. Printed are medians, and ratios of this run.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parents[1]
RECIPE = """
name: hashing
data: {{source: folder, path: {path}, image_size: 96}}
backbone: {{name: resnet10t, weights: bundled}}
probe: {{kind: ridge}}
"""


def make_photos(folder: Path, num_images: int) -> list[Path]:
    """Write JPEG files of two classes that are as large as photos of their size are."""
    rng, paths = np.random.default_rng(0), []
    for i in range(num_images):
        coarse = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        fine = np.asarray(Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC), np.int16)
        pixels = np.clip(fine + rng.normal(0, 12, fine.shape), 0, 255).astype(np.uint8)
        path = folder / f"class{i % 2}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=90)
        paths.append(path)
    return paths


def hashing_s(paths: list[Path]) -> float:
    """Return the seconds that SHA-256 of all bytes takes in one thread, reading left out."""
    contents = [path.read_bytes() for path in paths]
    start_s = time.perf_counter()
    for content in contents:
        hashlib.sha256(content).digest()
    return time.perf_counter() - start_s


def run_s(checkout: Path, recipe: Path, cache: Path) -> float:
    """Return the seconds of one run, from outside."""
    out = recipe.parent / "run"
    shutil.rmtree(out, ignore_errors=True)
    env = {**os.environ, "PYTHONPATH": str(checkout), "TLSCALE_CACHE": str(cache)}
    start_s = time.perf_counter()
    command = [sys.executable, "-c", "from tlscale.cli import main; main()", "run", str(recipe), "--out", str(out)]
    subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL, cwd=recipe.parent)
    return time.perf_counter() - start_s


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--before", type=Path, help="a checkout of an older tlscale")
    args = parser.parse_args()
    checkouts = {"now": HERE, **({"before": args.before.resolve()} if args.before else {})}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        paths = make_photos(folder / "photos", args.images)
        recipe = folder / "recipe.yaml"
        recipe.write_text(RECIPE.format(path=folder / "photos"))
        size_kib = sum(path.stat().st_size for path in paths) / len(paths) / 1024
        print(f"{len(paths)} photos of {size_kib:.0f} KiB on average", flush=True)
        times: dict[str, list[float]] = {"hashing": []}
        for _ in range(args.repeats):
            times["hashing"].append(hashing_s(paths))
            for name, checkout in checkouts.items():
                cache = folder / f"cache-{name}"
                shutil.rmtree(cache, ignore_errors=True)
                times.setdefault(f"first {name}", []).append(run_s(checkout, recipe, cache))
                times.setdefault(f"second {name}", []).append(run_s(checkout, recipe, cache))
        medians = {name: statistics.median(values) for name, values in times.items()}
        for name, median_s in medians.items():
            print(f"{name:14s} {median_s:8.3f} s   of {', '.join(f'{value:.3f}' for value in times[name])}")
        print(f"hashing / first run: {medians['hashing'] / medians['first now']:.4f}")
        if args.before:
            print(f"first run, now / before: {medians['first now'] / medians['first before']:.3f}")
            print(f"second run, now / before: {medians['second now'] / medians['second before']:.3f}")


if __name__ == "__main__":
    main()
