"""`tlscale plan`: show everything up to the first step, and the memory that it will need."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import click
import torch
from torch import Tensor, nn

from tlscale.codes.parts import wanted_layers
from tlscale.codes.probes.estimate import estimate_fit
from tlscale.codes.probes.kinds import kind_of
from tlscale.codes.probes.select import given_values, refuse_wrong_probe
from tlscale.codes.store import CodesStore
from tlscale.commands.plan_data import fold_rows, plan_of
from tlscale.commands.tables import show_plan
from tlscale.data.sources.bad_images import find_bad
from tlscale.data.sources.folds import Fold
from tlscale.data.sources.open import ImageData, open_data, read_source
from tlscale.distributed.fsdp import trained_bytes, unsharded_bytes
from tlscale.distributed.signals import check_stop
from tlscale.errors import DataError
from tlscale.models.features import LayerCodes
from tlscale.models.partition.partition import Partition
from tlscale.recipe.schema import CodesSection, ComputeSection, DataSection, ProbeSection, Recipe
from tlscale.tracking.console import Console
from tlscale.tracking.progress import Pace
from tlscale.tracking.stopwatch import format_duration
from tlscale.training.cache_decision import choose_partition, refuse_codes_of_a_probe, row_bytes, sample_images
from tlscale.training.compiler import check_compiler
from tlscale.training.duplicates import clashing_labels, count_copies_in_folds, note_on_folds, shared_images
from tlscale.training.earlier_images import compare_with_earlier
from tlscale.training.fold_checks import open_folds
from tlscale.training.fold_parts import Part, all_images
from tlscale.training.setup import RunSetup, set_up
from tlscale.training.specs import cache_spec, input_path
from tlscale.training.stages import Stage, apply_freezing

_SAMPLE_IMAGES = 2  # batch norm in train mode wants more than one
_TIMED_IMAGES = 16
_CPU = torch.device("cpu")


def plan(recipe: Recipe, *, world_size: int, checks_images: bool = False, as_json: bool = False) -> None:
    """Show what `run` would do with `world_size` processes; nothing is trained, and no codes are computed.

    Args:
        recipe: of the run.
        world_size: its processes.
        checks_images: decode every image first.
        as_json: print it to standard output as JSON, and all else to standard error.

    Raises:
        TlscaleError: the recipe, its data or its weights are wrong, or images that were checked cannot be read.
        Stopped: it was asked to stop while it checked images.
    """
    check_compiler(recipe.compute)
    console = Console(stderr=as_json)
    with console.shows_progress():
        if checks_images:
            _check_images(recipe.data, recipe.backbone.in_chans, console)
        if recipe.probe is None:
            refuse_codes_of_a_probe(recipe.codes)
        folds = all_images(recipe.evaluate)
        first = None if folds is None else Part(folds.folds[0])  # of equal ones
        # What a run compares and leaves out is so here as well, where all images are read.
        setup = set_up(recipe, world_size=world_size, part=first, tries_images=checks_images)
        whole = None if folds is None else _all_of_folds(setup, folds, tries_images=checks_images)
        _compare_with_earlier(setup, whole, reads_images=checks_images)
        for note in _notes_on_copies(setup, whole) if checks_images else ():
            console.say(note, style="bold red")
    tables = Console(enabled=not as_json)
    show_plan(setup, tables, device=f"planned for {world_size} process{'es' if world_size > 1 else ''}")
    if setup.part is not None:
        tables.table("Cross-validation", ("what", "how"), fold_rows(setup, setup.part.fold, whole))
    plain = plan_of(setup)
    if recipe.probe is not None:
        plain["probe"] = _plan_probe(recipe.probe, recipe.codes, setup, tables)
    for stage, known in zip(setup.stages, plain["stages"], strict=True):
        known |= _plan_stage(stage, setup, recipe.compute, tables)
    if as_json:
        click.echo(json.dumps(plain, indent=1))


def _check_images(section: DataSection, in_chans: int, console: Console) -> None:
    """Decode every image of all splits, on all cores, and list those that cannot be read.

    A run decodes an image when it uses it: to decode all of a large data set beforehand may take longer than to train
    on a part of it. What was found sound once, by whatever command, is not decoded again.

    Raises:
        DataError: some cannot be read, which would end a run that uses them.
        Stopped: it was asked to stop.
    """
    splits = read_source(section).splits
    num_images = sum(len(split.store) for split in splits.values())
    pace = Pace(num_images, "checking images", console)
    bad_images = find_bad(section, splits, in_chans=in_chans, on_images=pace.add)
    for reason in bad_images.reasons():
        console.say(reason)
    if not len(bad_images):
        console.say(f"all {num_images:,} images can be read")
        return
    problem = (
        f"{len(bad_images):,} of {num_images:,} images cannot be read; the first is {next(iter(bad_images.reasons()))}"
    )
    if section.on_bad_image == "skip":
        console.say(f"{problem}. A run skips them")
        return
    remedy = "Repair them or take them out; with skip a run leaves them out of every split, and counts them."
    raise DataError(problem, key="data.on_bad_image", remedy=remedy)


def _all_of_folds(setup: RunSetup, folds: Fold, *, tries_images: bool) -> ImageData:
    """Open all images of a cross-validation, whose first fold the setup is of."""
    recipe, known = setup.recipe, setup.bad_images if tries_images else None
    return open_data(recipe.data, recipe.seed, fold=folds, bad_images=known, tries_images=tries_images)


def _compare_with_earlier(setup: RunSetup, whole: ImageData | None, *, reads_images: bool) -> None:
    """Compare what the run will score; of a cross-validation `whole`, all its images."""
    scored = setup if whole is None else replace(setup, data=whole, part=None)
    first = len(scored.data.notes)
    compare_with_earlier(scored, reads_images=reads_images)
    if whole is not None:
        setup.data = replace(setup.data, notes=(*setup.data.notes, *scored.data.notes[first:]))


def _notes_on_copies(setup: RunSetup, whole: ImageData | None) -> Iterator[str]:
    """Give the notes of the run on equal images, all of which are read.

    Args:
        whole: of a cross-validation all images.
    """
    recipe, data = setup.recipe, whole or setup.data
    for split in data.splits.values():
        split.digests()  # known by now, but of files that were written just before
    if whole is not None:
        refits = recipe.probe is not None and recipe.probe.refit
        parts = (part for _, part in open_folds(recipe, whole))
        yield from note_on_folds(count_copies_in_folds(whole, parts, refits=refits))
    yield from shared_images(data)[1]
    if recipe.data.duplicates == "warn":
        yield from clashing_labels(data)


def _plan_probe(probe: ProbeSection, section: CodesSection, setup: RunSetup, console: Console) -> dict[str, Any]:
    """Return and show what a probe computes and fits."""
    refuse_wrong_probe(probe, section, len(setup.data.train), len(setup.data.validation or ()))
    codes = _codes_of_probe(section, setup)
    console.table("Codes", ("layer", "pool", "stride", "width", "MiB"), map(_codes_row, codes))
    fits = _fits(setup, probe, codes)
    console.table("Fit, on this machine's CPU", ("what", "about", "why"), _fit_rows(fits))
    return {"kind": probe.kind, "codes": codes, "fits": fits}


def _plan_stage(stage: Stage, setup: RunSetup, compute: ComputeSection, console: Console) -> dict[str, Any]:
    """Return and show what is frozen in a stage, and the memory that it takes."""
    check_stop("planning")
    stage.build_optimizer()
    apply_freezing(setup.classifier, stage)
    of = f" of stage {stage.number + 1}" if len(setup.stages) > 1 else ""
    codes = _frozen(stage, setup, compute)
    console.table(f"Frozen part{of}", ("what", "how"), _frozen_rows(codes))
    bytes_of = _memory(setup, compute)
    console.table(f"Memory of a process{of}", ("what", "MiB"), _memory_rows(bytes_of, setup))
    return {"codes": codes, "memory_bytes": bytes_of}


def _codes_of_probe(section: CodesSection, setup: RunSetup) -> list[dict[str, Any]]:
    """Describe what a probe computes of each image, by one pass of two images."""
    images_BCHW = sample_images(input_path(setup, _CPU), count=_SAMPLE_IMAGES)
    data = setup.data
    held = sum(len(split) for split in (data.validation, data.test) if split is not None)
    num_images = len(data.train) + len(setup.views) * held
    return [
        {
            "layer": row.layer,
            "pool": row.pool,
            "stride": row.stride or None,
            "width": row.width,
            "bytes": num_images * row.width * 4,
        }
        for row in LayerCodes(setup.classifier.backbone, wanted_layers(section)).describe(images_BCHW)
    ]


def _codes_row(codes: dict[str, Any]) -> tuple[str, ...]:
    size = f"{codes['bytes'] / 2**20:,.1f}"
    return codes["layer"], codes["pool"], str(codes["stride"] or "-"), f"{codes['width']:,}", size


def _fits(setup: RunSetup, probe: ProbeSection, codes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Estimate how long the probe will be fitted to each set of codes, by a pass that is measured here."""
    data, fits = setup.data, []
    num_held, num_tested = len(data.validation or ()), len(data.test or ())
    values = kind_of(probe.kind).setting.values(given_values(probe), len(data.train), num_held)
    for one in codes:
        check_stop("planning")
        fit = estimate_fit(
            probe.kind,
            len(data.train) + num_held,
            one["width"],
            len(data.classes),
            len(values),
            num_held + num_tested,
        )
        about = {"seconds": fit.seconds, "memory_bytes": round(fit.num_bytes), "why": fit.basis}
        fits.append({"layer": one["layer"], "pool": one["pool"], **about})
    return fits


def _fit_rows(fits: Sequence[dict[str, Any]]) -> list[tuple[str, str, str]]:
    rows = []
    for fit in fits:
        about = f"{format_duration(max(fit['seconds'], 1))}, {fit['memory_bytes'] / 2**20:,.0f} MiB"
        rows.append((f"{fit['layer']} {fit['pool']}", about, fit["why"]))
    total_s = sum(fit["seconds"] for fit in fits)
    return rows if len(rows) == 1 else [*rows, ("all", format_duration(max(total_s, 1)), "one after the other")]


def _frozen(stage: Stage, setup: RunSetup, compute: ComputeSection) -> dict[str, Any]:
    """Find where the network is split, what is cached there, and what that saves."""
    half = compute.precision in ("bf16", "fp16")
    autocast = partial(torch.autocast, "cpu", torch.bfloat16) if half else nullcontext
    spec = cache_spec(setup, stage, _CPU)
    choice = choose_partition(setup.classifier, spec, autocast, CodesStore())
    if choice.partition is None:
        return {"cached": False, "why": choice.why}
    whole_s, rest_s = step_seconds(setup, choice.partition)
    return {
        "cached": True,
        "why": choice.why,
        "what": choice.partition.describe(),
        "bytes_per_image": row_bytes(choice.partition, spec.section),
        "images": spec.num_rows,
        "step_s_per_image": rest_s,
        "step_s_per_image_uncached": whole_s,
    }


def _frozen_rows(codes: dict[str, Any]) -> list[tuple[str, str]]:
    if not codes["cached"]:
        return [("codes", f"computed in every step: {codes['why']}")]
    images, num_bytes = codes["images"], codes["bytes_per_image"]
    mib = images * num_bytes / 2**20
    whole_s, rest_s = codes["step_s_per_image_uncached"], codes["step_s_per_image"]
    return [
        ("codes", f"computed once: {codes['what']}"),
        ("size", f"{num_bytes:,} bytes an image x {images:,} images and views = {mib:,.1f} MiB; {codes['why']}"),
        (
            "saves",
            f"a step over codes takes {1e3 * rest_s:.2f} ms an image, over images {1e3 * whole_s:.2f} "
            f"({whole_s / rest_s:.1f} times as long), on this machine's CPU",
        ),
    ]


def step_seconds(setup: RunSetup, partition: Partition) -> tuple[float, float]:
    """Measure seconds an image, forward and backward, through the whole network and through the suffix alone."""
    images_BCHW = sample_images(input_path(setup, _CPU), count=_TIMED_IMAGES)
    with torch.no_grad():
        codes = partition.prefix(images_BCHW)
    return (
        _median_step_s(setup.classifier, lambda: (images_BCHW,)),
        _median_step_s(partition.suffix, lambda: tuple(code.clone() for code in codes)),
    )


def _median_step_s(module: nn.Module, inputs: Callable[[], tuple[Tensor, ...]]) -> float:
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    seconds = []
    with torch.random.fork_rng(devices=[]):
        for _ in range(4):
            check_stop("planning")
            codes = inputs()
            began = time.perf_counter()
            module(*codes).sum().backward()
            seconds.append(time.perf_counter() - began)
    module.zero_grad(set_to_none=True)
    for name, buffer in module.named_buffers():
        buffer.copy_(buffers[name])
    return statistics.median(seconds[1:]) / _TIMED_IMAGES  # the first one warms up


def _memory(setup: RunSetup, compute: ComputeSection) -> dict[str, int]:
    network = setup.classifier
    trained = trained_bytes(network)
    frozen = sum(param.numel() * param.element_size() for param in network.parameters()) - trained
    is_spread = compute.engine == "fsdp2"
    gradients = trained / (setup.split.world_size if is_spread else 1)
    bytes_of = {
        "weights": frozen + gradients,
        **({"unsharded": unsharded_bytes(network)} if is_spread else {}),
        "gradients": gradients,
        "optimizer": 2 * gradients,
        "activations": activation_bytes(setup) * setup.split.micro_batch_size,
    }
    return {what: round(num_bytes) for what, num_bytes in bytes_of.items()}


def _memory_rows(bytes_of: dict[str, int], setup: RunSetup) -> list[tuple[str, str]]:
    measured = f"measured on {_SAMPLE_IMAGES} in {setup.dtype}"
    words = {
        "unsharded": "unsharded parameters during compute (root + largest block)",
        "optimizer": "optimizer, two values a parameter (as Adam)",
        "activations": f"activations of {setup.split.micro_batch_size} images, {measured}",
    }
    rows = [(words.get(what, what), f"{count / 2**20:,.1f}") for what, count in bytes_of.items()]
    return [*rows, ("sum, without the libraries' own", f"{sum(bytes_of.values()) / 2**20:,.1f}")]


def activation_bytes(setup: RunSetup) -> float:
    """Measure the bytes that one image's forward pass keeps for the backward pass, on the CPU."""
    spec, network = setup.spec, setup.classifier
    own = {param.untyped_storage().data_ptr() for param in network.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    images = torch.zeros(_SAMPLE_IMAGES, *spec.shape_CHW, dtype=setup.dtype)
    with torch.random.fork_rng(devices=[]), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = network(images)
    del outputs
    for name, buffer in network.named_buffers():
        buffer.copy_(buffers[name])
    return sum(kept.values()) / _SAMPLE_IMAGES
