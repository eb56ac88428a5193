"""`tlscale compare`: strategies, backbones, several recipes, or finished runs, side by side on the same images.

Chapters: what is compared; all recipes, checked before the first one runs; the runs; table and picture. Every run is an
ordinary run in a folder of its own, so `--resume` resumes those that are not complete and repeats none.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from tlscale.commands.compare_outcomes import Outcome, finished
from tlscale.commands.compare_report import (
    columns_of,
    refuse_other_images,
    table,
    to_rows,
    write_comparison,
)
from tlscale.commands.compare_runs import compare_runs
from tlscale.commands.compare_variants import (
    Plan,
    Variant,
    change_of,
    check_choice,
    labelled_recipes,
    list_variants,
    refuse_other_data,
    refuse_wrong_sizes,
)
from tlscale.commands.comparison import Comparison
from tlscale.commands.paired_tests import paired_tests
from tlscale.data.given import matches_of
from tlscale.distributed.processes import start_processes
from tlscale.distributed.signals import check_stop
from tlscale.errors import (
    LaunchError,
    RecipeError,
    ResumeError,
    RunFolderError,
    Stopped,
    TlscaleError,
    first_few,
    flag,
    option,
    quoted,
)
from tlscale.recipe.load import as_recipe, diff_recipes, dump_recipe, load_recipe, recipe_digest
from tlscale.recipe.schema import NO_EFFECT_BESIDE, Recipe
from tlscale.storage.files import make_folder, naming_disk_errors, write_text
from tlscale.storage.run_folder import RunFolder
from tlscale.tracking.console import Console, visible
from tlscale.tracking.redact import about_secrets
from tlscale.tracking.stopwatch import Stopwatch

# What a person has to put right, and what would befall every run in the same way.
_ENDS_IT_ALL = (Stopped, RecipeError, RunFolderError, ResumeError, LaunchError)
_RECIPES = "recipes"
"""The folder of the recipes of jobs, which another start may write again."""
Run = Callable[..., Mapping[str, Any]]


def compare(
    recipes: Sequence[Recipe | str | Path],
    *,
    run: Run,
    overrides: Sequence[str] = (),
    strategies: Sequence[str] = (),
    backbones: Sequence[str] = (),
    sizes: Sequence[int | None] = (),
    seeds: Sequence[int] = (),
    changes: Sequence[str] = (),
    min_steps: int | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    print_jobs: bool = False,
    watch: Stopwatch | None = None,
) -> Comparison | None:
    """Do what `in_python.compare` says.

    Args:
        recipes: recipes, or their files, or folders of finished runs.
        run: runs one recipe: `run(recipe, folder, resume=resume)`.
        overrides: `key.path=value`, of one recipe.
        strategies, backbones, sizes, seeds, changes, min_steps: see `Plan`.
        print_jobs: run nothing, and print a command line for each run; then None is returned.
    """
    watch = watch or Stopwatch()
    is_main = int(os.environ.get("RANK", "0")) == 0
    console = Console(enabled=is_main)
    recipes = _expanded(recipes)
    if folders := _run_folders(recipes):
        _refuse_idle(overrides, strategies, backbones, sizes, seeds, changes, min_steps, resume, print_jobs)
        return compare_runs(folders, Path(out) if out is not None and is_main else None, console)
    bases = _bases(recipes, overrides)
    plan = Plan(bases, strategies, sizes, seeds, changes, min_steps, backbones)
    names = [base.name for base in bases]
    root = Path(out) if out is not None else Path("runs") / f"compare_{'_'.join(names)}"[:120]
    labelled, variants = _planned(plan, root)
    if is_main and not resume:
        _refuse_used(root)
    if print_jobs:
        _print_jobs(variants if is_main else (), root)
        return None
    _show_variants(plan, labelled, variants, console)
    outcomes = _run_all(run, variants, console, watch, resume=resume, is_main=is_main)
    # The other processes wait for the table and the picture.
    title = f"Comparison of {', '.join(names)}"
    with closing(start_processes(plan.bases[0].compute.without_engine())) as processes:
        figures = processes.run_on_main(_conclude, title, outcomes, _remarks(plan), root, console, watch)
    _refuse_failures(outcomes, root)
    return Comparison(figures, root)


def _run_all(
    run: Run, variants: Sequence[Variant], console: Console, watch: Stopwatch, *, resume: bool, is_main: bool
) -> list[Outcome]:
    """Run one variant after the other."""
    is_launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    outcomes = []
    for position, variant in enumerate(variants, start=1):
        if not is_launched:  # several processes hear it in the run, all of them or none
            check_stop("comparing", flag("resume") + " goes on; complete runs are kept")
        console.say(f"run {position} of {len(variants)}: {variant.recipe.name}, in '{variant.folder}'", style="bold")
        with watch("runs"):
            outcomes.append(_outcome(run, variant, console, resume=resume, is_main=is_main))
    return outcomes


def _refuse_other_tasks(bases: Sequence[Recipe]) -> None:
    """Refuse recipes with several labels an image beside those with one: they have no figure in common.

    Raises:
        RecipeError: there are both.
    """
    several = [base.name for base in bases if base.data.task == "multi_label"]
    others = [base.name for base in bases if base.data.task != "multi_label"]
    if several and others:
        raise RecipeError(
            f"{first_few(quoted(several))} has several labels an image, and {first_few(quoted(others))} has one: they "
            "have no figure in common",
            key="data.task",
            remedy="Compare recipes of one task at a time",
        )


def _refuse_used(root: Path) -> None:
    if root.is_dir() and any(entry.name != _RECIPES for entry in root.iterdir()):
        remedy = flag("resume") + " resumes a comparison there; " + option("out", "DIR") + " is another folder"
        raise RunFolderError(f"'{root}' is not empty", remedy=remedy)


def _expanded(places: Sequence[Recipe | str | Path]) -> list[Recipe | str | Path]:
    """Expand globs, as `predict` does.

    Raises:
        RunFolderError: nothing matches one.
    """
    found: list[Recipe | str | Path] = []
    for place in places:
        matches = None if isinstance(place, Recipe) else matches_of(os.fspath(place))
        if matches == []:
            raise RunFolderError(f"nothing matches '{place}'", remedy="Name recipes, or the folders of finished runs")
        found += [place] if matches is None else matches
    return found


def _run_folders(places: Sequence[Recipe | str | Path]) -> list[str | Path]:
    """Return the places where one is a folder, with other files than recipes; none where they are recipes.

    Raises:
        RecipeError: some are recipes, and some are not.
        RunFolderError: one is not there.
    """
    folders = [place for place in places if not isinstance(place, Recipe) and Path(place).is_dir()]
    if not folders:
        return []
    for other in places:
        if isinstance(other, Recipe) or Path(other).suffix in (".yaml", ".yml"):
            raise RecipeError(
                f"'{folders[0]}' is a folder, and {other!r} a recipe: runs that are finished are only tabulated",
                remedy="Name recipes or runs, and not both",
            )
        if not os.path.lexists(other):
            raise RunFolderError(f"there is no folder '{other}'", remedy="Name the folders of finished runs")
    return [place for place in places if not isinstance(place, Recipe)]


def _refuse_idle(*given: object) -> None:
    """Refuse options that choose what is run."""
    names = ("key=value", "strategies", "backbones", "sizes", "seeds", "set", "min-steps", "resume", "print-jobs")
    for name, value in zip(names, given, strict=True):
        if value not in (None, False) and value != () and value != []:
            key = name if "=" in name else option(name, argument="changes" if name == "set" else "")
            raise RecipeError("it has no effect on runs that are finished", key=key, remedy="Take it out")


def _bases(recipes: Sequence[Recipe | str | Path], overrides: Sequence[str]) -> list[Recipe]:
    """Read recipes; overrides are of the only one."""
    if not overrides:
        return [as_recipe(recipe) for recipe in recipes]
    if len(recipes) != 1:
        remedy = "Write " + change_of("NAME.key.path=value") + " for one of them"
        problem = "it changes one recipe, and several are compared as they are"
        raise RecipeError(problem, key=overrides[0], remedy=remedy)
    (only,) = recipes
    return [only.override(list(overrides)) if isinstance(only, Recipe) else load_recipe(only, overrides)]


def _planned(plan: Plan, root: Path) -> tuple[dict[str, Recipe], list[Variant]]:
    """Derive and check all recipes, before the first one runs."""
    check_choice(plan)
    _refuse_other_tasks(plan.bases)
    labelled = labelled_recipes(plan)
    variants = list(list_variants(plan, labelled, root))
    refuse_other_data(variants)
    refuse_wrong_sizes(plan, variants)
    return labelled, variants


def _print_jobs(variants: Sequence[Variant], root: Path) -> None:
    """Write the recipe of each run, and print the line that runs it; people are told the line that gathers the table.

    The lines depend on nothing of each other, and each may be given again: it goes on where it was.
    """
    if not variants:
        return
    for warning in sorted({warning for v in variants if (warning := about_secrets(v.recipe))}):
        print(warning, file=sys.stderr)
    with naming_disk_errors(root):
        make_folder(root / _RECIPES)
        for variant in variants:
            path = root / _RECIPES / f"{variant.folder.name}.yaml"
            write_text(path, dump_recipe(variant.recipe))
            print(shlex.join(["tlscale", "run", str(path), "--out", str(variant.folder), "--resume"]))
    folders = [str(variant.folder) for variant in variants]
    gather = shlex.join(["tlscale", "compare", *folders, "--out", str(root / "table")])
    print(f"then: {visible(gather)}", file=sys.stderr)


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
            remedy=flag("resume") + f" tries again. The first is '{broken[0].folder}': {broken[0].error}",
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
    console.table(title, columns_of(outcomes), table(outcomes, pairs), num_keys=2)
    for line in figures["notes"]:
        console.say(line)
    console.say(f"table: {root / 'compare.md'}   picture: {root / 'compare.png'}   figures: {root / 'compare.json'}")
    return figures


def _show_variants(plan: Plan, labelled: dict[str, Recipe], variants: Sequence[Variant], console: Console) -> None:
    """Show what each variant changes of the recipe it comes from; then what a size or --set changes further."""
    bases = plan.bases
    if len(bases) == 1:
        kind, kinds = ("backbone", "backbones") if plan.backbones else ("strategy", "strategies")
        rows = [(label, *row) for label, recipe in labelled.items() for row in _differences(bases[0], recipe)]
        console.table(f"The {kinds}, as changes of {bases[0].name}", (kind, "key", "recipe", "here"), rows)
        _warn_of_heads_rate(bases[0], labelled, console)
    runs_of: dict[tuple[str, str, str], list[str]] = {}
    for variant in variants:
        for row in _differences(labelled[variant.label], variant.recipe):
            if row[0] not in ("seed", "data.train_limit"):
                runs_of.setdefault(row, []).append(variant.folder.name)
    if runs_of:
        rows = [(", ".join(names), *row) for row, names in runs_of.items()]
        title = "What changes with the size, and by " + option("set").shell
        console.table(title, ("runs", "key", "before", "here"), rows)
    console.say(f"{len(variants)} runs: {', '.join(variant.folder.name for variant in variants)}")


def _warn_of_heads_rate(base: Recipe, labelled: dict[str, Recipe], console: Console) -> None:
    tuned = labelled.get("finetune")
    if tuned is not None and base.freeze and not tuned.freeze:
        console.say(
            f"optim.lr: '{base.name}' freezes the whole backbone, so {base.optim.lr:g} was chosen for new layers, and "
            "finetune and scratch use it too. To change it: " + change_of("finetune.optim.lr=...").shell,
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
