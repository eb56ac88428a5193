"""A ResNet-18 frozen up to layer3: tlscale, which computes layer3 once, against the plain loop that does it each epoch.

    python benchmarks/partly_frozen.py [--sizes 64,96,160] [--epochs 10] [--train 2000] [--rounds 3]

Real Fashion-MNIST, layer4 and a linear head trained, one evaluation of 256 test images at the end; both start from the
same weights, see the same images in the same order, and should end in the same weights. tlscale's time is all of
`tlscale.run` with an empty $TLSCALE_CACHE: decoding, cutting the network, computing and writing codes, training,
evaluating, exporting. The plain loop's is training and evaluation only; it runs the frozen part in eval mode and
without gradients, on images that were decoded before. Both use the layout in memory in which the plain loop is faster,
tried first at each size. Each round runs one after the other; medians are compared.

The limit is what arithmetic allows: the whole step, the step of the trained part alone, and the frozen part alone are
timed for a batch, in turn and again around each round, and the limit is
    epochs * whole / (frozen + epochs * trained).
The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tlscale
from tlscale.data.decode import decode_image
from tlscale.data.sources.fashion_mnist import read_fashion_mnist
from tlscale.recipe.schema import DataSection, Recipe
from tlscale.training.setup import RunSetup, set_up
from tlscale.training.specs import open_image_cache

LEAST_RATIO, LEAST_SHARE, CLAIMED_PX = 1.7, 0.85, 160
"""The claim at 160 px: times faster than the plain loop, and share of what arithmetic allows."""
NUM_TEST = 256
LAYOUTS = ("contiguous", "channels_last")


class PlainNet(nn.Module):
    """timm's ResNet-18 in its two halves, as one would write them by hand."""

    def __init__(self, setup: RunSetup) -> None:
        super().__init__()
        model = timm.create_model("resnet18", num_classes=len(setup.data.classes))
        initial = setup.classifier.state_dict()
        renamed = {name.removeprefix("backbone.").replace("head.0.", "fc."): t for name, t in initial.items()}
        model.load_state_dict(renamed)
        model.requires_grad_(False)
        for trained in (model.layer4, model.fc):
            trained.requires_grad_(True)
        if setup.recipe.compute.channels_last:
            model.to(memory_format=torch.channels_last)
        self.model = model.eval()
        model.layer4.train()

    @torch.no_grad()
    def frozen(self, inputs_BCHW: Tensor) -> Tensor:
        model = self.model
        codes_BCHW: Tensor = model.maxpool(model.act1(model.bn1(model.conv1(inputs_BCHW))))
        for layer in (model.layer1, model.layer2, model.layer3):
            codes_BCHW = layer(codes_BCHW)
        return codes_BCHW

    def trained(self, codes_BCHW: Tensor) -> Tensor:
        logits_BC: Tensor = self.model.fc(self.model.global_pool(self.model.layer4(codes_BCHW)))
        return logits_BC


class PlainJob:
    """The plain loop: all that it needs, and its step."""

    def __init__(self, recipe: Recipe) -> None:
        # From tlscale only what must be equal: the images, their order, the initial weights.
        setup = set_up(recipe, world_size=1)
        assert setup.data.test is not None
        self.order, self.total_steps, self.recipe = setup.order, setup.total_steps, recipe
        images = open_image_cache(setup)
        self.images, self.labels = _all(images.train()), torch.from_numpy(setup.data.train.labels_N)
        self.test_images = _all(images.of(setup.data.test))
        self.test_labels = torch.from_numpy(setup.data.test.labels_N)
        self.mean, self.std = (255 * torch.tensor([setup.spec.mean, setup.spec.std], dtype=torch.float64)).float()
        self.net = PlainNet(setup)
        trained = [param for param in self.net.parameters() if param.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": recipe.optim.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.optim.lr, fused=True)

    def inputs(self, images_BCHW: Tensor) -> Tensor:
        inputs_BCHW = images_BCHW.float().sub_(self.mean[:, None, None]).div_(self.std[:, None, None])
        if self.recipe.compute.channels_last:
            return inputs_BCHW.contiguous(memory_format=torch.channels_last)
        return inputs_BCHW

    def train_on(self, codes_BCHW: Tensor, labels_B: Tensor, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        F.cross_entropy(self.net.trained(codes_BCHW), labels_B).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def run(self) -> tuple[float, float]:
        """Seconds of training and evaluation, and the test accuracy."""
        warmup = math.ceil(0.05 * self.total_steps)
        began = time.perf_counter()
        for step in range(self.total_steps):
            rows_B = torch.from_numpy(self.order.rows(step))
            share = (step - warmup) / max(self.total_steps - warmup, 1)
            factor = (step + 1) / warmup if step < warmup else (1 + math.cos(math.pi * share)) / 2
            codes_BCHW = self.net.frozen(self.inputs(self.images[rows_B]))
            self.train_on(codes_BCHW, self.labels[rows_B], self.recipe.optim.lr * factor)
        self.net.eval()
        with torch.inference_mode():
            batches = self.test_images.split(self.recipe.batch_size)
            logits_NC = torch.cat([self.net.trained(self.net.frozen(self.inputs(batch))) for batch in batches])
        top1 = float((logits_NC.argmax(1) == self.test_labels).double().mean())
        return time.perf_counter() - began, top1


def _all(store: Any) -> Tensor:
    images: Tensor = store.images(np.arange(len(store)))
    return images


@dataclass
class Parts:
    """Seconds of a batch, each of many."""

    whole: list[float] = field(default_factory=list)
    trained: list[float] = field(default_factory=list)
    frozen: list[float] = field(default_factory=list)

    def medians(self) -> tuple[float, float, float]:
        return statistics.median(self.whole), statistics.median(self.trained), statistics.median(self.frozen)

    def limit(self, epochs: int) -> float:
        """How many times faster it can be, when the frozen part is computed once and all else is free."""
        whole, trained, frozen = self.medians()
        return epochs * whole / (frozen + epochs * trained)


def time_parts(recipe: Recipe, parts: Parts, num_batches: int) -> None:
    """Time a batch's whole step, trained part and frozen part, in turn; on weights that nobody uses afterwards."""
    job = PlainJob(recipe)
    images_BCHW, labels_B = job.images[: recipe.batch_size], job.labels[: recipe.batch_size]
    codes_BCHW = job.net.frozen(job.inputs(images_BCHW))

    def whole() -> None:
        job.train_on(job.net.frozen(job.inputs(images_BCHW)), labels_B, 1e-5)

    def trained() -> None:
        job.train_on(codes_BCHW, labels_B, 1e-5)

    def frozen() -> None:
        job.net.frozen(job.inputs(images_BCHW))

    for number in range(num_batches + 1):  # the first is to warm up
        for seconds, part in ((parts.whole, whole), (parts.trained, trained), (parts.frozen, frozen)):
            took_s = _seconds(part)
            if number:
                seconds.append(took_s)


def faster_layout(recipes: dict[str, Recipe], num_batches: int = 4) -> tuple[str, dict[str, float]]:
    """Return the memory layout in which the plain loop's whole step is faster, and median seconds in each."""
    seconds = {}
    for layout, recipe in recipes.items():
        parts = Parts()
        time_parts(recipe, parts, num_batches)
        seconds[layout] = parts.medians()[0]
    return min(seconds, key=seconds.__getitem__), seconds


def _seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def tlscale_run(recipe: Recipe, folder: Path) -> tuple[float, dict[str, Any], dict[str, Tensor]]:
    """Seconds of the whole run with an empty cache, its result, and the exported weights."""
    os.environ["TLSCALE_CACHE"] = str(folder / "cache")
    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        result = tlscale.run(recipe, folder / "run")
    took_s = time.perf_counter() - began
    return took_s, result, tlscale.load(folder / "run").model.state_dict()


def make_recipe(args: argparse.Namespace, data: Path, image_size: int, *, channels_last: bool) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "partly_frozen",
            "data": {"source": "idx", "path": str(data), "image_size": image_size, "validation_fraction": 0.0},
            "backbone": {"name": "resnet18", "weights": "none"},
            "freeze": r"(conv1|bn1|layer[123])\..*",
            "duration": f"{args.epochs} epochs",
            "batch_size": 64,
            "codes": {"keep": "always"},
            "checkpoint": {"every": f"{args.epochs} epochs"},
            "compute": {"channels_last": channels_last},
        }
    )


def write_idx(folder: Path, num_train: int) -> None:
    """Write the first images of Fashion-MNIST's two splits, so that both sides evaluate few."""
    splits = read_fashion_mnist(DataSection.model_validate({"source": "fashion_mnist"})).splits
    for role, prefix, count in (("train", "train", num_train), ("test", "t10k", NUM_TEST)):
        store, labels = splits[role].store, splits[role].label_ids_N[:count]
        pixels = [decode_image(store.read(row), in_chans=1, max_pixels=784, where="") for row in range(count)]
        _write(folder / f"{prefix}-images-idx3-ubyte", np.stack(pixels)[..., 0])
        _write(folder / f"{prefix}-labels-idx1-ubyte", np.asarray(labels, np.uint8))


def _write(path: Path, numbers: npt.NDArray[np.uint8]) -> None:
    header = bytes((0, 0, 8, numbers.ndim)) + np.asarray(numbers.shape, ">u4").tobytes()
    path.write_bytes(header + np.ascontiguousarray(numbers).tobytes())


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Over all tensors of two state dicts with the same names; 0 where they are bit-equal."""
    assert one.keys() == other.keys(), sorted(one.keys() ^ other.keys())
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def measure(args: argparse.Namespace, image_size: int) -> dict[str, Any]:
    """All rounds at one size."""
    parts, plain_s, tlscale_s, difference = Parts(), [], [], 0.0
    tops: tuple[float, float] = (0.0, 0.0)
    computed: list[int] = []
    breakdown: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as name:
        data = Path(name)
        write_idx(data, args.train)
        recipes = {
            layout: make_recipe(args, data, image_size, channels_last=layout == LAYOUTS[1]) for layout in LAYOUTS
        }
        layout, whole_s = faster_layout(recipes)
        recipe = recipes[layout]
        tried = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in whole_s.items())
        print(f"{image_size} px: a whole step of the plain loop: {tried}", flush=True)
        time_parts(recipe, parts, args.batches)
        for number in range(args.rounds):
            job = PlainJob(recipe)
            took_s, plain_top1 = job.run()
            plain_s.append(took_s)
            with tempfile.TemporaryDirectory() as folder:
                took_s, result, weights = tlscale_run(recipe, Path(folder))
            tlscale_s.append(took_s)
            difference = max(difference, largest_difference(weights, job.net.model.state_dict()))
            tops = plain_top1, result["top1"]
            computed.append(result["codes"]["num_computed"])
            seconds = result["seconds"]  # codes of the test images, computed after the loop, count as before it
            before_s = sum(seconds[part] for part in ("start", "scan", "decode", "codes"))
            breakdown.append((before_s, seconds["train"]))
            time_parts(recipe, parts, args.batches)
            print(f"{image_size} px, round {number + 1}: plain {plain_s[-1]:.1f} s, tlscale {took_s:.1f} s", flush=True)
    whole, trained, frozen = parts.medians()
    ratio, limit = statistics.median(plain_s) / statistics.median(tlscale_s), parts.limit(args.epochs)
    return {
        "image_size": image_size,
        "layout": layout,
        "batch_s": [round(value, 4) for value in (whole, trained, frozen)],
        "plain_s": round(statistics.median(plain_s), 2),
        "tlscale_s": round(statistics.median(tlscale_s), 2),
        "to_loop_s": round(statistics.median(before for before, _ in breakdown), 2),
        "steps_s": round(statistics.median(steps for _, steps in breakdown), 2),
        "times_faster": round(ratio, 3),
        "of_pairs": round(statistics.median(p / t for p, t in zip(plain_s, tlscale_s, strict=True)), 3),
        "limit": round(limit, 3),
        "share_of_limit": round(ratio / limit, 3),
        "largest_weight_difference": difference,
        "top1": tops,
        "num_computed": computed,
    }


def report(rows: list[dict[str, Any]]) -> None:
    """Print the table, and each claim with what was measured."""
    print(
        "\n| px | layout | whole / trained / frozen, s a batch | plain, s | tlscale, s (until the loop + steps) "
        "| times faster | limit | share of the limit | weights differ by | images through the frozen part |\n"
        "|---|---|---|---|---|---|---|---|---|---|"
    )
    for row in rows:
        batch = " / ".join(f"{value:.3f}" for value in row["batch_s"])
        ours = f"{row['tlscale_s']:.1f} ({row['to_loop_s']:.1f} + {row['steps_s']:.1f})"
        speed = f"{row['times_faster']:.2f} | {row['limit']:.2f} | {row['share_of_limit']:.3f}"
        same = f"{row['largest_weight_difference']:g} | {row['num_computed']}"
        print(f"| {row['image_size']} | {row['layout']} | {batch} | {row['plain_s']:.1f} | {ours} | {speed} | {same} |")
    print()
    for row in rows:
        checks = [("bit-equal weights", row["largest_weight_difference"], row["largest_weight_difference"] == 0)]
        if row["image_size"] == CLAIMED_PX:
            checks.append(
                (f"at least {LEAST_RATIO} times faster", row["times_faster"], row["times_faster"] >= LEAST_RATIO)
            )
        checks.append(
            (f"at least {LEAST_SHARE} of the limit", row["share_of_limit"], row["share_of_limit"] >= LEAST_SHARE)
        )
        for text, value, holds in checks:
            print(f"{'met' if holds else 'NOT MET'}: {row['image_size']} px: {text}: {value:g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="64,96,160", help="in pixels")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--train", type=int, default=2000, help="training images")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=8, help="batches of each kind that are timed around each round")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, timm {timm.__version__}, {torch.get_num_threads()} threads", flush=True)
    rows = [measure(args, int(size)) for size in args.sizes.split(",")]
    report(rows)
    print(json.dumps({"benchmark": "partly_frozen", "epochs": args.epochs, "train": args.train, "sizes": rows}))


if __name__ == "__main__":
    main()
