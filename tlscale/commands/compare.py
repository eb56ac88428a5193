"""`tlscale compare`: the strategies, or several recipes, side by side on the same images.

Chapters: what is compared; all recipes, checked before the first one runs; the runs; table and picture. Every run is an
ordinary run in a folder of its own, so `--resume` goes on with those that are not complete and repeats none.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tlscale.commands.compare_report import (
    COLUMNS,
    Outcome,
    finished,
    refuse_other_images,
    table,
    to_rows,
    write_comparison,
)
from tlscale.commands.paired_tests import paired_tests
from tlscale.commands.run import run
from tlscale.data.sources.open import open_data
from tlscale.distributed.processes import start_processes
from tlscale.errors import (
    DataError,
    LaunchError,
    RecipeError,
    ResumeError,
    RunFolderError,
    Stopped,
    TlscaleError,
    did_you_mean,
)
from tlscale.models.backbone import build_backbone
from tlscale.models.features import layer_names
from tlscale.recipe.load import diff_recipes, dump_recipe, load_recipe, recipe_digest
from tlscale.recipe.schema import BackboneSection, Recipe
from tlscale.recipe.strategies import (
    NO_EFFECT_BESIDE_PROBE,
    STRATEGIES,
    at_size,
    derive,
    fit_to_size,
    with_seed,
)
from tlscale.storage.run_folder import RunFolder
from tlscale.tracking.console import Console
from tlscale.tracking.stopwatch import Stopwatch

MIN_STEPS = 200
"""Least steps of a training run at a size of `--sizes`."""
# What a person has to put right, and what would befall every run in the same way.
_ENDS_IT_ALL = (Stopped, RecipeError, RunFolderError, ResumeError, LaunchError)
# What makes the images, and the split that figures are of, other ones.
_SAME_FOR_ALL = (
    *("name", "seed", "data.source", "data.path", "data.config", "data.revision", "data.image_column"),
    *("data.label_column", "data.train_split", "data.validation_split", "data.test_split", "data.validation_fraction"),
    *("data.classes", "data.train_limit", "data.fallback", "data.on_bad_image"),
)


@dataclass(frozen=True)
class Variant:
    """One run of the comparison."""

    label: str
    """A strategy, or the name of a recipe."""
    recipe: Recipe
    folder: Path


def compare(
    recipes: Sequence[str | Path],
    *,
    strategies: Sequence[str] = (),
    sizes: Sequence[int | None] = (),
    seeds: Sequence[int] = (),
    changes: Sequence[str] = (),
    min_steps: int | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    watch: Stopwatch | None = None,
) -> dict[str, Any]:
    """Run the strategies of one recipe, or several recipes, and put the figures into one table and one picture.

    Args:
        recipes: recipe files. One: its strategies are derived from it. Several: each is run as it is.
        strategies: some of `STRATEGIES`; by itself all of them. With one recipe only.
        sizes: numbers of labelled training images, held-out ones included; None: all. By itself the recipe's own.
        seeds: by itself the recipe's own.
        changes: `strategy.key.path=value` (or `recipe_name.key...`), for that variant only.
        min_steps: training at `sizes` takes at least so many steps; by itself `MIN_STEPS`.
        out: a folder, with a run folder for each; by itself `runs/compare_<recipe name>`.
        resume: keep the complete runs that are there, and go on with the others.
        watch: measures the comparison; by default from this call. Each run has a measure of its own.

    Returns:
        What `compare.json` holds.

    Raises:
        TlscaleError: wrong input, before anything runs; one or more of the runs failed, when all is written;
            `Stopped` after a signal.
    """
    watch = watch or Stopwatch()
    # -- what is compared, and all of it checked ------------------------------------------------------------------
    is_main = int(os.environ.get("RANK", "0")) == 0
    console = Console(enabled=is_main)
    bases = [load_recipe(path) for path in recipes]
    _check_choice(bases, strategies, sizes, seeds, min_steps)
    labelled = _labelled(bases, strategies)
    root = Path(out) if out is not None else Path("runs") / f"compare_{'_'.join(base.name for base in bases)}"[:120]
    least = MIN_STEPS if min_steps is None else min_steps
    variants = list(_variants(labelled, sizes, seeds, changes, least, root))
    _refuse_other_data(variants)
    if is_main and not resume:
        _refuse_used(root)
    _show_variants(bases, labelled, variants, console)

    # -- the runs: one that fails leaves the others -----------------------------------------------------------------
    outcomes = []
    for position, variant in enumerate(variants, start=1):
        console.say(f"run {position} of {len(variants)}: {variant.recipe.name}, in '{variant.folder}'", style="bold")
        with watch("runs"):
            outcomes.append(_outcome(variant, console, resume=resume, is_main=is_main))

    # -- table and picture: by the main process, for which the others wait ------------------------------------------
    title = f"Comparison of {', '.join(base.name for base in bases)}"
    with closing(start_processes(bases[0].compute.without_engine())) as processes:
        figures = processes.run_on_main(
            lambda: _conclude(title, outcomes, _remarks(sizes, least), root, console, watch)
        )
    _refuse_failures(outcomes, root)
    return figures


def _check_choice(
    bases: Sequence[Recipe],
    strategies: Sequence[str],
    sizes: Sequence[int | None],
    seeds: Sequence[int],
    min_steps: int | None,
) -> None:
    if not bases:
        raise RecipeError("name a recipe to compare the strategies of, or several recipes")
    if len(bases) > 1 and strategies:
        raise RecipeError("--strategies derives them from one recipe; several recipes are compared as they are")
    names = [base.name for base in bases]
    if len(set(names)) != len(names):
        raise RecipeError(f"recipes of one name cannot be told apart in a table: {', '.join(names)}; rename one")
    if len(set(strategies)) != len(strategies):
        raise RecipeError(f"--strategies names one twice: {', '.join(strategies)}")
    for option, least, numbers in (("--sizes", 1, sizes), ("--seeds", 0, seeds)):
        wrong = [number for number in numbers if number is not None and number < least]
        if wrong:
            raise RecipeError(f"{option} takes whole numbers of at least {least}, not {wrong[0]}")
    if min_steps is not None and not sizes:
        raise RecipeError("--min-steps lengthens runs at the sizes of --sizes, and there are none; take it out")


def _labelled(bases: Sequence[Recipe], strategies: Sequence[str]) -> dict[str, Recipe]:
    """Label -> recipe, at its own size and seed; the widest codes first."""
    if len(bases) > 1:
        return {base.name: base for base in bases}
    base = bases[0]
    chosen = strategies or STRATEGIES
    ordered = sorted(chosen, key=lambda name: name != "early_codes")
    # Random weights do: only names are asked for.
    section = BackboneSection(name=base.backbone.name, weights="none", in_chans=base.backbone.in_chans)
    backbone, _ = build_backbone(section, image_size=base.data.image_size, seed=0)
    parameters = [name for name, _ in backbone.named_parameters()]
    early = _early_layers(backbone)
    return {name: derive(base, name, early_layers=early, parameter_names=parameters) for name in ordered}


def _early_layers(backbone: nn.Module) -> list[str]:
    """The stages before the penultimate codes.

    Where the last stage is as wide as those, they are that stage pooled (and normalised), and it is no earlier layer.
    """
    layers = layer_names(backbone)
    width: object = backbone.num_features
    return [layer.name for layer in (layers[:-1] if len(layers) > 1 and layers[-1].channels == width else layers)]


def _variants(
    labelled: dict[str, Recipe],
    sizes: Sequence[int | None],
    seeds: Sequence[int],
    changes: Sequence[str],
    min_steps: int,
    root: Path,
) -> Iterator[Variant]:
    """All runs, in their order: the largest size first, so that smaller ones find their codes kept."""
    own = _changes_by_label(labelled, changes)
    descending = sorted(dict.fromkeys(sizes), key=lambda size: (size is not None, -(size or 0)))
    sizes_or_own: list[tuple[int | None, ...]] = [(size,) for size in descending] or [()]  # (): the recipe's own
    seeds_or_own: list[tuple[int, ...]] = [(seed,) for seed in dict.fromkeys(seeds)] or [()]
    for size in sizes_or_own:
        for seed in seeds_or_own:
            for label, base in labelled.items():
                recipe, folder = _placed(base, size, seed, min_steps)
                yield Variant(label, _changed(recipe, label, own[label]), root / f"{label}{folder}")


def _placed(recipe: Recipe, size: Sequence[int | None], seed: Sequence[int], min_steps: int) -> tuple[Recipe, str]:
    """The recipe at a size and with a seed, and what they add to its folder's name."""
    folder = ""
    for number in size:
        recipe = fit_to_size(at_size(recipe, number), min_steps)
        folder += f"_{'all' if number is None else number}"
    for number in seed:
        recipe = with_seed(recipe, number)
        folder += f"_s{number}"
    return recipe, folder


def _changes_by_label(labelled: dict[str, Recipe], changes: Sequence[str]) -> dict[str, list[str]]:
    own: dict[str, list[str]] = {label: [] for label in labelled}
    for change in changes:
        # A recipe's name may hold dots, so the longest that fits is meant.
        label = max((name for name in labelled if change.startswith(f"{name}.")), key=len, default=None)
        if label is None:
            word = change.partition(".")[0]
            raise RecipeError(
                f"--set {change}: there is no '{word}' in this comparison.{did_you_mean(word, labelled)} Write "
                f"NAME.key.path=value, where NAME is one of: {', '.join(labelled)}"
            )
        own[label].append(change.removeprefix(f"{label}."))
    return own


def _changed(recipe: Recipe, label: str, overrides: Sequence[str]) -> Recipe:
    """The recipe with overrides by the grammar of `tlscale run`, and checked as a whole."""
    with tempfile.TemporaryDirectory(prefix="tlscale-") as folder:
        path = Path(folder) / f"{label}.yaml"
        path.write_text(dump_recipe(recipe), encoding="utf-8")
        try:
            changed = load_recipe(path, overrides)
        except RecipeError as error:
            text = str(error).replace("command line: ", f"--set {label}.").replace(str(path), f"variant '{label}'")
            raise RecipeError(text) from None
    for key, old, new in diff_recipes(recipe, changed):
        if key in _SAME_FOR_ALL:
            raise RecipeError(
                f"--set {label}.{key}: {old!r} -> {new!r} would compare '{label}' on other images; change the recipe, "
                "for all of them"
            )
    return changed


def _refuse_other_data(variants: Sequence[Variant]) -> None:
    """Recipes that name other data may yet have the same images: a copy, or another way to them.

    Raises:
        DataError: which differ.
    """
    keys = [key.removeprefix("data.") for key in _SAME_FOR_ALL if key.startswith("data.")]
    kept: dict[str, Variant] = {}
    for variant in variants:
        section = variant.recipe.data
        kept.setdefault(repr([getattr(section, key) for key in keys if key != "train_limit"]), variant)
    if len(kept) < 2:
        return
    opened = {variant.label: open_data(variant.recipe.data, variant.recipe.seed) for variant in kept.values()}
    facts = {
        label: (str(data.identity["fingerprint"]), len(data.test) if data.test is not None else None)
        for label, data in opened.items()
    }
    if len(set(facts.values())) > 1:
        lines = [
            f"{label}: data {fingerprint[:12]}, {count} test images" for label, (fingerprint, count) in facts.items()
        ]
        raise DataError("the recipes are not about the same images:\n  " + "\n  ".join(lines))


def _refuse_used(root: Path) -> None:
    if root.is_dir() and any(root.iterdir()):
        raise RunFolderError(f"'{root}' is not empty. --resume goes on with a comparison there; --out DIR is another")


def _outcome(variant: Variant, console: Console, *, resume: bool, is_main: bool) -> Outcome:
    recipe = variant.recipe
    size, digest = recipe.data.train_limit, recipe_digest(recipe)
    try:
        result = run(recipe, variant.folder, resume=resume)
    except _ENDS_IT_ALL:
        raise
    except TlscaleError as error:
        console.say(f"{recipe.name} failed: {error}", style="bold red")
        return Outcome(variant.label, size or 0, recipe.seed, str(variant.folder), digest, error=str(error))
    if not is_main:  # its disk need not have the folder
        return Outcome(variant.label, size or 0, recipe.seed, str(variant.folder), digest)
    return finished(variant.label, size, recipe.seed, RunFolder(variant.folder), result)


def _refuse_failures(outcomes: Sequence[Outcome], root: Path) -> None:
    broken = [outcome for outcome in outcomes if outcome.error is not None]
    if broken:
        error = TlscaleError(
            f"{len(broken)} of {len(outcomes)} runs failed; the others are in '{root / 'compare.md'}'. --resume "
            f"tries again. The first is '{broken[0].folder}': {broken[0].error}"
        )
        error.reported_by_main = True
        raise error


def _conclude(
    title: str, outcomes: Sequence[Outcome], remarks: Sequence[str], root: Path, console: Console, watch: Stopwatch
) -> dict[str, Any]:
    refuse_other_images(outcomes)
    pairs = paired_tests(to_rows(outcomes))
    times = watch.figures(parts=("start", "runs"))
    remarks = [*remarks, _of_time(times)]
    figures = write_comparison(root, title, outcomes, remarks, pairs, times=times)
    console.table(title, COLUMNS, table(outcomes, pairs))
    for line in figures["notes"]:
        console.say(line)
    console.say(f"table: {root / 'compare.md'}   picture: {root / 'compare.png'}   figures: {root / 'compare.json'}")
    return figures


def _show_variants(
    bases: Sequence[Recipe], labelled: dict[str, Recipe], variants: Sequence[Variant], console: Console
) -> None:
    """What each variant changes of the recipe it comes from; then what a size or --set changes further."""
    if len(bases) == 1:
        rows = [(label, *row) for label, recipe in labelled.items() for row in _differences(bases[0], recipe)]
        console.table(f"The strategies, as changes of {bases[0].name}", ("strategy", "key", "recipe", "here"), rows)
        _warn_of_heads_rate(bases[0], labelled, console)
    runs_of: dict[tuple[str, str, str], list[str]] = {}
    for variant in variants:
        for row in _differences(labelled[variant.label], variant.recipe):
            if row[0] not in ("seed", "data.train_limit"):
                runs_of.setdefault(row, []).append(variant.folder.name)
    if runs_of:
        rows = [(", ".join(names), *row) for row, names in runs_of.items()]
        console.table("What changes with the size, and by --set", ("runs", "key", "before", "here"), rows)
    console.say(f"{len(variants)} runs: {', '.join(variant.folder.name for variant in variants)}")


def _warn_of_heads_rate(base: Recipe, labelled: dict[str, Recipe], console: Console) -> None:
    tuned = labelled.get("finetune")
    if tuned is not None and base.freeze and not tuned.freeze:
        console.say(
            f"'{base.name}' freezes the whole backbone, so optim.lr = {base.optim.lr:g} was chosen for new layers; "
            "finetune and scratch take it too. Another: --set finetune.optim.lr=...",
            style="yellow",
        )


def _differences(old: Recipe, new: Recipe) -> list[tuple[str, str, str]]:
    """Key, value before and after; what a probe has no use for is one row."""
    rows = [(key, _shown(before), _shown(after)) for key, before, after in diff_recipes(old, new) if key != "name"]
    if new.probe is None or old.probe is not None:
        return rows
    idle = [row for row in rows if row[0].startswith(NO_EFFECT_BESIDE_PROBE)]
    kept = [row for row in rows if row not in idle]
    return [*kept, (", ".join(row[0] for row in idle), "", "a probe trains nothing")] if idle else kept


def _shown(value: object) -> str:
    return "-" if value is None or value == [] else str(value)


def _of_time(times: dict[str, Any]) -> str:
    return (
        "Seconds: of each run from its own start until its result.json: data, codes, training, evaluation and export. "
        f"They are without the start of the comparison, once for all runs: {times['seconds']['start']:.1f} s."
    )


def _remarks(sizes: Sequence[int | None], min_steps: int) -> list[str]:
    if not sizes:
        return []
    return [
        "Length: as many epochs at every size, the same budget an image; training runs that would have fewer than "
        f"{min_steps} optimizer steps are made so long, as they would else measure the number of steps."
    ]
