"""The seconds that a run reports, compared with those of its process measured from outside.

    python benchmarks/wall_seconds.py --images 200000 --side 50 --steps 20

A folder of so many small JPEG pictures is made once below --data (and kept there), `tlscale run` trains on it for a few
steps as a process of its own, once with steps that see few of the images and once with all of them decoded beforehand.
Prints a table: the process from outside (until its end), `wall_s`, and the parts of it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

REPO = Path(__file__).resolve().parent.parent
_CLASSES = 10


def put_pictures(folder: Path, count: int, side: int) -> None:
    """Pictures of noise in two colours, equally many in each class; those that are there are not made again."""
    noise = np.random.default_rng(0)
    for number in range(count):
        path = folder / "train" / f"class_{number % _CLASSES}" / f"{number:07}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            coarse = noise.integers(0, 256, (5, 5, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((side, side)).save(path, quality=80)


def run(data: Path, out: Path, steps: int, batch_size: int) -> tuple[float, dict[str, object]]:
    """Seconds of `tlscale run` from outside, and its result."""
    recipe = {
        "name": "wall_seconds",
        "data": {"source": "folder", "path": str(data), "image_size": 32, "validation_fraction": 0.001},
        "backbone": {"name": "test_resnet", "weights": "none"},
        "duration": f"{steps} steps",
        "batch_size": batch_size,
    }
    out.mkdir(parents=True)
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    words = [sys.executable, "-m", "tlscale", "run", str(out / "recipe.yaml"), "--out", str(out / "run")]
    began_s = time.monotonic()
    with (out / "log").open("w") as log:
        subprocess.run(words, check=True, stdout=log, env={**os.environ, "PYTHONPATH": str(REPO)})
    took_s = time.monotonic() - began_s
    return took_s, json.loads((out / "run" / "result.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--side", type=int, default=50, help="of a picture, in pixels")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--data", type=Path, help="where pictures are kept; by default they are removed again")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = (args.data or Path(folder)) / f"{args.images}_{args.side}px"
        put_pictures(data, args.images, args.side)
        every = -(-args.images // args.batch_size)
        print("| steps | images used | process, s | wall_s | parts |\n|---|---|---|---|---|")
        for steps in dict.fromkeys((args.steps, every)):
            took_s, result = run(data, Path(folder) / f"{steps}", steps, args.batch_size)
            parts = ", ".join(f"{part} {spent_s}" for part, spent_s in dict(result["seconds"]).items() if spent_s)
            print(f"| {steps} | {result['images_seen']:,} | {took_s:.1f} | {result['wall_s']} | {parts} |", flush=True)


if __name__ == "__main__":
    main()
