"""Estimate how long a probe will be fitted, and in how much memory, without its codes.

The basis: one pass over a few made-up codes of the same width and classes, measured here, times the images, and the
choice of one step, times the passes that fits of the kind took in `benchmarks/probe_scale.py` and `probe_solvers.py`.

Letters: N images, D features, C classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from tlscale.codes.probes.blockwise import is_large
from tlscale.codes.probes.kinds import kind_of
from tlscale.codes.probes.large_logistic import MEMORY, History, Images
from tlscale.distributed.settings import cpu_threads

_PASSES_OF_STRENGTH = {"logistic": 80, "sklearn": 240}  # of the exact path, and of scikit-learn
_PASSES_OF_LARGE = 50  # of all strengths, the sample and the fit again
_PASSES_OF_FEW = 25  # of a strength, where classes have few images
_MEASURED_NUMBERS = 2**22


@dataclass(frozen=True)
class Estimate:
    """Hold what a fit to one set of codes is expected to take."""

    seconds: float
    num_bytes: float
    basis: str


def estimate_fit(
    kind: str, num_images: int, width: int, num_classes: int, num_values: int, num_searched: int
) -> Estimate:
    """Estimate the fit of all values of the hyper-parameter to one set of codes, and the fit again.

    Args:
        kind: of probe.
        num_images: N, in training and validation.
        width: D.
        num_classes: C.
        num_values: of the hyper-parameter.
        num_searched: images of the validation and test split, whose neighbours are searched.
    """
    by_blocks, large = (
        kind_of(kind).is_by_blocks(num_images, width, num_classes),
        is_large(num_images, width, num_classes),
    )
    with cpu_threads(1) if by_blocks and not large else nullcontext():
        pass_s = seconds_of_a_pass(width, num_classes) * num_images
        if kind == "logistic":
            pass_s += _seconds_of_a_step(min(num_images, width), num_classes)
    codes, scores = num_images * width, num_images * num_classes
    each = f"{pass_s:.2g} s a pass over {num_images:,} codes of {width:,} features and {num_classes:,} classes"
    if kind == "knn":
        seconds = 2 * pass_s / (2 * num_classes) * num_searched  # as many products again for the order
        return Estimate(seconds, 24 * codes, f"{num_searched:,} images are compared with {num_images:,}")
    if by_blocks and kind == "ridge":
        return Estimate(pass_s * (4 * width / num_classes + 1) + num_values, 12 * codes, "its moments, block by block")
    if by_blocks:
        passes = _PASSES_OF_LARGE if large else _PASSES_OF_FEW * (num_values + 1)
        return Estimate(passes * pass_s, 12 * codes, f"about {passes} passes, {each}")
    if kind == "ridge":
        return Estimate(20 * num_values * pass_s, 24 * codes + 40 * scores, f"closed form; {each}")
    passes = _PASSES_OF_STRENGTH.get(kind, 80) * num_values
    at_once = 1 if kind == "sklearn" else num_values
    return Estimate(passes * pass_s, 32 * codes + 24 * scores * at_once, f"about {passes} passes, {each}")


def seconds_of_a_pass(width: int, num_classes: int) -> float:
    """Measure the loss and its gradient on made-up codes; return the seconds of one image, by the faster of two."""
    num_images = max(64, min(4096, _MEASURED_NUMBERS // max(width, num_classes)))
    generator = torch.Generator().manual_seed(0)
    codes_NQ = torch.randn(num_images, width + 1, generator=generator)
    images = Images(codes_NQ, torch.arange(num_images) % num_classes, num_classes)
    params_QC = torch.zeros(width + 1, num_classes)
    return _faster_of_two(lambda: images.loss(params_QC, 1.0)) / num_images


def _seconds_of_a_step(num_axes: int, num_classes: int) -> float:
    """Measure what it takes to choose the next step, which hangs on no image; return the seconds."""
    params_QC = torch.ones(num_axes + 1, num_classes)
    history = History(torch.ones(num_axes + 1, 1), [(params_QC, params_QC)] * MEMORY)
    return _faster_of_two(lambda: history.direction(params_QC, 1.0))


def _faster_of_two(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
