"""Probes of many images and classes: seconds, memory and accuracy, beside a linear head trained on the same codes.

    python benchmarks/probe_scale.py [--size small] [--noise 1.0] [--epochs 5] [--kinds head,logistic,ridge]
        [--json FILE]

Sizes: small (10,000 images of 100 classes), middle (38,000 of 1,000) and large (180,000 of 1,000), of 512 features.
Codes are made up: a centre for each class and noise around it, in directions of different size, then the positive part.
A tenth of the images is held out and chooses the strength; 10,000 others test. Each kind runs in a process of its own,
which measures its peak memory, codes included. `head`: one linear layer, AdamW, batches of 256 in a new order each
epoch, a warm-up and a cosine, scored each epoch on the held-out images. `logistic` and the others (`ridge`, `knn`,
`sklearn`): `choose`, as a probe calls it, with the default strengths and the fit again on all images.
CPU seconds are those of the process: on a machine that others use as well, wall time measures them too.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tlscale.codes.probes.select import choose
from tlscale.tracking.console import Console

BATCH, NUM_TEST, WIDTH = 256, 10_000, 512
SIZES = {"small": (10_000, 100), "middle": (38_000, 1000), "large": (180_000, 1000)}  # images to fit, classes


def make_codes(num_images: int, num_classes: int, noise: float) -> tuple[Tensor, Tensor]:
    """Return codes and labels, the test images last; in blocks, so that the peak of memory is not theirs."""
    generator = torch.Generator().manual_seed(0)
    labels_N = torch.randint(num_classes, (num_images,), generator=generator)
    centres_CD = torch.randn(num_classes, WIDTH, generator=generator)
    mix_DD = torch.randn(WIDTH, WIDTH, generator=generator) * torch.logspace(0, -1.5, WIDTH)[:, None]
    codes_ND = torch.empty(num_images, WIDTH)
    for rows in torch.arange(num_images).split(8192):
        spread_BD = noise * torch.randn(len(rows), WIDTH, generator=generator)
        mixed_BD = (centres_CD[labels_N[rows]] + spread_BD) @ mix_DD
        codes_ND[rows] = mixed_BD.relu() + 0.05 * mixed_BD
    return codes_ND, labels_N


def train_head(train: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor], num_classes: int, epochs: int) -> nn.Module:
    codes_ND, labels_N = train
    mean_D, std_D = codes_ND.mean(0), codes_ND.std(0)
    head = nn.Linear(codes_ND.shape[1], num_classes)
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    steps = epochs * math.ceil(len(labels_N) / BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, step / (0.05 * steps)) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    for _ in range(epochs):
        for rows in torch.randperm(len(labels_N)).split(BATCH):
            loss = F.cross_entropy(head((codes_ND[rows] - mean_D) / std_D), labels_N[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        top1(lambda codes_BD: head((codes_BD - mean_D) / std_D), held)
    return nn.Sequential(_Scale(mean_D, std_D), head)


class _Scale(nn.Module):
    def __init__(self, mean_D: Tensor, std_D: Tensor) -> None:
        super().__init__()
        self.mean_D, self.std_D = mean_D, std_D

    def forward(self, codes_BD: Tensor) -> Tensor:
        return (codes_BD - self.mean_D) / self.std_D


@torch.no_grad()
def top1(head: Callable[[Tensor], Tensor], images: tuple[Tensor, Tensor]) -> float:
    right = sum(
        int((head(codes_BD).argmax(1) == labels_B).sum())
        for codes_BD, labels_B in zip(images[0].split(4096), images[1].split(4096), strict=True)
    )
    return right / len(images[1])


def measure(args: argparse.Namespace) -> dict[str, object]:
    """Fit one kind in this process."""
    torch.manual_seed(0)
    num_images, num_classes = SIZES[args.size]
    codes_ND, labels_N = make_codes(num_images + NUM_TEST, num_classes, args.noise)
    num_train = num_images - num_images // 10
    bounds = [(0, num_train), (num_train, num_images), (num_images, len(codes_ND))]
    train, held, test = ((codes_ND[start:stop], labels_N[start:stop]) for start, stop in bounds)
    began, began_cpu = time.perf_counter(), time.process_time()
    facts: dict[str, object] = {}
    if args.kind == "head":
        head = train_head(train, held, num_classes, args.epochs)
    else:
        with Console().shows_progress():
            choice = choose(
                args.kind, [("codes", (train[0], held[0]))], train[1], held[1], num_classes=num_classes, grid=None
            )
        head = choice.probe.head
        facts = {"setting": choice.probe.chosen.setting, "converged": choice.probe.converged}
    wall_s, cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    figures = {"wall_s": round(wall_s, 2), "cpu_s": round(cpu_s, 2), "peak_gib": round(peak_gib, 2)}
    return {"kind": args.kind, **figures, "top1": round(top1(head, test), 4), **facts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--noise", type=float, default=1.0)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--kinds", default="head,logistic,ridge")
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.kind:
        print(json.dumps(measure(args)))
        return
    options = [f"--{name}={getattr(args, name)}" for name in ("size", "noise", "epochs")]
    rows, (num_images, num_classes) = [], SIZES[args.size]
    for kind in args.kinds.split(","):
        command = [sys.executable, os.fspath(Path(__file__)), *options, "--kind", kind]
        ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        *progress, last = ran.stdout.splitlines()
        rows.append(json.loads(last))
        print("\n".join(progress), flush=True)
        print(rows[-1], flush=True)
    print(
        f"\n{args.size}: {num_images:,} images x {WIDTH} features, {num_classes:,} classes, noise {args.noise:g}; "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads\n"
    )
    print("| kind | wall s | CPU s | peak GiB | top1 | setting | converged |\n" + "|---" * 7 + "|")
    for row in rows:
        keys = ("kind", "wall_s", "cpu_s", "peak_gib", "top1", "setting", "converged")
        print("| " + " | ".join(str(row.get(key, "-")) for key in keys) + " |")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
