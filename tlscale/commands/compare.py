"""`tlscale compare`: the strategies, or several recipes, side by side on the same images.

Chapters: what is compared; all recipes, checked before the first one runs; the runs; table and picture. Every run is an
ordinary run in a folder of its own, so `--resume` resumes those that are not complete and repeats none.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from tlscale.commands.compare_report import (
    COLUMNS,
    Outcome,
    finished,
    refuse_other_images,
    table,
    to_rows,
    write_comparison,
)
from tlscale.commands.compare_variants import (
    Plan,
    Variant,
    check_choice,
    labelled_recipes,
    list_variants,
    refuse_other_data,
)
from tlscale.commands.comparison import Comparison
from tlscale.commands.paired_tests import paired_tests
from tlscale.distributed.processes import start_processes
from tlscale.distributed.signals import check_stop
from tlscale.errors import LaunchError, RecipeError, ResumeError, RunFolderError, Stopped, TlscaleError
from tlscale.recipe.load import as_recipe, diff_recipes, recipe_digest
from tlscale.recipe.schema import NO_EFFECT_BESIDE, Recipe
from tlscale.storage.run_folder import RunFolder
from tlscale.tracking.console import Console
from tlscale.tracking.stopwatch import Stopwatch

# What a person has to put right, and what would befall every run in the same way.
_ENDS_IT_ALL = (Stopped, RecipeError, RunFolderError, ResumeError, LaunchError)
Run = Callable[..., Mapping[str, Any]]


def compare(
    recipes: Sequence[Recipe | str | Path],
    *,
    run: Run,
    strategies: Sequence[str] = (),
    sizes: Sequence[int | None] = (),
    seeds: Sequence[int] = (),
    changes: Sequence[str] = (),
    min_steps: int | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    watch: Stopwatch | None = None,
) -> Comparison:
    """Run the strategies of one recipe, or several recipes, and put the figures into one table and one picture.

    Args:
        recipes: recipes, or their files. One: its strategies are derived from it. Several: each is run as it is.
        run: runs one recipe, as `tlscale.run` does: `run(recipe, folder, resume=resume)`.
        strategies, sizes, seeds, changes, min_steps: see `Plan`.
        out: a folder, with a run folder for each; by default `runs/compare_<recipe name>`.
        resume: keep the complete runs that are there, and resume the others.

    Returns:
        What `compare.json` holds, and the folder of the comparison.

    Raises:
        TlscaleError: wrong input, before anything runs; one or more of the runs failed, when all is written;
            `Stopped` after a signal.
    """
    watch = watch or Stopwatch()
    is_main, is_launched = int(os.environ.get("RANK", "0")) == 0, int(os.environ.get("WORLD_SIZE", "1")) > 1
    console = Console(enabled=is_main)
    plan = Plan([as_recipe(recipe) for recipe in recipes], strategies, sizes, seeds, changes, min_steps)
    names = [base.name for base in plan.bases]
    root = Path(out) if out is not None else Path("runs") / f"compare_{'_'.join(names)}"[:120]
    check_choice(plan)
    labelled = labelled_recipes(plan)
    variants = list(list_variants(plan, labelled, root))
    refuse_other_data(variants)
    if is_main and not resume and root.is_dir() and any(root.iterdir()):
        remedy = "--resume resumes a comparison there; --out DIR is another folder"
        raise RunFolderError(f"'{root}' is not empty", remedy=remedy)
    _show_variants(plan.bases, labelled, variants, console)
    outcomes = []
    for position, variant in enumerate(variants, start=1):
        if not is_launched:  # several processes hear it in the run, all of them or none
            check_stop("comparing", "--resume goes on; complete runs are kept")
        console.say(f"run {position} of {len(variants)}: {variant.recipe.name}, in '{variant.folder}'", style="bold")
        with watch("runs"):
            outcomes.append(_outcome(run, variant, console, resume=resume, is_main=is_main))
    # The other processes wait for the table and the picture.
    title = f"Comparison of {', '.join(names)}"
    with closing(start_processes(plan.bases[0].compute.without_engine())) as processes:
        figures = processes.run_on_main(_conclude, title, outcomes, _remarks(plan), root, console, watch)
    _refuse_failures(outcomes, root)
    return Comparison(figures, root)


def _outcome(run: Run, variant: Variant, console: Console, *, resume: bool, is_main: bool) -> Outcome:
    """Run a variant; one that fails leaves the others."""
    recipe = variant.recipe
    size = recipe.data.train_limit
    outcome = Outcome(variant.label, size or 0, recipe.seed, str(variant.folder), recipe_digest(recipe))
    try:
        result = run(recipe, variant.folder, resume=resume)
    except _ENDS_IT_ALL:
        raise
    except TlscaleError as error:
        said = str(error).replace("\n", "\n  ")  # the breaks that are left are of several mistakes
        console.say(f"{recipe.name} failed: {said}", style="bold red")
        return replace(outcome, error=str(error))
    # On another process than the main one the disk need not have the folder.
    return finished(variant.label, size, recipe.seed, RunFolder(variant.folder), result) if is_main else outcome


def _refuse_failures(outcomes: Sequence[Outcome], root: Path) -> None:
    broken = [outcome for outcome in outcomes if outcome.error is not None]
    if broken:
        error = TlscaleError(
            f"{len(broken)} of {len(outcomes)} runs failed; the others are in '{root / 'compare.md'}'",
            remedy=f"--resume tries again. The first is '{broken[0].folder}': {broken[0].error}",
        )
        error.reported_by_main = True
        raise error


def _conclude(
    title: str, outcomes: Sequence[Outcome], remarks: Sequence[str], root: Path, console: Console, watch: Stopwatch
) -> dict[str, Any]:
    """Compare the runs, and write and show the table and the picture."""
    refuse_other_images(outcomes)
    with watch("report"):
        pairs = paired_tests(to_rows(outcomes))
        remarks = [*remarks, _of_time(watch.spent()["start"])]
        figures = write_comparison(
            root, title, outcomes, remarks, pairs, times=lambda: watch.figures(parts=("start", "runs", "report"))
        )
    console.table(title, COLUMNS, table(outcomes, pairs))
    for line in figures["notes"]:
        console.say(line)
    console.say(f"table: {root / 'compare.md'}   picture: {root / 'compare.png'}   figures: {root / 'compare.json'}")
    return figures


def _show_variants(
    bases: Sequence[Recipe], labelled: dict[str, Recipe], variants: Sequence[Variant], console: Console
) -> None:
    """Show what each variant changes of the recipe it comes from; then what a size or --set changes further."""
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
            f"optim.lr: '{base.name}' freezes the whole backbone, so {base.optim.lr:g} was chosen for new layers, and "
            "finetune and scratch use it too. To change it: --set finetune.optim.lr=...",
            style="yellow",
        )


def _differences(old: Recipe, new: Recipe) -> list[tuple[str, str, str]]:
    """List key, value before and after; all that has no effect with a probe is one row."""
    rows = [(key, _shown(before), _shown(after)) for key, before, after in diff_recipes(old, new) if key != "name"]
    if new.probe is None or old.probe is not None:
        return rows
    idle = [row for row in rows if row[0].startswith(NO_EFFECT_BESIDE["probe"])]
    others = [row for row in rows if row not in idle]
    return [*others, (", ".join(row[0] for row in idle), "", "a probe trains nothing")] if idle else others


def _shown(value: object) -> str:
    return "-" if value is None or value == [] else str(value)


def _of_time(start_s: float) -> str:
    return (
        "Seconds: of each run from its own start until its result.json: data, codes, training, evaluation and export. "
        f"They are without the start of the comparison, once for all runs: {start_s:.1f} s."
    )


def _remarks(plan: Plan) -> list[str]:
    if not plan.sizes:
        return []
    return [
        "Length: as many epochs at every size, the same budget an image; training runs that would have fewer than "
        f"{plan.least_steps} optimizer steps are made so long, as they would else measure the number of steps."
    ]
