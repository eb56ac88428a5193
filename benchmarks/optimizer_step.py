"""What torch's fused optimizer step saves over the default one, as a share of a whole training step.

    python benchmarks/optimizer_step.py [--rounds 7] [--backbone resnet18] [--batch-size 128]

Each round times a forward and backward pass, a default update and a fused update of the same network, one after the
other. The last line is JSON, with ratios of medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--batch-size", type=int, default=128)
    args = parser.parse_args()
    model = timm.create_model(args.backbone, num_classes=10, in_chans=1).train()
    images, labels = torch.randn(args.batch_size, 1, 28, 28), torch.zeros(args.batch_size, dtype=torch.long)
    default = torch.optim.AdamW(model.parameters(), lr=1e-9)
    fused = torch.optim.AdamW(model.parameters(), lr=1e-9, fused=True)

    def pass_through() -> None:
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()

    times: dict[str, list[float]] = {"pass": [], "default": [], "fused": []}
    for number in range(args.rounds + 2):
        row = {"pass": seconds(pass_through), "default": seconds(default.step), "fused": seconds(fused.step)}
        if number >= 2:  # the first make their buffers
            for name, value in row.items():
                times[name].append(value)
    median = {name: statistics.median(values) for name, values in times.items()}
    print(
        json.dumps(
            {
                "benchmark": "optimizer_step",
                "backbone": args.backbone,
                "batch_size": args.batch_size,
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "default_over_fused_update": round(median["default"] / median["fused"], 2),
                "default_over_fused_whole_step": round(
                    (median["pass"] + median["default"]) / (median["pass"] + median["fused"]), 3
                ),
            }
        )
    )


if __name__ == "__main__":
    main()
