"""Decide whether a stage trains on codes (cached features) or on images: is caching worth it?

Promise: both end in the same weights; which one it is is a matter of cost, decided here and shown on the console. What
cannot be partitioned safely is trained on images.

Shapes: B images.
"""

from __future__ import annotations

import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tlscale.codes.store import CodesStore
from tlscale.data.transforms import InputPath
from tlscale.distributed.host import device_for
from tlscale.distributed.processes import Processes
from tlscale.errors import RecipeError
from tlscale.models.classifier import Classifier
from tlscale.models.partition.partition import NoPartition, Partition, find_partition
from tlscale.recipe.schema import CodesSection
from tlscale.storage.cache import nearest_folder


@dataclass(frozen=True)
class CacheSpec:
    """Everything that the decision for a stage depends on, next to the network and the store."""

    section: CodesSection
    inputs: InputPath
    views: list[int]
    """Of the training images, that the epochs of the stage see."""
    num_train: int
    num_evaluated: int
    """Images of the other splits."""
    images_seen: int
    """By the steps of the stage."""
    trains_all: bool
    augments: bool
    has_teacher: bool

    @property
    def num_rows(self) -> int:
        """Images, and augmented views of them, whose codes the stage needs; those of the test split included."""
        return self.num_train * len(self.views) + self.num_evaluated


@dataclass(frozen=True)
class Choice:
    """Hold whether a stage trains on codes, and why, in one sentence for the console."""

    partition: Partition | None
    why: str


def agree_on_partition(
    network: Classifier, spec: CacheSpec, processes: Processes, store: CodesStore, *, force_cache: bool
) -> Choice:
    """Choose the partition of a stage that was entered; none where not every process finds the same one."""
    autocast = processes.accelerator.autocast
    choice = processes.run_on_all(choose_partition, network, spec, autocast, store, force_cache=force_cache)
    digests = processes.gather(choice.partition.digest if choice.partition else None)
    if choice.partition is not None and any(digest != choice.partition.digest for digest in digests):
        return Choice(None, "not every process finds the same partition")
    return choice


def choose_partition(
    network: Classifier,
    spec: CacheSpec,
    autocast: Callable[[], AbstractContextManager[Any]],
    store: CodesStore,
    *,
    force_cache: bool = False,
) -> Choice:
    """Choose where to partition the network of a stage that was entered, or tell why not to.

    `store` is on the disk that is measured; `force_cache` partitions wherever it is possible, whatever it costs.
    """
    if spec.has_teacher:
        return Choice(None, "what is cached are the codes of its teacher")
    why_not = None if force_cache else _objection(spec)
    if spec.trains_all or why_not:
        return Choice(None, why_not or "nothing is frozen")
    images_BCHW = sample_images(spec.inputs)
    try:
        with autocast():
            partition = find_partition(network, images_BCHW)
    except NoPartition as reason:
        return Choice(None, reason.reason)
    if spec.section.keep == "always" or force_cache:
        return Choice(partition, _size(partition, spec))
    with autocast():
        return _weighed(partition, spec, store, images_BCHW)


def _weighed(partition: Partition, spec: CacheSpec, store: CodesStore, images_BCHW: Tensor) -> Choice:
    """Choose the partition where its codes fit, and where reading them is faster than computing them."""
    image_bytes, size = row_bytes(partition, spec.section), _size(partition, spec)
    num_bytes = image_bytes * spec.num_rows
    if why_not := _no_room(num_bytes, spec.section, store):
        return Choice(None, f"{size} {why_not}")
    if num_bytes <= spec.section.memory_mib * 2**20:
        return Choice(partition, f"{size}, read into memory once")
    forward_s = _forward_s(partition.prefix, images_BCHW)
    speed = disk_bytes_per_s(store.root)
    if speed is None:
        return Choice(None, f"'{store.root}' cannot be written")
    read_s = image_bytes / speed
    costs = f"reading takes {1e3 * read_s:.2f} ms an image, computing {1e3 * forward_s:.2f} ms"
    return Choice(None, costs) if read_s > forward_s else Choice(partition, f"{size}; {costs}")


def _size(partition: Partition, spec: CacheSpec) -> str:
    return f"{row_bytes(partition, spec.section) * spec.num_rows / 2**20:,.1f} MiB of codes"


def _objection(spec: CacheSpec) -> str | None:
    """Tell why codes would not pay, whatever the network; None where they may."""
    if spec.section.keep == "never":
        return "codes.keep is never"
    if spec.trains_all:
        return "nothing is frozen"
    if spec.section.keep == "always":
        return None
    if spec.augments and spec.section.views == 1:
        return "data.augment makes new images in each epoch (codes: {views: k} keeps k views of each)"
    needed = spec.num_train * len(spec.views)
    if spec.images_seen < needed:
        return f"the stage sees {spec.images_seen:,} images, and codes of {needed:,} would be computed"
    return None


def row_bytes(partition: Partition, section: CodesSection) -> int:
    """Count the bytes of an image's codes in the dtype that they are cached in."""
    if section.dtype == "auto":
        return partition.num_bytes
    size = torch.finfo(getattr(torch, section.dtype)).bits // 8
    return sum(
        math.prod(value.shape) * (size if value.dtype.is_floating_point else value.dtype.itemsize)
        for value in partition.values
    )


def _no_room(num_bytes: int, codes: CodesSection, store: CodesStore) -> str | None:
    for key in ("disk_gib", "cache_gib"):
        if num_bytes > getattr(codes, key) * 2**30:
            return f"would be more than codes.{key} = {getattr(codes, key):g} allows"
    nearest = nearest_folder(store.root)
    # What is cached may be these very codes, or be evicted for them.
    there = store.entries() if os.access(store.root, os.R_OK | os.X_OK) else []
    free = shutil.disk_usage(nearest).free + sum(entry.num_bytes for entry in there)
    return f"would be more than the {free / 2**20:,.0f} MiB that '{nearest}' has room for" if num_bytes > free else None


_SAMPLE_IMAGES = 8
_TRIED_BYTES = 32 * 2**20


def sample_images(inputs: InputPath, count: int = _SAMPLE_IMAGES) -> Tensor:
    """Make noise of the size and type of a batch: a partition must not depend on the data."""
    spec, generator = inputs.spec, torch.Generator().manual_seed(0)
    images_BCHW = torch.randn(count, *spec.shape_CHW, generator=generator).to(inputs.device, inputs.dtype)
    return images_BCHW.contiguous(memory_format=torch.channels_last) if inputs.channels_last else images_BCHW


@torch.no_grad()
def _forward_s(module: torch.nn.Module, images_BCHW: Tensor) -> float:
    """Measure the seconds of an image through `module`: the median of three passes, after one to warm up."""
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        module(images_BCHW)
        device_for(images_BCHW.device).wait()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:]) / len(images_BCHW)


def disk_bytes_per_s(root: Path) -> float | None:
    """Measure the disk below `root`, reading what is not in memory; None where nothing can be written there."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=root, prefix=".speed-") as file:
            file.write(bytes(_TRIED_BYTES))
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            began = time.perf_counter()
            with open(file.name, "rb", buffering=0) as reader:
                while reader.read(2**20):
                    pass
            return _TRIED_BYTES / (time.perf_counter() - began)
    except OSError:
        return None


def refuse_codes_of_a_probe(codes: CodesSection) -> None:
    """Refuse the key that only a probe, or `tlscale codes`, has a use for; raise `RecipeError` where it is set."""
    if codes.layer is not None:
        raise RecipeError(
            "has no effect in training, which caches the last values that nothing trainable has a part in, as they are",
            key="codes.layer",
            remedy="Remove it, or add 'probe: {kind: logistic}' to fit a classifier on codes",
        )
