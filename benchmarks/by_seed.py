"""What comparisons over several seeds share: images as a folder, quiet runs, and differences with their interval."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import stats

import tlscale
from tlscale.commands.run_result import RunResult
from tlscale.data.sources.open import ImageSplit
from tlscale.recipe.schema import Recipe


def cache_folder(name: str) -> Path:
    """Return where a benchmark keeps its images."""
    return Path(os.environ.get("TLSCALE_CACHE", Path.home() / ".cache" / "tlscale")) / name


def folder_name(class_name: str) -> str:
    """Return a class of Fashion-MNIST as the name of a folder."""
    return class_name.replace("/", " or ")


def put_rows(split: ImageSplit, rows: Sequence[int], folder: Path) -> None:
    """Write some images of a split of arrays as PNG, each named by its row."""
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        Image.fromarray(np.asarray(split.read(row)).squeeze()).save(folder / f"{row:05}.png")


def run_quietly(recipe: Recipe, out: Path | None = None) -> RunResult:
    """Run a recipe without its output, in a folder that goes away where `out` names none."""
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()):
        return tlscale.run(recipe, out or Path(place) / "run", overwrite=True)


def against(scores: Sequence[float], reference: Sequence[float]) -> str:
    """Return the mean difference, seed by seed, with its 95% interval (Student's t); "-" where there is none."""
    gains = np.array(scores) - np.array(reference)
    if scores is reference or len(gains) < 2:
        return "-"
    half = stats.t.ppf(0.975, len(gains) - 1) * gains.std(ddof=1) / len(gains) ** 0.5
    return f"{gains.mean():+.4f} ({gains.mean() - half:+.4f} to {gains.mean() + half:+.4f})"


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser of what `bundled_recipe` and all comparisons take."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--freeze", default=".*")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--lr", type=float, default=5e-3)
    return parser


def bundled_recipe(
    name: str, seed: int, data: dict[str, Any], loss: dict[str, Any], args: argparse.Namespace
) -> Recipe:
    """Return a recipe that trains the bundled network as far as `--freeze` lets it."""
    return Recipe.model_validate(
        {
            "name": name,
            "seed": seed,
            "data": data,
            "backbone": {"name": "resnet10t", "weights": "bundled", "in_chans": 1},
            "freeze": args.freeze,
            "duration": f"{args.epochs} epochs",
            "batch_size": 64,
            "optim": {"name": "adamw", "lr": args.lr, "weight_decay": 0.01},
            "loss": loss,
        }
    )


def show_medians(head: str, found: dict[str, list[dict[str, float]]]) -> None:
    """Print a table: each way's medians over seeds, and how far its first figure is from that of the first way."""
    first = next(iter(found.values()))
    figure = next(iter(first[0]))
    print(f"{head}\n{'|---' * (head.count('|') - 1)}|")
    for name, rows in found.items():
        cells = [f"{np.median([row[key] for row in rows]):.4f}" for key in rows[0]]
        gain = "-" if rows is first else against([row[figure] for row in rows], [row[figure] for row in first])
        print(f"| {' | '.join([name, *cells, gain])} |", flush=True)
