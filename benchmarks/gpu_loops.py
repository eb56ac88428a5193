"""The loops that `gpu.py` compares tlscale with, and what it measures: speed, memory, how busy the GPU is.

All train the same network with the same optimizer, precision and memory order. `bare` computes one batch that lies on
the device again and again: the limit. `timm_loop` is timm's own loader with its own transforms, and a loop in the way
of its train script.

Shape letters: B images of a batch.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import timm.data
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.autograd import DeviceType

from tlscale.training import loop as tlscale_loop

# For the device (or, where its queue is full, in what launches a kernel), for memory, and for the workers of a loader.
_WAITS = ("Synchronize", "cudaMemcpy", "cudaHostAlloc", "cudaMalloc", "cudaFree", "LaunchKernel", "DataLoader")


@dataclass(frozen=True)
class Job:
    """What all loops train."""

    backbone: str
    image_size: int
    batch_size: int
    num_classes: int
    device: torch.device
    channels_last: bool = True

    def network(self) -> nn.Module:
        """Make the network, on the device."""
        size = {"img_size": self.image_size} if "vit" in self.backbone else {}
        network = timm.create_model(self.backbone, num_classes=self.num_classes, **size).to(self.device)
        return network.to(memory_format=torch.channels_last) if self.channels_last else network

    def autocast(self) -> torch.autocast:
        """Return the context of a forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16)


def wait(device: torch.device) -> None:
    """Wait until the device has computed all it was told to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """Forget the most memory that was allocated."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_mib(device: torch.device) -> float | None:
    """Return the most memory that tensors had, in MiB; None on a CPU."""
    return round(torch.cuda.max_memory_allocated(device) / 2**20, 1) if device.type == "cuda" else None


class _Step:
    """One step of training, as one writes it by hand."""

    def __init__(self, job: Job) -> None:
        self._job, self.network = job, job.network().train()
        self._optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-4, weight_decay=0.05, fused=True)

    def __call__(self, images_BCHW: Tensor, labels_B: Tensor) -> None:
        if self._job.channels_last:
            images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
        with self._job.autocast():
            loss = F.cross_entropy(self.network(images_BCHW), labels_B)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()


def _speed(
    job: Job, batches: Iterator[tuple[Tensor, Tensor]], do: Callable[[Tensor, Tensor], None], warm: int
) -> float:
    """Return the median of images per second over stretches of the batches after the first `warm`."""
    speeds, count, began = [], 0, None
    for number, batch in enumerate(batches):
        if number >= warm and (number - warm) % 10 == 0:
            wait(job.device)
            now = time.perf_counter()
            if began is not None:
                speeds.append(count / (now - began))
            began, count = now, 0
        do(*batch)
        count += len(batch[0])
    if not speeds and began is not None:  # a toy has fewer than ten
        wait(job.device)
        speeds.append(count / (time.perf_counter() - began))
    return statistics.median(speeds)


def bare(job: Job, steps: int, *, warm: int = 10) -> dict[str, Any]:
    """Train on one batch that lies on the device: images per second and peak memory."""
    reset_peak(job.device)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(job.batch_size, 3, job.image_size, job.image_size, generator=generator).to(job.device)
    labels = torch.randint(job.num_classes, (job.batch_size,), generator=generator).to(job.device)
    batches = ((images, labels) for _ in range(steps))
    speed = _speed(job, batches, _Step(job), min(warm, steps // 2))
    return {"images_per_s": round(speed, 1), "peak_mib": peak_mib(job.device)}


class _InMemory(torch.utils.data.Dataset[Any]):
    """Images that were decoded before, as timm's transforms take them."""

    transform: Callable[[Image.Image], Any] | None = None

    def __init__(self, images: np.ndarray, labels: np.ndarray, repeat: int) -> None:
        self._images, self._labels, self._repeat = images, labels, repeat

    def __len__(self) -> int:
        return len(self._images) * self._repeat

    def __getitem__(self, row: int) -> tuple[Any, int]:
        row %= len(self._images)
        assert self.transform is not None
        return self.transform(Image.fromarray(self._images[row])), int(self._labels[row])


def timm_loader(
    job: Job, source: Path | tuple[np.ndarray, np.ndarray], steps: int, *, augment: bool, workers: int
) -> Any:
    """Make timm's loader as for training (crop, flip): prefetched to the device, normalised there."""
    if isinstance(source, Path):
        dataset = timm.data.create_dataset("", str(source), is_training=True)
    else:
        dataset = _InMemory(*source, repeat=-(-steps * job.batch_size // len(source[0])))
    return timm.data.create_loader(
        dataset,
        input_size=(3, job.image_size, job.image_size),
        batch_size=job.batch_size,
        is_training=True,
        no_aug=not augment,
        scale=(0.35, 1.0),
        hflip=0.5,
        color_jitter=None,  # timm's default, which takes longer than decoding; tlscale has no such thing to compare
        interpolation="bicubic",
        num_workers=workers,
        device=job.device,
        use_prefetcher=job.device.type == "cuda",
        pin_memory=True,
    )


def timm_loop(
    job: Job,
    source: Path | tuple[np.ndarray, np.ndarray],
    steps: int,
    *,
    augment: bool,
    workers: int,
    warm: int = 10,
) -> dict[str, Any]:
    """Train in the way of timm's train script: images per second and peak memory."""
    reset_peak(job.device)
    loader = timm_loader(job, source, steps, augment=augment, workers=workers)
    batches = _at_most(_again_and_again(loader), steps)
    on_device = ((images.to(job.device), labels.to(job.device)) for images, labels in batches)
    speed = _speed(job, on_device, _Step(job), min(warm, steps // 2))
    return {"images_per_s": round(speed, 1), "peak_mib": peak_mib(job.device)}


def forward_pass(job: Job, photos: Path, workers: int) -> float:
    """Return the seconds that one pass of all photos through the network takes, with timm's loader."""
    network = job.network().eval()
    loader = timm.data.create_loader(
        timm.data.create_dataset("", str(photos)),
        input_size=(3, job.image_size, job.image_size),
        batch_size=job.batch_size,
        interpolation="bicubic",
        num_workers=workers,
        device=job.device,
        use_prefetcher=job.device.type == "cuda",
        pin_memory=True,
    )
    began = time.perf_counter()
    with torch.no_grad(), job.autocast():
        for images_BCHW, _ in loader:
            network(images_BCHW.to(job.device).contiguous(memory_format=torch.channels_last))
    wait(job.device)
    return time.perf_counter() - began


def _again_and_again(loader: Iterable[Any]) -> Iterator[Any]:
    while True:
        yield from loader


def _at_most(batches: Iterator[Any], steps: int) -> Iterator[Any]:
    for _ in range(steps):
        yield next(batches)


@contextlib.contextmanager
def profiled_steps(device: torch.device, first: int, count: int) -> Iterator[dict[str, Any]]:
    """Profile some steps of the run within; the dict then has how busy the GPU was, and where the host waited."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profile, original = torch.profiler.profile(activities=activities), tlscale_loop.train_step
    number, began, found = 0, 0.0, {}

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal number, began
        if number == first:
            wait(device)
            profile.start()
            began = time.perf_counter()
        made = original(*args, **kwargs)
        if number == first + count - 1:
            wait(device)
            wall_s = time.perf_counter() - began
            profile.stop()
            found.update(_busy_and_waits(profile, wall_s, count))
        number += 1
        return made

    tlscale_loop.train_step = counting
    try:
        yield found
    finally:
        tlscale_loop.train_step = original


def _busy_and_waits(profile: torch.profiler.profile, wall_s: float, steps: int) -> dict[str, Any]:
    events = list(profile.events() or ())
    # Not what spans kernels and the gaps between them, such as all of an optimizer's step.
    on_device = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    computing = [e for e in on_device if not e.name.startswith(("Memcpy", "Memset"))]
    kernels = sorted((e.time_range.start, e.time_range.end) for e in computing)
    busy_us, end = 0.0, 0.0
    for start, stop in kernels:  # streams may overlap: what is covered counts once
        busy_us += max(0.0, stop - max(start, end))
        end = max(end, stop)
    host = [e for e in events if e.device_type == DeviceType.CPU and any(word in e.name for word in _WAITS)]
    host.sort(key=lambda event: -event.time_range.elapsed_us())
    return {
        "profiled_steps": steps,
        "wall_ms_per_step": round(wall_s / steps * 1e3, 3),
        "gpu_busy": round(busy_us / 1e6 / wall_s, 4) if kernels else None,
        "waits": [f"{e.time_range.elapsed_us() / 1e3:.2f} ms in {e.name}, called by {_callers(e)}" for e in host[:10]],
    }


def _callers(event: Any) -> str:
    names, parent = [], event.cpu_parent
    while parent is not None and len(names) < 4:
        names.append(parent.name)
        parent = parent.cpu_parent
    return " < ".join(names) or "Python"
