"""Scenes that are photographed several times: a random hold-out has photos of the scenes that were trained on."""

from pathlib import Path

import numpy as np
from PIL import Image


def put_scenes(folder: Path, num_scenes: int = 40, photos: int = 6, side_px: int = 32, seed: int = 0) -> Path:
    """`folder/CLASS/sceneN_K.png`: the label of a scene is a toss of a coin, so that no photo tells that of another.

    A scene is a pattern of blurred grey blobs; its photos differ by a shift of up to 2 pixels, brightness and noise.
    """
    draws = np.random.default_rng(seed)
    classes = draws.permutation(np.arange(num_scenes) % 2)
    for scene in range(num_scenes):
        coarse_HW = draws.uniform(0, 255, (6, 6)).astype(np.uint8)
        wide_HW = np.asarray(Image.fromarray(coarse_HW).resize((side_px + 4, side_px + 4), Image.Resampling.BICUBIC))
        place = folder / "ab"[classes[scene]]
        place.mkdir(parents=True, exist_ok=True)
        for photo in range(photos):
            top, left = draws.integers(0, 5, 2)
            photo_HW = wide_HW[top : top + side_px, left : left + side_px] * draws.uniform(0.9, 1.1)
            photo_HW = (photo_HW + draws.normal(0, 4, photo_HW.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(photo_HW).save(place / f"scene{scene}_{photo}.png")
    return folder


def scene_of(name: str) -> str:
    """The scene in the name of a photo."""
    return Path(name).name.split("_")[0]
