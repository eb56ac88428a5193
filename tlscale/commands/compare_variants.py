"""List the runs of a comparison (recipes, sizes and seeds), and check all of them before the first one runs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from tlscale.data.sources.open import open_data
from tlscale.errors import DataError, RecipeError, Text, Wording, option, sentences, suggestion
from tlscale.models.backbone import build_backbone
from tlscale.models.features import early_layers
from tlscale.recipe.load import diff_recipes, override_recipe
from tlscale.recipe.schema import BackboneSection, Recipe
from tlscale.recipe.strategies import at_size, derive, fit_to_size, strategies_of, with_backbone, with_seed
from tlscale.training.fold_parts import all_images

MIN_STEPS = 200
"""Least steps of a training run at a size of `--sizes`."""
# What makes the images, and the split that figures are of, other ones.
_SAME_FOR_ALL = (
    *("name", "seed", "data.source", "data.path", "data.config", "data.revision", "data.image_column"),
    *("data.label_column", "data.train_split", "data.validation_split", "data.test_split", "data.validation_fraction"),
    *("data.classes", "data.train_limit", "data.fallback", "data.on_bad_image", "data.class_folder", "data.exclude"),
    *("data.task", "data.label_separator", "data.label_columns"),
    *("data.group_column", "data.group_regex", "data.groups_across_splits", "data.duplicates"),
    *("evaluate.folds", "evaluate.repeats"),
)


@dataclass(frozen=True)
class Variant:
    """Describe one run of the comparison."""

    label: str
    """A strategy, or the name of a recipe."""
    recipe: Recipe
    folder: Path


@dataclass(frozen=True)
class Plan:
    """Hold the options of a comparison."""

    bases: Sequence[Recipe]
    """One: its strategies are compared. Several: they are, as they are."""
    strategies: Sequence[str]
    """Some of `strategies_of` one recipe. Empty: all."""
    sizes: Sequence[int | None]
    """Labelled training images, held-out ones included; None: all. Empty: the recipe's own."""
    seeds: Sequence[int]
    """Empty: the recipe's own."""
    changes: Sequence[str]
    """`strategy.key.path=value`, or `recipe_name.key...`, for that variant only."""
    min_steps: int | None
    """Least steps of training at `sizes`; None: `MIN_STEPS`."""
    backbones: Sequence[str] = ()
    """Of one recipe, in place of strategies: each is compared with the recipe's own. Empty: strategies are."""

    @property
    def least_steps(self) -> int:
        return MIN_STEPS if self.min_steps is None else self.min_steps


def check_choice(plan: Plan) -> None:
    """Refuse what cannot be compared, before any recipe is derived.

    Raises:
        RecipeError: no recipe, several of one name, or options that are wrong or have no effect.
    """
    names = [base.name for base in plan.bases]
    if not names:
        remedy = "Name one to compare its strategies, or several recipes"
        raise RecipeError("there is none", key="RECIPE", remedy=remedy)
    if len(names) > 1 and plan.strategies:
        problem = "it derives them from one recipe, and several are compared as they are"
        raise RecipeError(problem, key=option("strategies"))
    if plan.backbones and (len(names) > 1 or plan.strategies):
        problem = "each is compared with the strategy of one recipe"
        other: Text = "several recipes" if len(names) > 1 else option("strategies")
        raise RecipeError(problem, key=option("backbones"), remedy="Give them without " + other)
    if len(set(names)) != len(names):
        problem = f"recipes of one name cannot be told apart in a table: {', '.join(names)}"
        raise RecipeError(problem, key="name", remedy="Rename one")
    for name, labels in (("strategies", plan.strategies), ("backbones", plan.backbones)):
        if len(set(labels)) != len(labels):
            raise RecipeError(f"it names one twice: {', '.join(labels)}", key=option(name))
    for name, least, numbers in (("sizes", 1, plan.sizes), ("seeds", 0, plan.seeds)):
        wrong = [number for number in numbers if number is not None and number < least]
        if wrong:
            raise RecipeError(f"{wrong[0]} is not a whole number of at least {least}", key=option(name))
    if plan.min_steps is not None and plan.min_steps < 0:
        raise RecipeError(f"{plan.min_steps} is not a whole number of at least 0", key=option("min-steps"))
    if plan.min_steps is not None and not plan.sizes:
        no_sizes = "it lengthens runs at the sizes of " + option("sizes") + ", and there are none"
        raise RecipeError(no_sizes, key=option("min-steps"), remedy="Take it out")


def change_of(text: str) -> Wording:
    """Write a change of one variant, as it is given."""
    return Wording(option("set", text).shell, f"changes=['{text}']")


def _key_of_change(text: str) -> Wording:
    return Wording(option("set", text).shell, "changes")


def labelled_recipes(plan: Plan) -> dict[str, Recipe]:
    """Derive the recipe of each label at its own size and seed; the widest codes first."""
    if len(plan.bases) > 1:
        return {base.name: base for base in plan.bases}
    base = plan.bases[0]
    if plan.backbones:
        recipes = {name: with_backbone(base, name) for name in plan.backbones}
        for recipe in recipes.values():  # each must be there before the first one runs
            _without_weights(recipe)
        return recipes
    ordered = sorted(plan.strategies or strategies_of(base), key=lambda name: name != "early_codes")
    backbone = _without_weights(base)
    parameters = [name for name, _ in backbone.named_parameters()]
    early = early_layers(backbone)
    return {name: derive(base, name, early_layers=early, parameter_names=parameters) for name in ordered}


def _without_weights(recipe: Recipe) -> nn.Module:
    """Build a recipe's backbone with random weights: only names are needed."""
    section = BackboneSection(name=recipe.backbone.name, weights="none", in_chans=recipe.backbone.in_chans)
    return build_backbone(section, image_size=recipe.data.image_size, seed=0)[0]


def list_variants(plan: Plan, labelled: dict[str, Recipe], root: Path) -> Iterator[Variant]:
    """Yield all runs in their order: the largest size first, so that smaller ones find their codes cached."""
    own = _changes_by_label(labelled, plan.changes)
    descending = sorted(dict.fromkeys(plan.sizes), key=lambda size: (size is not None, -(size or 0)))
    sizes_or_own: list[tuple[int | None, ...]] = [(size,) for size in descending] or [()]  # (): the recipe's own
    seeds_or_own: list[tuple[int, ...]] = [(seed,) for seed in dict.fromkeys(plan.seeds)] or [()]
    for size in sizes_or_own:
        for seed in seeds_or_own:
            for label, base in labelled.items():
                recipe, suffix = _at(base, size, seed, plan.least_steps)
                yield Variant(label, _changed(recipe, label, own[label]), root / f"{_file_name(label)}{suffix}")


def _file_name(label: str) -> str:
    """Return a label as the name of a folder: a backbone may be `hf-hub:somebody/something`."""
    return re.sub("[/:]+", "_", label)


def _at(recipe: Recipe, size: Sequence[int | None], seed: Sequence[int], min_steps: int) -> tuple[Recipe, str]:
    """Return the recipe at a size and with a seed, and what they add to its folder's name."""
    suffix = ""
    for number in size:
        recipe = fit_to_size(at_size(recipe, number), min_steps)
        suffix += f"_{'all' if number is None else number}"
    for number in seed:
        recipe = with_seed(recipe, number)
        suffix += f"_s{number}"
    return recipe, suffix


def _changes_by_label(labelled: dict[str, Recipe], changes: Sequence[str]) -> dict[str, list[str]]:
    own: dict[str, list[str]] = {label: [] for label in labelled}
    for change in changes:
        # A recipe's name may hold dots, so the longest that fits is meant.
        label = max((name for name in labelled if change.startswith(f"{name}.")), key=len, default=None)
        if label is None:
            word = change.partition(".")[0]
            raise RecipeError(
                f"there is no '{word}' in this comparison",
                key=_key_of_change(change),
                remedy=sentences(
                    suggestion(word, labelled),
                    f"Write NAME.key.path=value, where NAME is one of: {', '.join(labelled)}",
                ),
            )
        own[label].append(change.removeprefix(f"{label}."))
    return own


def _changed(recipe: Recipe, label: str, overrides: Sequence[str]) -> Recipe:
    """Apply overrides by the grammar of `tlscale run`, and check the recipe as a whole."""
    changed = override_recipe(recipe, overrides, name=f"variant '{label}'", prefix=f"change of {label}: ")
    for key, old, new in diff_recipes(recipe, changed):
        if key in _SAME_FOR_ALL:
            raise RecipeError(
                f"{new!r} in place of {old!r} for {key} would compare '{label}' on other images",
                key=_key_of_change(f"{label}.{key}"),
                remedy="Change the recipe, for all of them",
            )
    return changed


def refuse_wrong_sizes(plan: Plan, variants: Sequence[Variant]) -> None:
    """Refuse sizes that the images cannot have, such as more than there are; the data are opened once for each.

    Raises:
        DataError: of one of the sizes.
    """
    tried: set[int] = set()
    for variant in variants if plan.sizes else ():
        size, recipe = variant.recipe.data.train_limit, variant.recipe
        if size is None or size in tried:
            continue
        tried.add(size)
        try:
            open_data(
                recipe.data,
                recipe.seed,
                fold=all_images(recipe.evaluate),
                tries_images=False,
                in_chans=recipe.backbone.in_chans,
            )
        except DataError as error:
            if error.key == "data.train_limit":
                raise error.recast(DataError, option("sizes")) from error
            raise


def refuse_other_data(variants: Sequence[Variant]) -> None:
    """Refuse by a `DataError` recipes of different images; those that name other data may have the same, as a copy."""
    folds = {variant.label: variant.recipe.evaluate for variant in variants}
    if len({(section.folds, section.repeats) for section in folds.values()}) > 1:
        listed = ", ".join(f"{label}: {section.folds} x {section.repeats}" for label, section in folds.items())
        raise DataError(f"the recipes have other folds: {listed}", key="evaluate.folds", remedy="Write the same in all")
    keys = [key.removeprefix("data.") for key in _SAME_FOR_ALL if key.startswith("data.")]
    distinct: dict[str, Variant] = {}
    for variant in variants:
        section = variant.recipe.data
        distinct.setdefault(repr([getattr(section, key) for key in keys if key != "train_limit"]), variant)
    if len(distinct) < 2:
        return
    opened = {
        variant.label: open_data(variant.recipe.data, variant.recipe.seed, in_chans=variant.recipe.backbone.in_chans)
        for variant in distinct.values()
    }
    images = {
        label: (str(data.identity["fingerprint"]), len(data.test) if data.test is not None else None)
        for label, data in opened.items()
    }
    if len(set(images.values())) > 1:
        lines = [
            f"{label}: data {fingerprint[:12]}, {count} test images" for label, (fingerprint, count) in images.items()
        ]
        raise DataError("the recipes are not about the same images:\n  " + "\n  ".join(lines))
