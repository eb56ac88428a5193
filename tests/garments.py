"""Pictures of none to two garments side by side, and a table that lists which: several labels an image."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from tests.small_runs import sample_images

CLASSES = ("boot", "shirt", "top", "trouser")
OF_LABEL = {9: "boot", 6: "shirt", 0: "top", 1: "trouser"}
SEVERAL = {"source": "manifest", "task": "multi_label", "label_separator": ";", "crop_mode": "squash"}
"""Keys of `data` that read the table."""
PROBE = {"backbone": {"name": "test_resnet", "weights": "none"}, "probe": {"kind": "logistic", "strengths": [0.1]}}
"""Keys of a recipe that fits a probe to it."""


def put_garments(folder: Path, num_images: int = 90, *, num_test: int = 0, photos: int = 1, seed: int = 0) -> Path:
    """Write the pictures and `list.csv`; no two pictures are equal.

    Args:
        num_images: of all.
        num_test: of them, the last ones; 0: the table has no column of splits.
        photos: in a row that show the same garments before other noise; more than 1: a column `patient` names them.
    """
    images_NHW, labels_N = sample_images("train", 200)
    kept = [row for row in range(200) if int(labels_N[row]) in OF_LABEL]
    draws, rows = np.random.default_rng(seed), []
    folder.mkdir(parents=True, exist_ok=True)
    picked: list[int] = []
    for number in range(num_images):
        if number % photos == 0:
            picked = draws.choice(kept, size=draws.integers(0, 3), replace=False)
        canvas_HW = draws.integers(0, 30, (28, 56)).astype(np.uint8)
        for place, row in enumerate(picked):
            canvas_HW[:, 28 * place : 28 * place + 28] = images_NHW[row]
        canvas_HW[:2] = draws.integers(0, 255, (2, 56))  # where both garments are, too
        Image.fromarray(canvas_HW).save(folder / f"{number}.png")
        label = ";".join(sorted({OF_LABEL[int(labels_N[row])] for row in picked}))
        rows.append((f"{number}.png", label, "test" if number >= num_images - num_test else "train", number // photos))
    columns = ["path", "label", *(["split"] if num_test else []), *(["patient"] if photos > 1 else [])]
    with (folder / "list.csv").open("w") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for path, label, split, patient in rows:
            named = {"path": path, "label": label, "split": split, "patient": f"p{patient}"}
            writer.writerow([named[name] for name in columns])
    return folder / "list.csv"
