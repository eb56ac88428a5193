"""What the order of images costs at any size: time a batch and memory, compared with torch's `randperm`.

    python benchmarks/sampler_scale.py [--rounds 5]

Every measurement runs in a process of its own, with one thread, which reports its CPU seconds (a busy machine
distorts them less than wall seconds) and how far the peak of its memory rose. A table of medians, and at the end the
same as one line of JSON.

`batch`: the images of one batch of 4,096 somewhere in an epoch. `epoch`: all batches of an epoch, one after the other,
by one process that keeps none of them. `randperm`: torch's order of the same images, which is what a PyTorch sampler
makes at the beginning of each epoch, in each process. `ranks`: an epoch of a million images on 1,024 simulated
processes, every image counted.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

import numpy as np

from tlscale.data.sampler import DataOrder, micro_batches, permute, split_batch_size

BATCH = 4096
MILLION = 10**6
PLANS = [
    *(("batch", size) for size in (MILLION, 20 * MILLION, 1000 * MILLION)),
    *((what, size) for size in (MILLION, 20 * MILLION) for what in ("epoch", "randperm")),
    ("ranks", MILLION),
]


def batch(num_images: int) -> float:
    """CPU seconds for one batch, the median of many."""
    seconds = []
    for number in range(101):
        positions = (number * 7919 * BATCH) % (num_images - BATCH) + np.arange(BATCH)
        began = time.process_time()
        permute(positions, num_images=num_images, seed=1, epoch=number)
        seconds.append(time.process_time() - began)
    return statistics.median(seconds)


def epoch(num_images: int) -> float:
    """CPU seconds for all batches of an epoch."""
    order = DataOrder(num_images, BATCH, seed=1, drop_last=False)
    began = time.process_time()
    count = sum(len(order.rows(step)) for step in range(order.steps_per_epoch))
    seconds = time.process_time() - began
    assert count == num_images
    return seconds


def randperm(num_images: int) -> float:
    """CPU seconds for torch's order of an epoch."""
    import torch

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    _start_of_memory()
    began = time.process_time()
    torch.randperm(num_images, generator=generator)
    return time.process_time() - began


def ranks(num_images: int, world_size: int = 1024) -> float:
    """CPU seconds for an epoch of all simulated processes together; each image exactly once, or it fails."""
    order = DataOrder(num_images, 8192, seed=1, drop_last=False)
    split = split_batch_size(8192, world_size, 4)
    seen_N = np.zeros(num_images, np.uint8)
    seconds = 0.0
    for step in range(order.steps_per_epoch):
        began = time.process_time()
        parts = [part for rank in range(world_size) for part in micro_batches(order, step, split, rank)]
        seconds += time.process_time() - began
        np.add.at(seen_N, np.concatenate([part.rows_B[: part.num_real] for part in parts]), 1)
    assert (seen_N == 1).all(), "an image was seen twice, or never"
    return seconds


_memory_kib = 0


def _start_of_memory() -> None:
    global _memory_kib
    _memory_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(what: str, num_images: int) -> None:
    """In this process; prints seconds, and by how many MiB the peak of its memory rose."""
    permute(np.arange(BATCH), num_images=BATCH, seed=0, epoch=0)  # NumPy's own buffers do not count
    _start_of_memory()
    seconds = {"batch": batch, "epoch": epoch, "randperm": randperm, "ranks": ranks}[what](num_images)
    risen_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - _memory_kib
    print(json.dumps({"seconds": seconds, "mib": risen_kib / 1024}))


def measured(what: str, num_images: int, rounds: int) -> dict[str, float]:
    """Medians over processes of their own, and the spread of the seconds."""
    rows = []
    for _ in range(rounds):
        command = [sys.executable, __file__, "--measure", what, str(num_images)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        rows.append(json.loads(done.stdout))
    seconds = [row["seconds"] for row in rows]
    return {
        "seconds": statistics.median(seconds),
        "least_s": min(seconds),
        "most_s": max(seconds),
        "mib": statistics.median(row["mib"] for row in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", nargs=2, metavar=("WHAT", "IMAGES"), help="in this process, for the script itself")
    args = parser.parse_args()
    if args.measure:
        return measure(args.measure[0], int(args.measure[1]))
    print(f"load average at the beginning: {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores")
    print("| what | images | CPU s, median | least | most | memory, MiB |\n|---|---|---|---|---|---|")
    found = {}
    for what, num_images in PLANS:
        row = found[f"{what} {num_images}"] = measured(what, num_images, args.rounds)
        times = " | ".join(f"{row[key]:.5f}" for key in ("seconds", "least_s", "most_s"))
        print(f"| {what} | {num_images:,} | {times} | {row['mib']:.1f} |", flush=True)
    print(f"load average at the end: {os.getloadavg()[0]:.1f}")
    print(json.dumps({"benchmark": "sampler_scale", "numpy": np.__version__, "rounds": args.rounds, **found}))
    return None


if __name__ == "__main__":
    main()
