"""`tlscale codes`: compute the codes (cached features) that a recipe needs, ahead of its run; list, verify, prune."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

from tlscale.codes.cache import CodesCache
from tlscale.codes.entry import Entry
from tlscale.codes.parts import partition_parts, wanted_layers
from tlscale.codes.reader import Codes
from tlscale.codes.store import CodesStore
from tlscale.commands.codes_file import check_file, rows_file, write_codes
from tlscale.commands.near_duplicates import check_near_file, show_near, write_near
from tlscale.data.sources.open import ImageSplit
from tlscale.distributed.processes import Processes, start_processes
from tlscale.distributed.signals import StopRequest
from tlscale.errors import ModelError, TlscaleError
from tlscale.recipe.image_size import image_size_of, pixels_in_words
from tlscale.recipe.schema import Recipe
from tlscale.tracking.console import Console
from tlscale.tracking.stopwatch import Stopwatch, describe_seconds, format_duration
from tlscale.training.cache_decision import agree_on_partition
from tlscale.training.setup import RunSetup, set_up
from tlscale.training.specs import ask_teacher, cache_spec, open_codes_cache

_GIB = 2**30


def compute_codes(
    recipe: Recipe,
    watch: Stopwatch | None = None,
    *,
    out: Path | None = None,
    near: float | None = None,
    near_file: Path | None = None,
) -> int:
    """Compute and cache the codes of all images of the recipe's data; what is cached is not computed again.

    They are those of `codes.layer`, or what a probe takes by default; and for a recipe that trains, those that its
    (first stage's) frozen part gives, or its teacher. Return how many images went through the network, over all
    processes.

    Args:
        out: a .parquet or .npy file that takes the codes of `codes.layer` (by default the penultimate ones), whatever
            the recipe does with them.
        near: show images that look like one of another split, or of another fold of a cross-validation: by the cosine
            of the first of these codes, at least this.
        near_file: a table for `data.exclude` that takes those that are not to be trained on, or chosen by, for that.

    Raises:
        TlscaleError: wrong input, codes that cannot be cached, or `Stopped` after a signal.
    """
    watch = watch or Stopwatch()
    wanted = wanted_layers(recipe.codes)
    if out is not None:
        check_file(out, len(wanted))
    check_near_file(near_file, near)
    processes = start_processes(recipe.compute.without_engine())
    console = Console(enabled=processes.is_main)
    with closing(processes), StopRequest(peers=processes.peers()), console.shows_progress():
        with processes.main_first():
            setup = set_up(recipe, world_size=processes.world_size, watch=watch)
        setup.classifier.to(processes.device)
        codes_cache = open_codes_cache(setup, processes, console)
        codes_cache.store.spare.must_cache = True
        data = setup.data
        others = [split for split in (data.validation, data.test) if split is not None]
        if out is not None or near is not None or recipe.probe is not None or recipe.codes.layer is not None:
            splits = [data.train, *others]
            codes = codes_cache.layer_codes(setup.classifier.backbone, wanted, splits)
            _show(codes, console)
            if near is not None:
                lists = near_file is not None
                found = processes.run_on_main(show_near, data, codes, near, console, lists=lists)
                if near_file is not None:
                    processes.run_on_main(write_near, near_file, recipe.data, data, found, console)
            if out is not None:
                processes.run_on_main(write_codes, out, splits, codes, data.classes)
        elif (targets := ask_teacher(setup, processes, codes_cache)) is not None:
            _show(targets.codes(), console)
        else:
            _frozen_codes(setup, processes, codes_cache, others)
        console.say(f"{codes_cache.num_computed:,} images were computed; all codes are in '{codes_cache.store.root}'")
        if out is not None:
            console.say(f"wrote '{out}'" + (f", and its rows to '{rows_file(out)}'" if rows_file(out) else ""))
        console.say("seconds: " + describe_seconds(watch.figures(parts=("start", "scan", "decode", "codes"))))
        return codes_cache.num_computed


def _frozen_codes(setup: RunSetup, processes: Processes, codes_cache: CodesCache, others: list[ImageSplit]) -> None:
    spec = cache_spec(setup, setup.stages[0], processes.device)
    choice = agree_on_partition(setup.classifier, spec, processes, codes_cache.store, force_cache=True)
    if choice.partition is None:
        remedy = "Freeze a part of the backbone, or name layers: codes.layer=penultimate"
        raise ModelError(f"this recipe's training has none: {choice.why}", key="codes", remedy=remedy)
    codes_cache.console.say(f"{choice.partition.describe()}; {choice.why}")
    parts = partition_parts(choice.partition, setup.classifier.backbone, codes_cache.spec.precision)
    shown = codes_cache.train_views(choice.partition.prefix, parts, range(codes_cache.spec.section.views)).by_name(
        "train"
    )
    for split in others:
        shown[split.name] = codes_cache.codes(choice.partition.prefix, parts, split)
    _show(shown, codes_cache.console)


def _show(codes: dict[str, Codes], console: Console) -> None:
    rows = [
        (
            name,
            spec.name,
            "x".join(map(str, spec.shape)),
            spec.dtype,
            f"{len(cached):,}",
            f"{len(cached) * spec.row_bytes / 2**20:,.1f}",
        )
        for name, cached in codes.items()
        for spec in cached.values
    ]
    console.table("Codes", ("split", "layer", "shape", "dtype", "images", "MiB"), rows)


def list_codes() -> None:
    """Show what is cached, the most recently used codes first."""
    store, console = CodesStore(), Console()
    entries = store.entries()
    if not entries:
        console.say(f"no codes in '{store.root}'")
        return
    console.table("Codes", ("digest", "layers", "input", "images", "MiB", "last used", ""), map(_row, entries))
    total = sum(entry.num_bytes for entry in entries)
    console.say(f"{len(entries)} in '{store.root}', {total / _GIB:.2f} GiB")


def _row(entry: Entry) -> tuple[str, ...]:
    key = entry.key or {}
    layers = ", ".join(key.get("layers", ["?"]))
    spec = key.get("transform", {}).get("input", {})
    view = ", augmented" if "augment" in key.get("transform", {}) else ""
    age = format_duration(max(time.time() - entry.last_used_s, 0))
    size = f"{_pixels(spec.get('image_size'))}{view}"
    images, mib = f"{entry.num_rows:,}", f"{entry.num_bytes / 2**20:,.1f}"
    state = "older format, not used" if entry.is_older else "" if entry.complete else "corrupt"
    return entry.digest[:12], layers, size, images, mib, f"{age} ago", state


def _pixels(image_size: int | list[int] | None) -> str:
    if image_size is None:
        return "? px"
    return pixels_in_words(image_size if isinstance(image_size, int) else image_size_of(*image_size))


def verify_codes(digest: str | None) -> None:
    """Read every byte of the cached codes, or of one entry.

    Raises:
        TlscaleError: there is no such entry, or codes are corrupt.
    """
    store, console = CodesStore(), Console()
    problems = store.verify(digest)
    for problem in problems:
        console.say(problem, style="bold red")
    if problems:
        remedy = "Damaged codes are never read: a run computes them again, or remove them: tlscale codes prune DIGEST"
        raise TlscaleError(f"{len(problems)} problems in '{store.root}'", remedy=remedy)
    entries = store.entries()
    num_older = sum(entry.is_older for entry in entries)
    console.say(f"{len(entries) - num_older} in '{store.root}': every byte is as it was written")
    if num_older:
        console.say(f"{num_older} are of an older format, and never read; to remove them: tlscale codes prune DIGEST")


def prune_codes(digests: tuple[str, ...], *, keep_gib: float | None, everything: bool) -> None:
    """Remove the entries of these digests (or their first digits), or all, or the least recently used beyond a size.

    Raises:
        TlscaleError: there is no such entry.
    """
    store, console = CodesStore(), Console()
    what = "all" if everything else round(keep_gib * _GIB) if keep_gib is not None else digests
    freed = store.prune(what, say=console.say)
    console.say(f"{freed / 2**20:,.1f} MiB were freed in '{store.root}'")
