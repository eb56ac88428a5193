"""Measure how well images unlike those of training are told apart: by frozen codes, and by those of a fine-tuned net.

    python benchmarks/unknown_images.py [--seeds 5] [--train 300] [--test 100] [--left-out 3] [--epochs 5]

Real Fashion-MNIST, of which three classes are left out by seed: the run learns the others, and the test images of the
three are unknown. So are scikit-learn's digits, which are no articles at all. The bundled ResNet-10-T at 48 px, once as
a probe on its frozen codes (ridge), once trained as a whole. Scores on the penultimate features of each network: the
Mahalanobis distance that `tlscale predict` has (`tlscale/training/unknown.py`), the distance to the fifth nearest
training image by cosine (Sun et al. 2022), and, as what everybody has, one minus the highest probability.

Prints Markdown: the AUROC of each score between known and unknown test images, mean over seeds with its range; for the
probe also what its own column `unknown` says: the share of known images that are known (chosen to be 0.95) and of
unknown ones that are not; and the size of what the model carries for it. `--test` images a class, `--train` likewise.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from by_seed import folder_name, put_rows, run_quietly
from PIL import Image
from sklearn.datasets import load_digits

import tlscale
from tlscale.codes.probes.ranking import Ranking
from tlscale.data.sources.open import open_data
from tlscale.recipe.schema import DataSection, Recipe
from tlscale.training.unknown import fit_unknown

RUNS: dict[str, dict[str, Any]] = {
    "frozen": {"probe": {"kind": "ridge"}},
    "fine-tuned": {"batch_size": 64, "optim": {"name": "adamw", "lr": 1e-3}},
}


def put_images(folder: Path, seed: int, args: argparse.Namespace) -> None:
    """Write images of known classes for a run, and of those left out, and digits."""
    data = open_data(DataSection(source="fashion_mnist", validation_fraction=0.0), 0)
    assert data.test is not None
    left_out = set(np.random.default_rng(seed).permutation(len(data.classes))[: args.left_out].tolist())
    for split, role, count in ((data.train, "train", args.train), (data.test, "test", args.test)):
        for number, name in enumerate(data.classes):
            place = folder / ("left_out" if number in left_out else f"known/{role}") / folder_name(name)
            if number in left_out and role == "train":
                continue
            put_rows(split, np.flatnonzero(split.labels_N == number)[:count].tolist(), place)
    (folder / "digits").mkdir()
    for row, digit in enumerate(load_digits().images[: args.test]):
        Image.fromarray((digit * 15.9).astype(np.uint8)).save(folder / "digits" / f"{row:05}.png")


def recipe_of(folder: Path, seed: int, args: argparse.Namespace, name: str) -> Recipe:
    changes = RUNS[name] if "probe" in RUNS[name] else {**RUNS[name], "duration": f"{args.epochs} epochs"}
    return Recipe.model_validate(
        {
            "name": "unknown",
            "seed": seed,
            "data": {"source": "folder", "path": str(folder / "known"), "image_size": 48, "validation_fraction": 0.2},
            "backbone": {"name": "resnet10t", "weights": "bundled", "in_chans": 1},
            **changes,
        }
    )


def auroc(known_N: np.ndarray, unknown_M: np.ndarray) -> float:
    """Return how often an unknown image has the higher score of the two."""
    scores = np.concatenate([known_N, unknown_M])
    found = Ranking(np.arange(len(scores)) >= len(known_N), scores).auroc
    assert found is not None
    return found


def by_score(model: Any, folder: Path) -> dict[str, dict[str, np.ndarray]]:  # noqa: ANN401 (what `load` gives)
    """Compute each score of known test images, of those left out, and of digits."""
    train_ND = np.asarray(model.features(folder / "known" / "train"))
    names = [path.parent.name for path in sorted((folder / "known" / "train").rglob("*.png"))]
    labels_N = np.unique(names, return_inverse=True)[1]
    distance = fit_unknown(torch.from_numpy(train_ND), labels_N, torch.from_numpy(train_ND))
    assert distance is not None
    unit_ND = train_ND / np.linalg.norm(train_ND, axis=1, keepdims=True)
    scores: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for of, place in {"known": "known/test", "left out": "left_out", "digits": "digits"}.items():
        codes_BD = np.asarray(model.features(folder / place))
        cosines_BN = codes_BD / np.linalg.norm(codes_BD, axis=1, keepdims=True) @ unit_ND.T
        scores["Mahalanobis"][of] = distance.scores(torch.from_numpy(codes_BD))
        scores["nearest neighbours"][of] = 1 - np.sort(cosines_BN, axis=1)[:, -5]
        scores["probability"][of] = 1 - model.predict(folder / place).probabilities.max(axis=1)
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--train", type=int, default=300, help="images of a class, of which a fifth is validation")
    parser.add_argument("--test", type=int, default=100, help="images of a class")
    parser.add_argument("--left-out", type=int, default=3, help="classes")
    parser.add_argument("--epochs", type=int, default=5)
    args = parser.parse_args()
    found: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    own: list[tuple[float, float, float]] = []
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            put_images(folder, seed, args)
            for name in RUNS:
                run_quietly(recipe_of(folder, seed, args, name), folder / name)
                model = tlscale.load(folder / name)
                for score, values in by_score(model, folder).items():
                    for of in ("left out", "digits"):
                        found[name, score, of].append(auroc(values["known"], values[of]))
                if name == "frozen":
                    told = json.loads((folder / name / "result.json").read_text())["unknown"]
                    shares = [np.mean(model.predict(folder / of).unknown) for of in ("left_out", "digits")]
                    own.append((told["known"], *map(float, shares)))
                    size = told["bytes"]
    _show(found, own, size)


def _show(found: dict[tuple[str, str, str], list[float]], own: list[tuple[float, float, float]], size: int) -> None:
    print("| network | score | AUROC, classes left out | AUROC, digits |")
    print("|---|---|---|---|")
    for name, score in dict.fromkeys((name, score) for name, score, _ in found):
        cells = [found[name, score, of] for of in ("left out", "digits")]
        shown = [f"{np.mean(cell):.3f} ({min(cell):.3f} to {max(cell):.3f})" for cell in cells]
        print(f"| {name} | {score} | {' | '.join(shown)} |")
    known, left_out, digits = np.mean(own, axis=0)
    print(
        f"\nThe column `unknown` of the probe: {known:.3f} of the known test images are known (0.95 was chosen on "
        f"validation images), {left_out:.3f} of those of classes left out and {digits:.3f} of the digits are unknown. "
        f"It takes {size / 2**20:.2f} MiB in the model."
    )


if __name__ == "__main__":
    main()
