"""Measure tlscale on a GPU: speed against timm's loop and against the bare model, memory, and how busy the GPU is.

    python benchmarks/gpu.py OUT [--seconds 240] [--toy]

Each case is written to OUT/benchmarks.jsonl as soon as it is measured, and OUT/report.md anew after each. A second call
measures what is missing; a case that twice ended its process is passed over. `--toy`: small networks and pictures, for
a machine without a GPU; its figures mean nothing. scripts/gpu_kit.sh calls it.

Precision is bf16, weights are random, the optimizer is AdamW. A speed is the median over stretches of ten steps, the
first ones left out. `bare`: the same network on one batch that lies on the GPU, again and again: the limit.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # the other files of this folder

import numpy as np
import torch
from gpu_loops import Job, bare, forward_pass, peak_mib, profiled_steps, reset_peak, timm_loop
from photos import PICTURES, make_photos
from PIL import Image

import tlscale
from tlscale.recipe.schema import Recipe
from tlscale.tracking.metrics_log import read_metrics

FROM_MEMORY, FROM_PHOTOS, LEAST_BUSY, MOST_PASSES, LEAST_SAVED = 0.95, 0.9, 0.95, 1.2, 0.4
"""The goals: shares of the bare model's speed; of the time that kernels run; forward passes; share of activations."""


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    resnet: str
    vit: str
    image_size: int
    batch_size: int
    num_photos: int
    steps: int
    epochs: int
    workers: int


REAL = Size("resnet50", "vit_base_patch16_224", 224, 256, 4000, 60, 20, 16)
TOY = Size("resnet10t", "vit_tiny_patch16_224", 32, 8, 48, 12, 2, 1)


class Bench:
    """The cases, in order of value."""

    def __init__(self, size: Size, work: Path) -> None:
        self.size, self.work = size, work
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.backends.cudnn.benchmark = True  # as timm's script does, and a run of tlscale
        self.photos = make_photos(work / "photos", size.num_photos)
        self._limits: dict[str, dict[str, Any]] = {}
        self.cases: dict[str, Callable[[], dict[str, Any]]] = {
            "resnet, all trained, images in memory": lambda: self._training(size.resnet, in_memory=True),
            "resnet, all trained, photos": lambda: self._training(size.resnet, in_memory=False),
            "resnet, all frozen": lambda: self._frozen(".*"),
            "resnet, frozen to layer3": lambda: self._frozen(r"(conv1|bn1|layer[123])\..*"),
            "vit, all trained, images in memory": lambda: self._training(size.vit, in_memory=True),
            "resnet, gradient checkpointing": lambda: self._checkpointing(size.resnet),
            "vit, gradient checkpointing": lambda: self._checkpointing(size.vit),
            "vit, all trained, photos": lambda: self._training(size.vit, in_memory=False),
            "resnet, compiled": self._compiled,
        }

    def job(self, backbone: str) -> Job:
        """Describe what the loops train."""
        size = self.size
        return Job(backbone, size.image_size, size.batch_size, len(PICTURES), self.device, "vit" not in backbone)

    def _training(self, backbone: str, *, in_memory: bool) -> dict[str, Any]:
        job, size = self.job(backbone), self.size
        if backbone not in self._limits:
            self._limits[backbone] = bare(job, size.steps)
        limit = self._limits[backbone]
        source = self._decoded if in_memory else self.photos
        timms = timm_loop(job, source, size.steps, augment=not in_memory, workers=size.workers)
        augment = [] if in_memory else ["crop", "flip"]
        ours = self._tlscale(backbone, data={"augment": augment, "cache_mib": 4096 if in_memory else 0})
        goal = FROM_MEMORY if in_memory else FROM_PHOTOS
        share = ours["images_per_s"] / limit["images_per_s"]
        return {
            "bare": limit,
            "timm_style": timms,
            "tlscale": ours,
            "share_of_bare": round(share, 4),
            "against_timm_style": round(ours["images_per_s"] / timms["images_per_s"], 4),
            "reached": share >= goal
            and ours["images_per_s"] >= timms["images_per_s"]
            and (ours["gpu_busy"] or 0) >= LEAST_BUSY,
        }

    def _tlscale(self, backbone: str, *, profile: bool = True, **changes: Any) -> dict[str, Any]:
        """Run tlscale; return speed, memory and, where it is profiled, how busy the GPU was."""
        # As many as the other loops make; those that are profiled, which slows them down, come after them.
        steps, count = self.size.steps, min(30, self.size.steps // 2) if profile else 0
        every = {"every": f"{steps + count} steps"}
        plain = {"duration": f"{steps + count} steps", "checkpoint": every, "evaluate": every, **changes}
        reset_peak(self.device)
        watch = profiled_steps(self.device, steps, count) if profile else contextlib.nullcontext({})
        with watch as found:
            lines = self._run(backbone, plain)[1]
        fair = [speed for step, speed in lines if min(10, steps // 2) < step <= steps]
        return {"images_per_s": round(statistics.median(fair), 1), "peak_mib": peak_mib(self.device)} | found

    def _run(self, backbone: str, changes: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[int, float]]]:
        size = self.size
        data = {
            "source": "folder",
            "path": str(self.photos),
            "image_size": size.image_size,
            "validation_fraction": 0.05,
        }
        recipe = Recipe.model_validate(
            {
                "name": "gpu",
                "backbone": {"name": backbone, "weights": "none"},
                "batch_size": size.batch_size,
                "optim": {"lr": 1e-4},
                "log_every": f"{min(10, size.steps // 4)} steps",
                **changes,
                "data": data | changes.get("data", {}),
                "compute": {"precision": "bf16", "channels_last": "vit" not in backbone} | changes.get("compute", {}),
            }
        )
        with tempfile.TemporaryDirectory(dir=self.work) as folder, contextlib.redirect_stdout(sys.stderr):
            result = tlscale.run(recipe, Path(folder) / "run")
            records = read_metrics(Path(folder) / "run" / "metrics.jsonl")
            lines = [(record["step"], record["images_per_s"]) for record in records if record.get("images_per_s")]
        return result, lines

    def _frozen(self, freeze: str) -> dict[str, Any]:
        """Compare a frozen run, codes computed within it, with one forward pass of all images."""
        size = self.size
        one_pass_s = forward_pass(self.job(size.resnet), self.photos, size.workers)
        changes = {"freeze": freeze, "duration": f"{size.epochs} epochs", "codes": {"keep": "always"}}
        result, _ = self._run(size.resnet, changes)
        seconds = result["seconds"]
        spent_s = sum(seconds[part] for part in ("decode", "codes", "train"))
        return {
            "epochs": size.epochs,
            "forward_pass_s": round(one_pass_s, 2),
            "seconds": seconds,
            "images_per_s_of_codes": round(size.num_photos / seconds["codes"], 1),
            "forward_passes": round(spent_s / one_pass_s, 2),
            "reached": spent_s <= MOST_PASSES * one_pass_s,
        }

    def _checkpointing(self, backbone: str) -> dict[str, Any]:
        """Compare the peak memory with and without gradient checkpointing."""
        parameters = sum(p.numel() for p in self.job(backbone).network().parameters())
        fixed_mib = parameters * 4 * 4 / 2**20  # weights, gradients and two moments, in float32
        runs = {}
        for on in (False, True):
            gc.collect()
            changes = {"data": {"cache_mib": 4096}, "compute": {"gradient_checkpointing": on}}
            runs["with" if on else "without"] = self._tlscale(backbone, profile=False, **changes)
        peaks = {name: (run["peak_mib"] or 0.0) - fixed_mib for name, run in runs.items()}
        saved = 1 - peaks["with"] / peaks["without"] if self.device.type == "cuda" else 0.0
        return {"fixed_mib": round(fixed_mib, 1), **runs, "saved": round(saved, 4), "reached": saved >= LEAST_SAVED}

    def _compiled(self) -> dict[str, Any]:
        changes = {"data": {"cache_mib": 4096}, "compute": {"compile": True}}
        original = torch.compile
        if self.device.type == "cpu":  # all of it but the C++ compiler, which alone takes minutes
            torch.compile = functools.partial(original, backend="aot_eager")
        try:
            return {"tlscale": self._tlscale(self.size.resnet, profile=False, **changes)}
        finally:
            torch.compile = original

    @functools.cached_property
    def _decoded(self) -> tuple[np.ndarray, np.ndarray]:
        side = self.size.image_size
        files = sorted(self.photos.glob("*/*.jpg"))
        classes = sorted({file.parent.name for file in files})
        with ThreadPoolExecutor(self.size.workers) as pool:
            images = list(pool.map(lambda file: np.asarray(Image.open(file).resize((side, side))), files))
        return np.stack(images), np.array([classes.index(file.parent.name) for file in files])


# -- what is written --------------------------------------------------------------------------------------------------


def measure(bench: Bench, out: Path, until_s: float) -> None:
    """Measure the cases that are missing until the time is up."""
    path = out / "benchmarks.jsonl"
    for name, case in bench.cases.items():
        known = [line for line in _lines(path) if line["case"] == name]
        if any("begun" not in line for line in known) or len(known) >= 2:
            continue
        left_s = until_s - time.monotonic()
        if left_s < 5:
            print(f"no time left for: {name}", flush=True)
            break
        _append(path, {"case": name, "begun": True})
        began = time.perf_counter()
        try:
            with _within(left_s):
                found = case()
        except _OutOfTimeError:
            print(f"out of time in: {name}", flush=True)
            break
        except Exception as error:  # the others are worth having
            found = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()[-2000:]}
        _append(path, {"case": name, "took_s": round(time.perf_counter() - began, 1), **found})
        print(f"{name}: {json.dumps({k: v for k, v in found.items() if k != 'traceback'})}", flush=True)
        write_report(out, bench)


class _OutOfTimeError(BaseException):  # no `except Exception` of the code that is measured may hold it
    pass


@contextlib.contextmanager
def _within(seconds: float) -> Iterator[None]:
    def end(*_: object) -> None:
        raise _OutOfTimeError

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def write_report(out: Path, bench: Bench) -> None:
    """Write OUT/report.md from what was measured and tested."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: toy sizes, which mean nothing"
    size = bench.size
    report = [
        f"# tlscale on {card}",
        "",
        f"torch {torch.__version__}, {size.image_size} px, batch {size.batch_size}, bf16; {time.strftime('%Y-%m-%d')}.",
        f"`scripts/gpu_kit.sh run`; goals: {FROM_MEMORY} of the bare model from memory, {FROM_PHOTOS} from photos, GPU",
        f"busy {LEAST_BUSY:.0%}, frozen runs within {MOST_PASSES} forward passes, {LEAST_SAVED:.0%} of activations",
        "saved by checkpointing.",
        "",
        *_table_of_tests(out / "tests.jsonl"),
        "| case | tlscale images/s | timm-style | bare | share of bare | GPU busy | peak MiB | goal reached |",
        "|---|---|---|---|---|---|---|---|",
    ]
    waits = []
    for line in _lines(out / "benchmarks.jsonl"):
        if "begun" in line:
            continue
        ours = line.get("tlscale", {})
        cells = [ours.get("images_per_s"), line.get("timm_style", {}).get("images_per_s")]
        cells += [line.get("bare", {}).get("images_per_s"), line.get("share_of_bare"), ours.get("gpu_busy")]
        cells += [ours.get("peak_mib"), line.get("reached", line.get("error"))]
        report.append(
            " | ".join([f"| {line['case']}", *(str(cell) if cell is not None else "" for cell in cells)]) + " |"
        )
        if "tlscale" not in line:
            rest = {key: value for key, value in line.items() if key not in ("case", "reached", "traceback")}
            waits.append(f"\n{line['case']}: `{json.dumps(rest)}`")
        elif ours.get("waits"):
            waits.append(
                "\n".join([f"\nLongest waits of the host in {line['case']}:", *(f"- {w}" for w in ours["waits"])])
            )
    (out / "report.md").write_text("\n".join([*report, *waits]) + "\n")


def _table_of_tests(path: Path) -> list[str]:
    if not path.exists():
        return []
    last = {line["test"]: line for line in _lines(path)}  # one that failed may have passed in a second call
    return (
        ["| test | outcome | seconds |", "|---|---|---|"]
        + [f"| {line['test']} | {line['outcome']} | {line['seconds']} |" for line in last.values()]
        + [""]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=240)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "tlscale_gpu_kit")
    args = parser.parse_args()
    until_s = time.monotonic() + args.seconds
    args.out.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(TOY if args.toy else REAL, args.work)
    measure(bench, args.out, until_s)
    write_report(args.out, bench)


if __name__ == "__main__":
    main()
