"""tlscale's loop against a plain PyTorch loop: the same images in the same order, the same weights at the end.

    python benchmarks/loop_overhead.py [--rounds 5] [--steps 60]

Each round trains both, one after the other, from the same initial weights; the ratio of the medians of their
images per second is the overhead. A run's speed is that of training alone (waiting for data included, evaluation
and checkpoints not), as in its `metrics.jsonl`. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import statistics
import tempfile
import time
from pathlib import Path

import timm
import torch
import torch.nn.functional as F

import tlscale
from tlscale.data.sampler import DataOrder
from tlscale.models.export import load
from tlscale.recipe.schema import Recipe
from tlscale.training.setup import set_up
from tlscale.training.specs import open_image_cache


def plain_loop(recipe: Recipe) -> tuple[dict[str, torch.Tensor], float]:
    """Train this recipe as a practitioner would without tlscale; return (final weights, images per second)."""
    # From tlscale only what must be equal: the images, their order, the initial weights.
    setup = set_up(recipe, world_size=1)
    images = open_image_cache(setup).train().images(torch.arange(len(setup.data.train)).numpy())
    labels = torch.from_numpy(setup.data.train.labels_N)
    order = DataOrder(len(labels), recipe.batch_size, recipe.seed, recipe.drop_last)
    initial = setup.classifier.state_dict()
    model = timm.create_model(recipe.backbone.name, num_classes=10, in_chans=1)
    classifier = model.pretrained_cfg["classifier"]
    renamed = {name.removeprefix("backbone.").replace("head.0.", f"{classifier}."): t for name, t in initial.items()}
    model.load_state_dict(renamed)
    # The plain loop.
    model.train()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.optim.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=recipe.optim.lr,
        fused=True,
    )
    total = setup.total_steps
    warmup = math.ceil(0.05 * total)
    mean, std = (255 * torch.tensor([setup.spec.mean, setup.spec.std], dtype=torch.float64)).float()
    began = time.perf_counter()
    num_images = 0
    for step in range(total):
        rows = torch.from_numpy(order.rows(step))
        inputs = images[rows].float().sub_(mean[:, None, None]).div_(std[:, None, None])
        share = (step - warmup) / max(total - warmup, 1)
        factor = (step + 1) / warmup if step < warmup else (1 + math.cos(math.pi * share)) / 2
        for group in optimizer.param_groups:
            group["lr"] = recipe.optim.lr * factor
        loss = F.cross_entropy(model(inputs), labels[rows])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        num_images += len(rows)
        if (step + 1) % 10 == 0:
            assert math.isfinite(loss.item())
    return model.state_dict(), num_images / (time.perf_counter() - began)


def tlscale_loop(recipe: Recipe, out: Path) -> tuple[dict[str, torch.Tensor], float]:
    """Train the same by tlscale; return (exported weights, images per second)."""
    with contextlib.redirect_stdout(io.StringIO()):
        result = tlscale.run(recipe, out)
    return load(out).model.state_dict(), result["images_per_s"]


def make_recipe(*, backbone: str, steps: int, batch_size: int, image_size: int = 28, train_limit: int = 6000) -> Recipe:
    """Return plain training on real images (those that ship, where Fashion-MNIST is not available)."""
    return Recipe.model_validate(
        {
            "name": "overhead",
            "data": {
                "source": "fashion_mnist",
                "fallback": "sample",
                "train_limit": train_limit,
                "image_size": image_size,
                "validation_fraction": 0.0,
            },
            "backbone": {"name": backbone, "weights": "none", "in_chans": 1},
            "duration": f"{steps} steps",
            "batch_size": batch_size,
            "checkpoint": {"every": f"{steps} steps"},
        }
    )


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Return that of all tensors of two state dicts with the same names; 0 where they are bit-equal."""
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--backbone", default="resnet18")
    args = parser.parse_args()
    recipe = make_recipe(backbone=args.backbone, steps=args.steps, batch_size=128)
    speeds: dict[str, list[float]] = {"plain": [], "tlscale": []}
    difference = 0.0
    for number in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            plain_weights, plain_speed = plain_loop(recipe)
            weights, speed = tlscale_loop(recipe, Path(folder) / "run")
        difference = max(difference, largest_difference(plain_weights, weights))
        speeds["plain"].append(plain_speed)
        speeds["tlscale"].append(speed)
        print(f"round {number + 1}: plain {plain_speed:.1f} images/s, tlscale {speed:.1f} images/s", flush=True)
    ratio = statistics.median(speeds["plain"]) / statistics.median(speeds["tlscale"])
    pairs = [one / other for one, other in zip(speeds["plain"], speeds["tlscale"], strict=True)]
    print(
        json.dumps(
            {
                "benchmark": "loop_overhead",
                "backbone": args.backbone,
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "median_plain_images_per_s": round(statistics.median(speeds["plain"]), 1),
                "median_tlscale_images_per_s": round(statistics.median(speeds["tlscale"]), 1),
                "overhead_of_medians": round(ratio - 1, 4),
                "median_overhead_of_pairs": round(statistics.median(pairs) - 1, 4),
                "largest_weight_difference": difference,
            }
        )
    )


if __name__ == "__main__":
    main()
