"""Offer the verbs to Python: thin functions over the commands, whose errors name arguments in place of options.

They show what the commands show, and take recipes as they are or by their files.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from tlscale.commands import compare as compare_command
from tlscale.commands import evaluate as evaluate_command
from tlscale.commands import plan as plan_command
from tlscale.commands import run as run_command
from tlscale.commands.comparison import Comparison
from tlscale.commands.run_result import RunResult
from tlscale.data.sources.tables import Role
from tlscale.errors import RecipeError, speaks_python
from tlscale.recipe.load import as_recipe, load_to_run
from tlscale.recipe.schema import Recipe
from tlscale.storage.run_folder import refuse_both
from tlscale.training import image_classifier
from tlscale.training.image_classifier import ImageClassifier

RecipeOrFile = Recipe | str | os.PathLike[str]


@speaks_python
def plan(recipe: RecipeOrFile, *, processes: int | None = None, check_images: bool = False) -> None:
    """Show what `run` would do, and train nothing: freezing, parameters, steps, batches, memory.

    Args:
        recipe: a recipe, or its file.
        processes: plan for so many; by default the recipe's, or 1.
        check_images: decode every image first, and list those that cannot be read.

    Raises:
        TlscaleError: the recipe, its data or its weights are wrong, or images that were checked cannot be read.
    """
    recipe = as_recipe(recipe)
    if processes is not None and processes < 1:
        raise RecipeError(f"{processes} is no number of processes", key="processes", remedy="Give 1 or more")
    world_size = processes or recipe.compute.num_processes or 1
    plan_command.plan(recipe, world_size=world_size, checks_images=check_images)


@speaks_python
def run(
    recipe: RecipeOrFile,
    out: str | os.PathLike[str] | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> RunResult:
    """Train, or fit a probe, as the recipe says; evaluate, and write a model.

    Args:
        recipe: a recipe, or its file.
        out: the run folder; by default `runs/<recipe name>`.
        resume: resume from the newest valid checkpoint there, or start if there is none.
        overwrite: replace a run that is there.

    Returns:
        What `result.json` holds, with `top1`, its `interval`, figures `per_class` and the `folder`.

    Raises:
        TlscaleError: wrong input, a run that failed, or `Stopped` after a signal, when all is saved.
    """
    refuse_both(resume=resume, overwrite=overwrite)
    folder = None if out is None else Path(out)
    if not isinstance(recipe, Recipe):
        recipe = load_to_run(os.fspath(recipe), (), folder, resume=resume)
    result = run_command.run(recipe, folder, resume=resume, overwrite=overwrite)
    return RunResult(result, folder if folder is not None else Path("runs") / recipe.name)


@speaks_python
def load(run: str | os.PathLike[str]) -> ImageClassifier:
    """Load the model of a run folder (or of its `model/` folder), in eval mode on the CPU.

    Raises:
        RunFolderError: there is no model there, a damaged one, or one of a newer format.
    """
    return image_classifier.load(run)


@speaks_python
def evaluate(
    run: str | os.PathLike[str],
    data: str | os.PathLike[str] | None = None,
    *,
    split: Role | None = None,
    overrides: Sequence[str] = (),
    name: str | None = None,
    out: str | os.PathLike[str] | None = None,
) -> RunResult:
    """Score the model of a run on labelled images.

    Args:
        run: its folder.
        data: other images, a folder or a table; by default the run's own.
        split: of the data; by default test, else the validation split of the run's own data, or all of other data.
        overrides: changes of how it is computed, such as `compute.precision=bf16`.
        name: of the folder of the figures below `RUN/evaluations`; by default the data's.
        out: a folder for the figures, in place of that one.

    Returns:
        What `figures.json` holds, with the attributes that the result of `run` has.

    Raises:
        TlscaleError: no such run, overrides without effect, data that do not fit its classes, or none to score on.
    """
    place = None if data is None else os.fspath(data)
    folder = None if out is None else Path(out)
    return evaluate_command.evaluate_run(Path(run), overrides, data=place, split_name=split, name=name, out=folder)


@speaks_python
def compare(
    recipes: RecipeOrFile | Sequence[RecipeOrFile],
    *,
    strategies: Sequence[str] = (),
    backbones: Sequence[str] = (),
    sizes: Sequence[int | None] = (),
    seeds: Sequence[int] = (),
    changes: Sequence[str] = (),
    min_steps: int | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
) -> Comparison:
    """Put strategies of one recipe, several recipes or finished runs into one table and one picture.

    Args:
        recipes: one recipe (or its file), whose strategies are compared; or several, each of which is run as it is; or
            folders of finished runs, which are only tabulated.
        strategies: some of codes, early_codes, mlp, head, lora, finetune and scratch; by default all
            (lora where the recipe has adapters).
        backbones: names of timm's, each of which is compared with the recipe's strategy, in place of strategies.
        sizes: numbers of training images, each of which is compared; None stands for all.
        seeds: each of which is compared; by default the recipe's.
        changes: `strategy.key.path=value`, or `recipe_name.key...`, for that one only.
        min_steps: least steps of training at `sizes`; by default 200.
        out: a folder, with a run folder for each; by default `runs/compare_<recipe name>`. Of finished runs: for the
            table and the picture, which by default are not written.
        resume: keep the complete runs that are there, and resume the others.

    Returns:
        What `compare.json` holds, with the rows of its `table` and the `folder`.

    Raises:
        TlscaleError: wrong input, before anything runs; one or more of the runs failed, when all is written;
            `Stopped` after a signal.
    """
    several = [recipes] if isinstance(recipes, Recipe | str | os.PathLike) else list(recipes)
    made = compare_command.compare(
        [recipe if isinstance(recipe, Recipe) else os.fspath(recipe) for recipe in several],
        run=run_command.run,
        strategies=strategies,
        backbones=backbones,
        sizes=sizes,
        seeds=seeds,
        changes=changes,
        min_steps=min_steps,
        out=None if out is None else Path(out),
        resume=resume,
    )
    assert made is not None, "no jobs were printed"
    return made
