"""Make JPEG photos of 500 x 375 from pictures that scikit-image ships: a folder a class, the same bytes each time.

    python benchmarks/photos.py FOLDER [--count 4000]

A photo is a random part of one of twelve pictures, scaled, mirrored or not, and made lighter or darker. They are for
measuring speed: what is learned of them means nothing.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import skimage
from PIL import Image

PICTURES = (
    *("astronaut.png", "brick.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png"),
    *("hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png", "retina.jpg", "rocket.jpg"),
)
WIDTH, HEIGHT = 500, 375


def make_photos(folder: Path, count: int) -> Path:
    """Write `count` photos below `folder`, unless they are there."""
    done = folder / f"{count}.complete"
    if not done.exists():
        workers = min(16, os.cpu_count() or 1)
        parts = [range(start, count, len(PICTURES)) for start in range(len(PICTURES))]
        with ProcessPoolExecutor(workers) as pool:
            list(pool.map(partial(_of_picture, folder / "photos"), parts))
        done.touch()
    return folder / "photos"


def _of_picture(folder: Path, numbers: Iterable[int]) -> None:
    """Write the photos of these numbers, which are of one picture."""
    picture = None
    for number in numbers:
        if picture is None:
            name = PICTURES[number % len(PICTURES)]
            picture = Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")
            place = folder / name.split(".")[0]
            place.mkdir(parents=True, exist_ok=True)
        _photo(picture, np.random.default_rng(number)).save(place / f"{number:05}.jpg", quality=90)


def _photo(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    width = rng.uniform(0.4, 0.9) * min(picture.width, picture.height * WIDTH / HEIGHT)
    height = width * HEIGHT / WIDTH
    left, top = rng.uniform(0, picture.width - width), rng.uniform(0, picture.height - height)
    photo = picture.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, (left, top, left + width, top + height))
    if rng.random() < 0.5:
        photo = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    light = rng.uniform(0.7, 1.3)
    # Some noise, as a camera has it: without it the files are smaller, and sooner decoded, than those of photos.
    noise = rng.normal(0, 4, (HEIGHT, WIDTH, 3))
    return Image.fromarray(np.clip(np.asarray(photo) * light + noise, 0, 255).astype(np.uint8))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=4000)
    args = parser.parse_args()
    print(make_photos(args.folder, args.count))
