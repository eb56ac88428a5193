"""`tlscale predict` against the extraction of codes, which reads and computes the same: speed; and memory.

    python benchmarks/predict.py [--images 10000] [--many 100000] [--rounds 3] [--backbone test_resnet] [--size 32]

A logistic probe on `--images` different small grey PNG files (28 px, real images of the shipped sample with a number
drawn into each). Extraction is `tlscale codes` with an empty $TLSCALE_CACHE, prediction `tlscale predict` with a CSV
file; each a process of its own, in turns, and medians are compared: images a second as each says in the end, without
its start. For memory the files are listed over and over, up to `--many`: the peak of that process against that of one
round. The last line is JSON; the exit code is 1 where a claim fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from tlscale.data.decode import decode_image
from tlscale.data.sources.fashion_mnist import CLASSES, read_sample

LEAST_SPEED, MOST_MORE_MIB = 0.9, 64.0
"""The claims: a share of extraction's speed, and MiB more for `--many` images than for `--images`."""


def put_images(folder: Path, count: int) -> list[Path]:
    """Write different images, half of them to train and half to test, in the order of their classes."""
    split, written = read_sample().splits["train"], []
    for number in range(count):
        row = number % len(split.label_ids_N)
        image = decode_image(split.store.read(row), in_chans=1, max_pixels=10**6, where=str(row))[..., 0].copy()
        image[0, :4] = np.frombuffer(number.to_bytes(4, "little"), np.uint8)
        name = CLASSES[split.label_ids_N[row]].replace("/", "-")
        path = folder / "train" / name / f"{number:07}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
        written.append(path)
    return written


def tlscale(*words: str, cache: Path) -> tuple[str, float]:
    """Run a command; return what it said, and the peak of its memory in MiB."""
    environment = {**os.environ, "TLSCALE_CACHE": str(cache)}
    with tempfile.TemporaryFile("w+") as log:
        command = [sys.executable, "-m", "tlscale", *words]
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        log.seek(0)
        said = log.read()
    if status:
        sys.exit(f"{' '.join(words)} failed:\n{said[-3000:]}")
    return said, usage.ru_maxrss / 1024


def speed_of(said: str) -> float:
    """Return the last speed that a command said."""
    return float(re.findall(r"([\d.]+) images/s", said)[-1])


def measure(args: argparse.Namespace, folder: Path) -> dict[str, object]:
    """Measure all, and return what was found."""
    images = put_images(folder / "data", args.images)
    recipe = {
        "name": "speed",
        "data": {"source": "folder", "path": str(folder / "data"), "image_size": args.size},
        "backbone": {"name": args.backbone, "weights": "none", "in_chans": 1},
        "probe": {"kind": "logistic", "strengths": [0.1]},
    }
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "list").write_text("\n".join(map(str, images)))
    with (folder / "many").open("w") as file:
        file.writelines(f"{images[number % len(images)]}\n" for number in range(args.many))
    tlscale("run", str(folder / "r.yaml"), "--out", str(folder / "run"), "--overwrite", cache=folder / "cache")
    extracted, predicted, peaks = [], [], []
    for number in range(args.rounds):
        shutil.rmtree(folder / "cache", ignore_errors=True)
        said, _ = tlscale("codes", str(folder / "r.yaml"), cache=folder / "cache")
        extracted.append(speed_of(said))
        words = ["predict", str(folder / "run"), "--images-from", str(folder / "list"), "--out"]
        said, peak = tlscale(*words, str(folder / f"{number}.csv"), cache=folder / "cache")
        predicted.append(speed_of(said))
        peaks.append(peak)
        print(f"round {number + 1}: codes {extracted[-1]:,.0f} images/s, predict {predicted[-1]:,.0f}, {peak:,.0f} MiB")
    words = ["predict", str(folder / "run"), "--images-from", str(folder / "many"), "--out", str(folder / "many.csv")]
    said, most = tlscale(*words, cache=folder / "cache")
    rows = sum(1 for _ in (folder / "many.csv").open("rb")) - 1
    assert rows == args.many, rows
    share = statistics.median(predicted) / statistics.median(extracted)
    more = most - statistics.median(peaks)
    return {
        "images": args.images,
        "many": args.many,
        "backbone": args.backbone,
        "extracted_per_s": extracted,
        "predicted_per_s": predicted,
        "share_of_extraction": round(share, 3),
        "many_per_s": speed_of(said),
        "peak_mib": round(statistics.median(peaks), 1),
        "many_peak_mib": round(most, 1),
        "holds": share >= LEAST_SPEED and more <= MOST_MORE_MIB,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--many", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backbone", default="test_resnet")
    parser.add_argument("--size", type=int, default=32)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args, Path(folder))
    print(json.dumps(found))
    sys.exit(0 if found["holds"] else 1)


if __name__ == "__main__":
    main()
