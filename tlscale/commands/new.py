"""`tlscale new`: look at a data set, say what is in it, and write a recipe that runs.

Promise: a file that is there is never written over; where the command fails, it leaves none.
"""

from __future__ import annotations

import re
from pathlib import Path

from tlscale.commands.new_recipe import BUNDLED, describe, describe_left_out, recipe_name, recipe_text
from tlscale.data.sources.open import open_data
from tlscale.data.survey import Survey, survey
from tlscale.errors import RecipeError, one_line, speaks_python
from tlscale.models.backbone import build_backbone
from tlscale.models.features import early_layers
from tlscale.recipe.load import parse_recipe
from tlscale.recipe.schema import BackboneSection, Recipe
from tlscale.storage.files import make_folder, write_text
from tlscale.tracking.console import Console
from tlscale.training.fold_parts import all_images

_INDENT = 10  # of what is said, behind the words that begin a block


@speaks_python
def new(data: str | Path, *, backbone: str = BUNDLED, out: str | Path | None = None) -> Recipe:
    """Look at a data set, and return a recipe for it.

    Args:
        data: a folder (of class folders, with or without splits, also in other folders), a table (.csv, .tsv, .parquet)
            with a column of paths and one of labels, or `fashion_mnist`.
        backbone: a timm model; by default the small ResNet that comes with its weights.
        out: write the recipe to this file as well. What is left out is listed in a table next to it, or in the current
            folder.

    Raises:
        DataError: no images, no labels, nothing that can be read, or nothing to train on.
        RecipeError: the file is there already.
        ModelError: no such backbone.
    """
    with Console().shows_progress():
        recipe, _, _ = _write(str(data), backbone, None if out is None else Path(out), "tlscale.new")
    return recipe


def new_file(data: str, *, backbone: str, out: str | None, console: Console) -> None:
    """Look at a data set, write a recipe, and show what was found and what to type next."""
    place = Path(out) if out is not None else Path(f"{recipe_name(data)}.yaml")
    with console.shows_progress():
        recipe, seen, words = _write(data, backbone, place, f"tlscale new {one_line(data)}")
    shown = one_line(data)
    _block(console, shown, [*describe(seen), *describe_left_out(seen), *_held_out(seen, recipe)])
    listed = f", with {len(seen.left_out):,} paths in {seen.keys['exclude']}" if seen.left_out else ""
    _block(console, "wrote", [f"{place}: {words}{listed}"])
    compares = f"tlscale compare {place}   for a choice by evidence"
    _block(console, "next", [f"tlscale run {place}", compares])


def _write(data: str, backbone: str, out: Path | None, command: str) -> tuple[Recipe, Survey, str]:
    """Return the recipe, what was found, and the strategy in words."""
    if out is not None and out.exists():
        raise RecipeError(f"'{out}' is there already", remedy="Name another file (out), or remove it")
    name = recipe_name(data) if out is None else re.sub(r"[^A-Za-z0-9._-]+", "_", out.stem).strip("._-") or "images"
    exclude = Path(f"{name}.exclude.csv") if out is None else out.with_suffix(".exclude.csv")
    layers = ([], None) if backbone == BUNDLED else _layers(backbone)
    seen = survey(data, exclude)
    try:
        if out is not None:
            make_folder(out.parent)
        text, words = recipe_text(name, seen, backbone, layers, command)
        recipe = parse_recipe(text, str(out or name))
        open_data(recipe.data, recipe.seed, fold=all_images(recipe.evaluate), tries_images=False)
        if out is not None:
            write_text(out, text)
    except BaseException:
        exclude.unlink(missing_ok=True)
        raise
    return recipe, seen, words


def _layers(backbone: str) -> tuple[list[str], str | None]:
    """Return the stages of a backbone before the penultimate codes, and a rule that freezes all before its middle."""
    network, _ = build_backbone(BackboneSection(name=backbone, weights="none"), image_size=None, seed=0)
    early = early_layers(network)
    names = [name for name, _ in network.named_parameters()]
    middle = early[len(early) // 2]
    frozen = _before(names, middle)
    if not frozen:
        return early, None
    tops = dict.fromkeys(next((s for s in early if name.startswith(f"{s}.")), name.split(".")[0]) for name in frozen)
    return early, f"({'|'.join(map(re.escape, tops))})(\\..*)?"


def _before(names: list[str], layer: str) -> list[str]:
    """Return the parameters before those of a layer."""
    first = next((i for i, name in enumerate(names) if name.startswith(f"{layer}.")), 0)
    return names[:first]


def _held_out(seen: Survey, recipe: Recipe) -> list[str]:
    if "validation" in seen.counts:
        return []
    if recipe.evaluate.folds is not None:
        each = "each image is scored by a model that was not fitted to it"
        return [f"no test split: {recipe.evaluate.folds} folds, so that {each}"]
    share = f"{recipe.data.validation_fraction:.0%} of the images to train on"
    if "test" in seen.counts:
        return [f"no validation split: {share} are held out to choose by"]
    return [f"no test split: {share} are held out, to choose by and to score"]


def _block(console: Console, head: str, lines: list[str]) -> None:
    """Show lines behind a word; a long word has a line of its own."""
    if len(head) >= _INDENT:
        console.say(head)
        head = ""
    for number, line in enumerate(lines):
        console.say(f"{head if number == 0 else '':<{_INDENT}}{line}", indent=_INDENT)
