"""Logistic regression for all strengths at once, against scikit-learn's fitted once a strength.

    python benchmarks/probe_solvers.py [--rounds 3] [--width 1280] [--num-train 9000]

Codes are random projections of real Fashion-MNIST images (grey values, centred; then the positive part), from the
files that Debian's package puts under /usr/share/datasets or that TLSCALE_DATA names. The validation split is 1,000
other training images. Both get the same standardised codes in float64; scikit-learn runs as in `probe: {kind: sklearn}`
(lbfgs, default tolerance). Each round runs one after the other; seconds are medians of the rounds. `objective` is what
both minimise, mean cross-entropy + lam/2 |W|^2 on the training images: lower is nearer to the optimum. CPU seconds
are those of this process: on a machine that others use as well, wall time measures them too.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import sklearn
import torch
import torch.nn.functional as F
from torch import Tensor

from tlscale.codes.probes.kinds import PROBE_KINDS
from tlscale.codes.probes.linear import LinearPath
from tlscale.codes.probes.logistic import logistic_path
from tlscale.codes.probes.scikit import sklearn_path
from tlscale.data.sources.fashion_mnist import read_fashion_mnist
from tlscale.recipe.schema import DataSection

NUM_CLASSES = 10


@dataclass
class Codes:
    train_ND: Tensor
    labels_N: Tensor
    held_MD: Tensor
    held_labels_M: Tensor


def make_codes(num_train: int, num_held: int, width: int) -> Codes:
    split = read_fashion_mnist(DataSection.model_validate({"source": "fashion_mnist"})).splits
    store, labels = split["train"].store, split["train"].label_ids_N
    total = num_train + num_held
    pixels = np.stack([np.asarray(store.read(row), dtype=np.float64).ravel() for row in range(total)]) / 255
    images, generator = torch.from_numpy(pixels), torch.Generator().manual_seed(0)
    directions = torch.randn(images.shape[1], width, generator=generator, dtype=torch.float64)
    codes = torch.relu((images - images[:num_train].mean(0)) @ directions)
    train, held = codes[:num_train], codes[num_train:]
    mean, std = train.mean(0), train.std(0, unbiased=False)
    labels_N = torch.from_numpy(np.array(labels[:total], dtype=np.int64))
    return Codes((train - mean) / std, labels_N[:num_train], (held - mean) / std, labels_N[num_train:])


def timed(work: Callable[[], LinearPath]) -> tuple[LinearPath, float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def figures(path: LinearPath, index: int, strength: float, codes: Codes) -> tuple[float, float, float]:
    """Return validation top1, validation loss, and the objective on the training images."""
    logits = path.logits(index, codes.held_MD)
    top1 = float((logits.argmax(1) == codes.held_labels_M).double().mean())
    objective = F.cross_entropy(path.logits(index, codes.train_ND), codes.labels_N)
    objective += strength / 2 * path.weights_LDC[index].square().sum()
    return top1, float(F.cross_entropy(logits, codes.held_labels_M)), float(objective)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num-train", type=int, default=9000)
    parser.add_argument("--width", type=int, default=1280)
    args = parser.parse_args()
    codes = make_codes(args.num_train, 1000, args.width)
    strengths = PROBE_KINDS["logistic"].setting.values(None, args.num_train, 1000)

    ours: list[tuple[float, float]] = []
    theirs: list[list[tuple[float, float]]] = []
    for number in range(args.rounds):
        path, *seconds = timed(lambda: logistic_path(codes.train_ND, codes.labels_N, NUM_CLASSES, strengths))
        ours.append((seconds[0], seconds[1]))
        fits = [
            timed(lambda lam=lam: sklearn_path(codes.train_ND, codes.labels_N, NUM_CLASSES, (lam,)))
            for lam in strengths
        ]
        theirs.append([(wall, cpu) for _, wall, cpu in fits])
        print(
            f"round {number + 1}: tlscale {seconds[0]:.1f} s ({seconds[1]:.1f} CPU s), scikit-learn "
            f"{sum(wall for wall, _ in theirs[-1]):.1f} s ({sum(cpu for _, cpu in theirs[-1]):.1f} CPU s)\n",
            flush=True,
        )
    report(args, codes, strengths, path, [fit for fit, _, _ in fits], ours, theirs)


def report(
    args: argparse.Namespace,
    codes: Codes,
    strengths: tuple[float, ...],
    path: LinearPath,
    fits: list[LinearPath],
    ours: list[tuple[float, float]],
    theirs: list[list[tuple[float, float]]],
) -> None:
    print(
        f"torch {torch.__version__}, scikit-learn {sklearn.__version__}, {torch.get_num_threads()} threads; "
        f"{args.num_train:,} images, {args.width:,} features, {NUM_CLASSES} classes; {args.rounds} rounds\n"
    )
    print(
        "| lam | sklearn wall s | CPU s | top1 tlscale | sklearn | loss tlscale | sklearn | objective tlscale "
        "| sklearn |"
    )
    print("|---" * 9 + "|")
    for index, strength in enumerate(strengths):
        mine, other = (
            figures(path, index, strength, codes),
            figures(fits[index], 0, strength, codes),
        )
        wall, cpu = (statistics.median(rows[index][kind] for rows in theirs) for kind in (0, 1))
        print(
            f"| {strength:g} | {wall:.1f} | {cpu:.1f} | {mine[0]:.4f} | {other[0]:.4f} "
            f"| {mine[1]:.5f} | {other[1]:.5f} "
            f"| {mine[2]:.7f} | {other[2]:.7f} |"
        )
    print("\n| all strengths | tlscale | sklearn | sklearn / tlscale |")
    print("|---" * 4 + "|")
    for kind, name in enumerate(("wall s", "CPU s")):
        mine_s = statistics.median(row[kind] for row in ours)
        other_s = statistics.median(sum(fit[kind] for fit in rows) for rows in theirs)
        print(f"| {name} | {mine_s:.1f} | {other_s:.1f} | {other_s / mine_s:.2f} |")
    converged = "all converged" if all(path.converged) else f"converged: {path.converged}"
    print(f"\ntlscale: {converged}; scikit-learn: {sum(fit.converged[0] for fit in fits)} of {len(fits)} converged")


if __name__ == "__main__":
    main()
