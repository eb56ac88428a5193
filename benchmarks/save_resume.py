"""Measure what a save, a resume and an export cost, here and at an earlier commit, without flushes and with them.

    python benchmarks/save_resume.py [--before bc6152f] [--rounds 9] [--times 12]

Each round starts two processes in turn, one with the earlier commit's code and one with this. A process saves
checkpoints of a ResNet-18 and its momentum (with a line of the log before each, and pruned to one), loads the newest,
and exports the model: first with `os.fsync` doing nothing, then as it is. The figures are medians over the rounds of
the medians of a process, in milliseconds: of wall time, and of processor time, which other work on the machine changes
less. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
KINDS = ("save", "resume", "export")


def times_of(num_times: int, folder: Path) -> dict[str, tuple[float, float]]:
    """Return the median wall and processor time of each kind, in ms."""
    import timm
    import torch

    from tlscale.data.input_spec import InputSpec
    from tlscale.models.classifier import Classifier
    from tlscale.models.export import export_model
    from tlscale.storage.run_folder import RunFolder
    from tlscale.tracking.metrics_log import MetricsFile
    from tlscale.training.checkpoint import files
    from tlscale.training.checkpoint.files import (
        Checkpoint,
        list_checkpoints,
        load_checkpoint,
        load_newest,
        prune,
        save_checkpoint,
    )

    # Commits before 2026-11-28 have a function of its own for this pointer.
    mark_best = getattr(files, "mark_best", None) or (lambda root, step: files.point(root, "BEST", step))
    run = RunFolder(folder / "run")
    run.path.mkdir(parents=True)
    network = Classifier(timm.create_model("resnet18", num_classes=0), torch.nn.Sequential(torch.nn.Linear(512, 10)))
    weights = dict(network.state_dict())
    momentum = {name: torch.zeros_like(param) for name, param in network.named_parameters()}
    metrics = MetricsFile(run.metrics)
    sync: Callable[[], None] = getattr(metrics, "sync", lambda: None)
    line = {"kind": "train", "epoch": 0.0, "images_seen": 0, "time_s": 0.0, "loss": 1.0}

    def save(number: int) -> None:
        metrics.write({**line, "step": number})
        sync()
        save_checkpoint(run.checkpoints, Checkpoint(number, {"model": weights, "optimizer": momentum}, {"clock": {}}))
        mark_best(run.checkpoints, number)
        prune(run.checkpoints, keep=1, keep_steps=[number])

    def resume(number: int) -> None:
        assert load_newest(list_checkpoints(run.checkpoints), load_checkpoint)[0] is not None

    def export(number: int) -> None:
        spec = InputSpec(32, 3, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear", 0.9)
        export_model(network, run.model, classes=[str(name) for name in range(10)], spec=spec)

    found = {}
    for kind, job in zip(KINDS, (save, resume, export), strict=True):
        walls, cpus = [], []
        for number in range(1, num_times + 2):
            began, began_cpu = time.perf_counter(), time.process_time()
            job(number)
            walls.append(1e3 * (time.perf_counter() - began))
            cpus.append(1e3 * (time.process_time() - began_cpu))
        found[kind] = statistics.median(walls[1:]), statistics.median(cpus[1:])  # the first one warms up
    return found


def be_a_child(num_times: int) -> None:
    flush, found = os.fsync, {}
    with tempfile.TemporaryDirectory() as folder:
        os.fsync = lambda descriptor: None
        found["without flushes"] = times_of(num_times, Path(folder) / "without")
        os.fsync = flush
        found["with flushes"] = times_of(num_times, Path(folder) / "with")
    print(json.dumps(found))


def child_of(tree: Path, num_times: int) -> dict[str, dict[str, tuple[float, float]]]:
    command = [sys.executable, __file__, "--child", "--times", str(num_times)]
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=tree, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(before: str, rounds: int, num_times: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "-C", REPO, "archive", before], check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
        found = [(child_of(Path(folder), num_times), child_of(REPO, num_times)) for _ in range(rounds)]
    facts: dict[str, object] = {"benchmark": "save_resume", "before": before, "rounds": rounds, "times": num_times}
    for flushes in ("without flushes", "with flushes"):
        for kind in KINDS:
            for number, clock in enumerate(("wall", "processor")):
                pairs = [tuple(child[flushes][kind][number] for child in both) for both in found]
                old, new = (statistics.median(values) for values in zip(*pairs, strict=True))
                ratio = statistics.median(new_one / old_one for old_one, new_one in pairs)
                facts[f"{kind}, {flushes}, {clock}"] = [round(old, 2), round(new, 2), round(ratio, 4)]
                print(f"{kind:8} {flushes:16} {clock:10} {old:9.2f} ms before, {new:9.2f} now, ratio {ratio:.3f}")
    print(json.dumps(facts), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default="bc6152f")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--times", type=int, default=12)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        be_a_child(args.times)
    else:
        measure(args.before, args.rounds, args.times)


if __name__ == "__main__":
    main()
