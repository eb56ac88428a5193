"""Many epochs over a frozen ResNet-18: tlscale, which computes what is frozen once, against three that do it each time.

    python benchmarks/frozen_epochs.py [--epochs 20] [--peer-epochs 3] [--train 10000] [--rounds 3]

Real Fashion-MNIST at 64 px, all frozen but a linear head, the same initial weights (random, by seed), optimizer and
learning rates for all, the same layout in memory (the faster one for the plain loop, tried first), torch's own number
of threads. tlscale's time is all of `tlscale.run` with an empty $TLSCALE_CACHE: reading, decoding and resizing the
images, building the network, finding what is frozen, computing and writing codes, training, evaluating, exporting. The
peers' time is training and one evaluation; their images were decoded and resized before. One forward pass of the
backbone over all images, training and test, is the floor. Rounds of the floor and of tlscale lie before, between and
behind the peers; medians are compared. The last line is JSON.

Two figures are compared, because the one evaluation costs everybody the same forward pass over the test images: the
whole job, evaluation included; and the epochs alone, for which tlscale's first run is charged with all but as many
seconds as a bare forward pass over the test images takes: their codes are computed together with the others'.

fastai and Lightning live in an environment of their own, on top of tlscale's packages; a peer that is not installed is
skipped, and the output reports it:

    python -m venv /tmp/peers && /tmp/peers/bin/pip uninstall -y setuptools
    python -c 'import site; print(*site.getsitepackages(), sep="\\n")' > beside.pth     # the python that has tlscale
    echo "$PWD" >> beside.pth && mv beside.pth /tmp/peers/lib/python3.*/site-packages/
    /tmp/peers/bin/pip install -c constraints.txt -r benchmarks/requirements-peers.txt
    /tmp/peers/bin/python benchmarks/frozen_epochs.py
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import BY_HAND, PEERS, Measured, Task, forward_s, missing

import tlscale
from tlscale.recipe.schema import Recipe
from tlscale.training.setup import set_up
from tlscale.training.specs import open_image_cache

MOST_PASSES, MOST_EXTRA_S, LEAST_RATIO, MOST_POINTS, MOST_AGAIN = 1.3, 10.0, 12.0, 0.3, 0.2
"""The claims: forward passes and seconds besides, times less than each peer, points of accuracy, share of a hit."""


@dataclass(frozen=True)
class Round:
    """One forward pass, tlscale from nothing, and tlscale again in another folder."""

    floor_s: float
    floor_train_s: float
    first_s: float
    again_s: float
    first: dict[str, Any]
    again: dict[str, Any]
    to_loop_s: float
    loop_s: float

    @property
    def rest_s(self) -> float:
        """After the last step: evaluation and export."""
        return self.first_s - self.to_loop_s - self.loop_s

    @property
    def without_test_pass_s(self) -> float:
        """The first run, but for a bare forward pass over the test images; everything else of it counts."""
        return self.first_s - (self.floor_s - self.floor_train_s)


def make_recipe(args: argparse.Namespace, *, channels_last: bool) -> Recipe:
    """All frozen but a linear head; nothing that the peers do not do: no validation, one checkpoint at the end."""
    return Recipe.model_validate(
        {
            "name": "frozen_epochs",
            "data": {
                "source": "fashion_mnist",
                "train_limit": args.train,
                "image_size": args.image_size,
                "validation_fraction": 0.0,
            },
            "backbone": {"name": "resnet18", "weights": "none"},
            "freeze": ".*",
            "duration": f"{args.epochs} epochs",
            "batch_size": 64,
            "optim": {"name": "adamw", "lr": args.lr, "weight_decay": 0.0},
            "schedule": {"warmup": "0 steps", "decay": "cosine"},
            "checkpoint": {"every": f"{args.epochs} epochs"},
            "compute": {"channels_last": channels_last},
        }
    )


def make_task(recipe: Recipe, epochs: int) -> Task:
    """Build the same job for the peers: tlscale's images, initial weights and normalisation."""
    setup = set_up(recipe, world_size=1)
    assert setup.data.test is not None
    images = open_image_cache(setup).train().images(np.arange(len(setup.data.train)))
    test_images = open_image_cache(setup).of(setup.data.test).images(np.arange(len(setup.data.test)))
    assert isinstance(images, torch.Tensor)
    assert isinstance(test_images, torch.Tensor)
    return Task(
        backbone=setup.classifier.backbone,
        head=setup.classifier.head,
        images_NCHW=images,
        labels_N=torch.from_numpy(setup.data.train.labels_N),
        test_images_NCHW=test_images,
        test_labels_N=torch.from_numpy(setup.data.test.labels_N),
        mean=setup.spec.mean,
        std=setup.spec.std,
        epochs=epochs,
        batch_size=recipe.batch_size,
        lr=recipe.optim.lr,
        weight_decay=recipe.optim.weight_decay,
        seed=recipe.seed,
        channels_last=recipe.compute.channels_last,
    )


def faster_layout(task: Task, num_batches: int = 8) -> tuple[bool, dict[str, float]]:
    """Whether channels-last is the faster layout for the frozen backbone, and images per second in each."""
    batch_BCHW = task.images_NCHW[: task.batch_size]
    layouts = {name: dataclasses.replace(task, channels_last=name == "channels_last") for name in LAYOUTS}
    backbones = {name: of_layout.networks()[0] for name, of_layout in layouts.items()}
    seconds: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    with torch.no_grad():
        for _ in range(num_batches + 2):  # two to warm up
            for name, of_layout in layouts.items():
                began = time.perf_counter()
                backbones[name](of_layout.inputs(batch_BCHW))
                seconds[name].append(time.perf_counter() - began)
    speeds = {name: len(batch_BCHW) / statistics.median(taken[2:]) for name, taken in seconds.items()}
    return speeds["channels_last"] > speeds["contiguous"], speeds


LAYOUTS = ("contiguous", "channels_last")


@contextlib.contextmanager
def empty_cache() -> Iterator[Path]:
    """Provide a folder for runs, and an empty `$TLSCALE_CACHE`."""
    before = os.environ.get("TLSCALE_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TLSCALE_CACHE"] = f"{folder}/cache"
        try:
            yield Path(folder)
        finally:
            os.environ.pop("TLSCALE_CACHE")
            if before is not None:
                os.environ["TLSCALE_CACHE"] = before


def measure_round(recipe: Recipe, task: Task) -> Round:
    """Time the floor, tlscale with an empty cache, and tlscale again."""
    floor_train_s, floor_test_s = forward_s(task)
    with empty_cache() as folder:
        first, first_s = tlscale_run(recipe, folder / "first")
        again, again_s = tlscale_run(recipe, folder / "again")
        last_s = last_step_s(folder / "first")
    loop_s = first["seconds"]["train"] + first["seconds"]["evaluate"]
    floors = floor_train_s + floor_test_s, floor_train_s
    return Round(*floors, first_s, again_s, first, again, last_s - loop_s, loop_s)


def last_step_s(run: Path) -> float:
    """Seconds from the begin of the run to its last step."""
    seconds: float = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["time_s"]
    return seconds


def tlscale_run(recipe: Recipe, out: Path) -> tuple[dict[str, Any], float]:
    """Return the result, and the seconds of the call."""
    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        result = tlscale.run(recipe, out)
    return result, time.perf_counter() - began


def peer_row(peer: Measured, args: argparse.Namespace, tlscale_s: dict[str, float]) -> str:
    """Format a line of the table: seconds of epochs and evaluation, and how many times tlscale's that is."""
    train_s, num_run = peer.train_s(args.epochs), len(peer.epochs_s)
    is_whole = num_run == args.epochs
    how = "" if is_whole else f" (EXTRAPOLATED from {num_run} epochs)"
    top1 = f"{100 * peer.top1:.2f}" if is_whole else f"not compared ({num_run} epochs)"
    both_s = train_s + peer.evaluation_s
    return (
        f"| {peer.name} | {statistics.median(peer.epochs_s):.2f} | {train_s:.1f}{how} | {peer.evaluation_s:.1f} | "
        f"{both_s:.1f} | {train_s / tlscale_s['epochs']:.1f} | {both_s / tlscale_s['whole']:.1f} | {top1} |"
    )


def report(args: argparse.Namespace, task: Task, rounds: list[Round], peers: list[Measured]) -> dict[str, Any]:
    """Print the tables, and give the figures of the last line."""

    def median(name: str) -> float:
        return statistics.median(getattr(one, name) for one in rounds)

    floor_s, floor_train_s, first = median("floor_s"), median("floor_train_s"), rounds[0].first
    tlscale_s = {"whole": median("first_s"), "epochs": median("without_test_pass_s"), "again": median("again_s")}
    num_images = len(task.labels_N) + len(task.test_labels_N)
    print(
        f"\n{args.epochs} epochs, {len(task.labels_N):,} + {len(task.test_labels_N):,} images, {args.image_size} px\n"
    )
    print("| | an epoch, s | all epochs, s | evaluation, s | both, s | epochs / tlscale | both / tlscale | top1, % |")
    print("|---|---|---|---|---|---|---|---|")
    whole = f"{tlscale_s['epochs']:.1f} (all but the test images' pass) | | {tlscale_s['whole']:.1f} | 1 | 1"
    print(f"| tlscale | | {whole} | {100 * first['top1']:.2f} |")
    print(f"| tlscale, the same again | | | | {tlscale_s['again']:.1f} | | | {100 * rounds[0].again['top1']:.2f} |")
    for peer in peers:
        print(peer_row(peer, args, tlscale_s))
    floors = f"{floor_train_s:.1f} | {floor_s - floor_train_s:.1f} | {floor_s:.1f}"
    print(f"| one forward pass, {num_images / floor_s:.0f} images/s | | {floors} | | | |")
    print(
        f"\ntlscale's seconds, medians: {median('to_loop_s'):.2f} until the loop (data, network, codes of all images), "
        f"{median('loop_s'):.2f} in its steps, {median('rest_s'):.2f} after it (evaluation, export)"
    )
    for number, one in enumerate(rounds, 1):
        print(f"round {number}: pass {one.floor_s:.2f}, first {one.first_s:.2f}, again {one.again_s:.2f}")
    return {
        "benchmark": "frozen_epochs",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "channels_last": task.channels_last,
        "epochs": args.epochs,
        "peer_epochs": task.epochs,
        "pass_s": round(floor_s, 2),
        "pass_train_s": round(floor_train_s, 2),
        "tlscale_s": {name: round(seconds, 2) for name, seconds in tlscale_s.items()},
        "num_computed": [one.first["codes"]["num_computed"] for one in rounds],
        "num_computed_again": [one.again["codes"]["num_computed"] for one in rounds],
        "epochs_ratio": {p.name: round(p.train_s(args.epochs) / tlscale_s["epochs"], 2) for p in peers},
        "whole_ratio": {
            p.name: round((p.train_s(args.epochs) + p.evaluation_s) / tlscale_s["whole"], 2) for p in peers
        },
        "points_apart": {
            p.name: round(100 * (p.top1 - first["top1"]), 2) for p in peers if len(p.epochs_s) == args.epochs
        },
    }


def verdicts(figures: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """Yield each claim with what was measured, and whether it holds."""
    tlscale_s = figures["tlscale_s"]
    for what, pass_s, took_s in (
        ("whole job", figures["pass_s"], tlscale_s["whole"]),
        ("epochs alone", figures["pass_train_s"], tlscale_s["epochs"]),
    ):
        most_s = MOST_PASSES * pass_s + MOST_EXTRA_S
        claim = f"{what}: at most {MOST_PASSES} forward passes + {MOST_EXTRA_S:.0f} s"
        yield f"{claim}: {took_s} s, allowed {most_s:.2f} s", took_s <= most_s
    for what, key in (("whole job", "whole_ratio"), ("epochs alone", "epochs_ratio")):
        for name, times in figures[key].items():
            if name != BY_HAND:
                yield f"{what}: at least {LEAST_RATIO:.0f} times less than {name}: {times}", times >= LEAST_RATIO
    for name, apart in figures["points_apart"].items():
        yield f"accuracy within {MOST_POINTS} points of {name}: {apart:+.2f}", abs(apart) <= MOST_POINTS
    computed = figures["num_computed_again"]
    yield f"again: no image through the backbone: {computed}", not any(computed)
    share = tlscale_s["again"] / tlscale_s["whole"]
    yield f"again: at most {MOST_AGAIN} of the first time: {share:.3f}", share <= MOST_AGAIN


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--peer-epochs", type=int, help="default: all; fewer are extrapolated, and the table says so")
    parser.add_argument("--peers", default=",".join(PEERS), help=f"which of {', '.join(PEERS)}")
    parser.add_argument("--rounds", type=int, default=3, help="of tlscale and of the forward pass, at least 1")
    parser.add_argument("--train", type=int, default=10_000)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-2)
    args = parser.parse_args()
    recipe = make_recipe(args, channels_last=False)
    task = make_task(recipe, args.peer_epochs or args.epochs)
    channels_last, speeds = faster_layout(task)
    print("frozen forward pass, images/s:", ", ".join(f"{name} {speed:.0f}" for name, speed in speeds.items()))
    recipe = make_recipe(args, channels_last=channels_last)
    task = dataclasses.replace(task, channels_last=channels_last)
    packages = ("torch", "timm", "accelerate", *(p for name in PEERS if (p := PEERS[name][0]) and not missing(name)))
    print("versions:", ", ".join(f"{name} {version(name)}" for name in packages), flush=True)

    rounds, peers = [measure_round(recipe, task)], []
    wanted = [name.strip() for name in args.peers.split(",") if name.strip()]
    for name in wanted:
        if package := missing(name):
            print(f"LEFT OUT: {name}: the package '{package}' is not installed; --help says how", flush=True)
            continue
        peers.append(PEERS[name][1](task))
        print(f"measured {peers[-1].name}", flush=True)
        if len(rounds) < args.rounds - 1 and name != "features":
            rounds.append(measure_round(recipe, task))
    while len(rounds) < args.rounds:
        rounds.append(measure_round(recipe, task))
    figures = report(args, task, rounds, peers)
    print()
    for text, holds in verdicts(figures):
        print(f"{'met' if holds else 'NOT MET'}: {text}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
