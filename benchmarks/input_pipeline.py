"""Measure how fast a run reads JPEG photos with 1, 2 and 4 workers, against another checkout, and what a worker holds.

    git worktree add /tmp/before 6d27496
    python benchmarks/input_pipeline.py --before /tmp/before [--workers 1 2 4] [--rounds 3] [--steps 30]

Photos of 500 x 375, cropped at random and flipped, go through a network so small that reading them is most of a step.
Each run is a process of its own; the two checkouts take turns, and which comes first changes from round to round.
Printed are medians over the rounds of the median images/s of a run's log lines (all but the first two), and the memory
of a worker: of the largest one, the median over the run of its proportional set size (PSS: what is shared with others
counts by its share), in MiB.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # the other files of this folder

from content_hashing import make_photos

HERE = Path(__file__).resolve().parents[1]
BATCH_SIZE, STEPS_A_LINE = 32, 3
RECIPE = """
name: reading
data: {{source: folder, path: {path}, image_size: 64, augment: [crop, flip], cache_mib: 0, validation_fraction: 0.05}}
backbone: {{name: test_resnet, weights: none}}
batch_size: {batch_size}
duration: {steps} steps
log_every: {line} steps
checkpoint: {{every: {steps} steps}}
evaluate: {{every: {steps} steps}}
optim: {{lr: 1e-3}}
"""


def measure(tree: Path, recipe: Path, workers: int) -> tuple[float, float]:
    """Run `tree` on the recipe; return images per second, and the PSS of the largest worker in MiB."""
    env = {**os.environ, "PYTHONPATH": f"{tree}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        arguments = ["run", str(recipe), "--out", str(out), f"data.workers={workers}"]
        command = [sys.executable, "-m", "tlscale", *arguments]
        run = subprocess.Popen(command, env=env, cwd=tree, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        seen_mib = []
        while run.poll() is None:
            time.sleep(0.25)
            seen_mib += [max(map(pss_mib, there))] if len(there := children(run.pid)) >= workers else []
        assert run.stderr is not None
        if run.returncode != 0:
            raise SystemExit(f"{tree}: {run.stderr.read().decode()[-2000:]}")
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    speeds = [line["images_per_s"] for line in lines if line["kind"] == "train"]
    return statistics.median(speeds[2:]), statistics.median(seen_mib)


def children(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    with contextlib.suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def pss_mib(pid: int) -> float:
    """Return the proportional set size of a process; 0 of one that has ended."""
    with contextlib.suppress(OSError, IndexError):
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        return int(text.split("\nPss:")[1].split()[0]) / 1024
    return 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--photos", type=int, default=400)
    args = parser.parse_args()
    trees = {"before": args.before.resolve(), "after": HERE}
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        make_photos(Path(folder) / "photos", args.photos)
        recipe = Path(folder) / "r.yaml"
        values = {"path": Path(folder) / "photos", "batch_size": BATCH_SIZE, "steps": args.steps, "line": STEPS_A_LINE}
        recipe.write_text(RECIPE.format(**values))
        for number in range(args.rounds):
            for workers in args.workers:
                for name in list(trees)[:: 1 if number % 2 == 0 else -1]:
                    found.setdefault((name, workers), []).append(measure(trees[name], recipe, workers))
    print("| workers | before, images/s | after, images/s | ratio | MiB of a worker, before | after |")
    print("|---|---|---|---|---|---|")
    for workers in args.workers:
        speeds = {name: [speed for speed, _ in found[name, workers]] for name in trees}
        ratio = statistics.median(new / old for old, new in zip(speeds["before"], speeds["after"], strict=True))
        cells = [f"{statistics.median(speeds[name]):.0f}" for name in trees]
        sizes = [f"{statistics.median(mib for _, mib in found[name, workers]):.0f}" for name in trees]
        print(f"| {workers} | {' | '.join(cells)} | {ratio:.3f} | {' | '.join(sizes)} |")


if __name__ == "__main__":
    main()
