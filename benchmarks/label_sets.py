"""Measure what sets of labels and temperatures are worth on three kinds of images, and compare with MAPIE.

    python benchmarks/label_sets.py [--seeds 10] [--images 1200]

Real Fashion-MNIST, scikit-learn's digits, and patches of 32 x 32 pixels of scikit-learn's two photos, whose class is
which third of which photo they are from. Of each `--images` are drawn by seed: half for training, of which two fifths
are the validation images that choose, and half for the test. A ridge probe on codes of the bundled ResNet-10-T, which
is not fitted again to the validation images.

Prints Markdown: top1; how often the set has the true label, without the rule that it always has the label itself and
with it (90 % is promised; beside it the standard error of the mean, and that of one seed which sampling alone
makes, from both sets of images); the size of a set; and the calibration error on test images before and after. Where
MAPIE is installed (`pip install --no-deps --target DIR mapie`, and DIR on PYTHONPATH), its `lac` sets are computed from
the saved predictions of validation and test images, and must be the same.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

import tlscale
from tlscale.data.sources.open import open_data
from tlscale.models.calibration import Calibration
from tlscale.recipe.schema import DataSection, Recipe

Drawn = tuple[list[np.ndarray], list[str]]


def fashion_mnist(rng: np.random.Generator, count: int) -> Drawn:
    split = open_data(DataSection(source="fashion_mnist", validation_fraction=0.0), 0).train
    rows = rng.permutation(len(split))[:count].tolist()
    return [np.asarray(split.read(row)).squeeze() for row in rows], [str(split.labels_N[row]) for row in rows]


def digits(rng: np.random.Generator, count: int) -> Drawn:
    found = load_digits()
    rows = rng.permutation(len(found.images))[:count]
    return [(found.images[row] * 15.9).astype(np.uint8) for row in rows], [str(found.target[row]) for row in rows]


def patches(rng: np.random.Generator, count: int) -> Drawn:
    photos = load_sample_images().images
    images, labels = [], []
    for _ in range(count):
        photo, third = int(rng.integers(2)), int(rng.integers(3))
        width = photos[photo].shape[1] // 3
        top, left = rng.integers(photos[photo].shape[0] - 32), third * width + rng.integers(width - 32)
        images.append(photos[photo][top : top + 32, left : left + 32])
        labels.append(f"photo {photo}, third {third}")
    return images, labels


DATA: dict[str, Callable[[np.random.Generator, int], Drawn]] = {
    "Fashion-MNIST": fashion_mnist,
    "digits": digits,
    "patches of photos": patches,
}


def run(folder: Path, name: str, seed: int, count: int) -> Path:
    """Draw images and run the probe; return its folder."""
    images, labels = DATA[name](np.random.default_rng(seed), count)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        place = folder / "data" / ("test" if number % 2 else "train") / label
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{number:05}.png")
    recipe = Recipe.model_validate(
        {
            "name": "sets",
            "seed": seed,
            "data": {
                "source": "folder",
                "path": str(folder / "data"),
                "image_size": 48,
                "validation_fraction": 0.4,
                "duplicates": "warn",
            },
            "backbone": {"name": "resnet10t", "weights": "bundled"},
            "probe": {"kind": "ridge", "refit": False},
        }
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        tlscale.run(recipe, folder / "run")
        tlscale.evaluate(folder / "run", split="validation")
    return folder / "run"


def saved(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, Calibration]:
    """Read true classes, answers, calibrated probabilities and the calibration of a file of predictions."""
    table = pq.read_table(path)
    about = json.loads(table.schema.metadata[b"tlscale"])
    calibration = Calibration.model_validate(about["calibration"])
    labels_N, answers_N = (
        np.array([about["classes"].index(label) for label in table[name].to_pylist()])
        for name in ("true_label", "label")
    )
    logits_NC = torch.tensor(table["logits"].to_pylist(), dtype=torch.float32)
    return labels_N, answers_N, calibration.probabilities(logits_NC).numpy(), calibration


def measure(out: Path) -> dict[str, float]:
    labels_N, answers_N, shares_NC, calibration = saved(out / "predictions.parquet")
    held = saved(out / "evaluations" / "validation" / "predictions.parquet")
    plain_NC = shares_NC >= calibration.sets.threshold
    members_NC = calibration.sets.members(shares_NC, answers_N)
    if importlib.util.find_spec("mapie") is not None:
        assert np.array_equal(plain_NC, by_mapie(held[0], held[2], shares_NC)), "MAPIE has other sets"
    told = json.loads((out / "result.json").read_text())
    here_N = np.arange(len(labels_N))
    return {
        "top1": told["top1"],
        "plain": float(plain_NC[here_N, labels_N].mean()),
        "covered": float(members_NC[here_N, labels_N].mean()),
        "size": float(members_NC.sum(1).mean()),
        "before": told["ece"],
        "after": told["calibration"]["ece"],
        "sampling": float(np.sqrt(0.09 / len(labels_N) + 0.09 / len(held[0]))),
    }


def by_mapie(labels_M: np.ndarray, shares_MC: np.ndarray, shares_NC: np.ndarray) -> np.ndarray:
    """Let MAPIE make the sets, of the same probabilities."""
    from mapie.classification import SplitConformalClassifier
    from sklearn.base import BaseEstimator, ClassifierMixin

    class Given(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
        """Gives the probabilities that it is given."""

        classes_, is_fitted_ = np.arange(shares_MC.shape[1]), True

        def fit(self, x: np.ndarray, y: np.ndarray) -> Given:
            return self

        def predict_proba(self, x: np.ndarray) -> np.ndarray:
            return x

        def predict(self, x: np.ndarray) -> np.ndarray:
            return x.argmax(1)

        def __sklearn_is_fitted__(self) -> bool:
            return True

    theirs = SplitConformalClassifier(Given(), confidence_level=0.9, conformity_score="lac", prefit=True)
    theirs.conformalize(shares_MC, labels_M)
    found: Any = theirs.predict_set(shares_NC)[1]
    return np.asarray(found[:, :, 0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--images", type=int, default=1200)
    args = parser.parse_args()
    titles = "top1 | without the label's rule | of one seed by sampling | in the set | size | ECE before | after"
    print(f"| images | {titles} |")
    print("|---|---|---|---|---|---|---|---|")
    for name in DATA:
        rows = []
        for seed in range(args.seeds):
            with tempfile.TemporaryDirectory() as folder:
                rows.append(measure(run(Path(folder), name, seed, args.images)))
        mean = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
        error = float(np.std([row["plain"] for row in rows], ddof=1) / np.sqrt(len(rows))) if len(rows) > 1 else 0.0
        print(
            f"| {name} | {mean['top1']:.3f} | {mean['plain']:.3f} ± {error:.3f} | {mean['sampling']:.3f} | "
            f"{mean['covered']:.3f} | {mean['size']:.2f} | {mean['before']:.3f} | {mean['after']:.3f} |"
        )
    with_mapie = importlib.util.find_spec("mapie") is not None
    print(
        f"\nMAPIE: {'the same sets for every image and seed' if with_mapie else 'is not installed, and was not asked'}."
    )


if __name__ == "__main__":
    main()
