"""What comparisons over several seeds share: images as a folder, quiet runs, and differences with their interval."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

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
