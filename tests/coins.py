"""Data sets from which nothing can be learned: real images with labels drawn at random."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from scipy.stats import binom

from tests.small_runs import sample_images


def put_coins(path: Path, splits: dict[str, int], seed: int = 0, classes: tuple[str, ...] = ("heads", "tails")) -> Path:
    """A Parquet manifest of so many images a split, all different; as many of each class as can be.

    With one split only it has no column `split`.
    """
    count = sum(splits.values())
    images_NHW, _ = sample_images("train", count)
    rng = np.random.default_rng(seed)
    labels = np.concatenate([rng.permutation(np.arange(size) % len(classes)) for size in splits.values()])
    columns = {
        "image": [_png(image_HW) for image_HW in images_NHW[rng.permutation(count)]],
        "label": [classes[label] for label in labels],
        "split": [name for name, size in splits.items() for _ in range(size)],
    }
    if len(splits) == 1:
        del columns["split"]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def _png(image_HW) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image_HW).save(buffer, "PNG")
    return buffer.getvalue()


def chance(num_images: int, share: float, num_looks: int, alpha: float = 1e-3) -> tuple[float, float]:
    """Between which shares right a guesser stays with probability 1 - alpha at least.

    Args:
        share: of the answers that are right by chance.
        num_looks: scores that are looked at, or of which the best was taken (Bonferroni).
    """
    tail = alpha / 2 / num_looks
    low, high = binom.ppf((tail, 1 - tail), num_images, share)
    return float(low) / num_images, float(high) / num_images
