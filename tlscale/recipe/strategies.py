"""The strategies of transfer, as changes of one recipe: what `tlscale compare` runs side by side.

Promise: pure functions from a valid recipe to a valid one. Images, splits, seed, image size, backbone, batch size and
length stay as they are, so that what differs between two variants is the strategy; what a strategy cannot use goes
back to its default, and whatever else it changes is a value of `STRATEGIES`' own that a person may override.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from tlscale.errors import RecipeError, option, sentences, suggestion
from tlscale.recipe.duration import Duration, parse_duration
from tlscale.recipe.rules import Rule
from tlscale.recipe.schema import NO_EFFECT_BESIDE, Recipe

STRATEGIES = ("codes", "early_codes", "mlp", "head", "finetune", "scratch")
"""In the order of the design: least of the network trained first. A recipe with adapters has one more, `lora`."""

# New layers on fixed codes want other rates than a whole network. Of 7 settings each, these were the best or within 0.2
# points of it at 90, 900 and 2,700 images (codes of EfficientNet-Lite0 at 64 px, Fashion-MNIST, 200 steps of 64 images,
# mean of 3 seeds). A fifth of the head's rate cost 1.0 to 1.2 points, four times it 0.5 to 3.9; weight decay 0.1.
NEW_LAYERS_OPTIM: dict[str, dict[str, Any]] = {
    "head": {"name": "adamw", "lr": 5e-3, "weight_decay": 0.0},
    "mlp": {"name": "adamw", "lr": 2e-3, "weight_decay": 0.01},
}
MLP_HEAD: list[Any] = [{"linear": 256}, "relu", {"dropout": 0.2}, "linear"]
_OF_PROBES = ("codes.layer", "codes.pool")
_LONGEST_NAME = 100
_LONGEST_STEM = 50  # leaves room for the strategy, a size and a seed


def strategies_of(recipe: Recipe) -> tuple[str, ...]:
    """Return the strategies that a recipe is compared with by default."""
    if recipe.adapters is None:
        return STRATEGIES
    place = STRATEGIES.index("finetune")
    return (*STRATEGIES[:place], "lora", *STRATEGIES[place:])


def derive(
    recipe: Recipe, strategy: str, *, early_layers: Sequence[str] = (), parameter_names: Sequence[str] = ()
) -> Recipe:
    """Return the recipe with another strategy.

    - `codes`: logistic regression (or the recipe's own `probe`) on the penultimate codes.
    - `early_codes`: the same on each of `early_layers`; the validation split chooses one.
    - `mlp`, `head`: all of the backbone is frozen; a small network, or one linear layer, is trained by AdamW with
      `NEW_LAYERS_OPTIM`. Schedule, loss, augmentation and length are the recipe's.
    - `lora`: the recipe's own adapters, `freeze` (or `stages`) and head.
    - `finetune`: without adapters; the recipe's own `freeze` (or `stages`) and head; nothing is frozen where it
      freezes everything.
    - `scratch`: random weights, nothing frozen, the recipe's head; without layer decay and learning-rate rules, which
      are there to spare pretrained layers.

    Args:
        recipe: to start from, whatever its own strategy is.
        early_layers: names of the backbone's stages, for `early_codes`.
        parameter_names: of the backbone; they tell whether `freeze` takes all of it.

    Raises:
        RecipeError: no such strategy; no weights to transfer; stages whose lengths cannot be added up.
    """
    _refuse_unfit(recipe, strategy, early_layers)
    plain = recipe.to_plain()
    plain["name"] = _named(recipe.name[:_LONGEST_STEM], f"_{strategy}")
    match strategy:
        case "codes":
            _probe(plain, ["penultimate"])
        case "early_codes":
            _probe(plain, list(early_layers))
        case "mlp":
            _train_new_layers(recipe, plain, strategy, MLP_HEAD)
        case "head":
            _train_new_layers(recipe, plain, strategy, ["linear"])
        case "lora":
            _reset(plain, *_OF_PROBES)
        case "finetune":
            _reset(plain, "adapters")
            _finetune(recipe, plain, parameter_names)
        case "scratch":
            _train(recipe, plain)
            _untaught(plain)
            plain["backbone"]["weights"] = "none"
            _reset(plain, "backbone.sha256", "backbone.allow_pickle", "backbone.min_matched", "freeze", "adapters")
            _reset(plain, "optim.layer_decay", "optim.lr_rules")
    return Recipe.model_validate(plain)


def _refuse_unfit(recipe: Recipe, strategy: str, early_layers: Sequence[str]) -> None:
    """Refuse a strategy that there is not, or that the recipe has nothing for."""
    known = (*STRATEGIES, "lora")
    if strategy not in known:
        there_are = f"There are: {', '.join(known)}."
        remedy = sentences(suggestion(strategy, known), there_are)
        raise RecipeError(f"there is no strategy '{strategy}'", remedy=remedy)
    if strategy != "scratch" and recipe.backbone.weights == "none":
        raise RecipeError(
            f"is none in recipe '{recipe.name}', but the strategy '{strategy}' transfers what a backbone has learned",
            key="backbone.weights",
            remedy="Name weights (pretrained, or the path of a file), or compare from scratch only: "
            + option("strategies", "scratch", argument="strategies=['scratch']")
            + ".",
        )
    if strategy == "early_codes" and not early_layers:
        problem = f"'{recipe.backbone.name}' has no layers before the penultimate codes"
        raise RecipeError(problem, key="backbone.name", remedy="Leave the strategy early_codes out.")
    if strategy == "lora" and recipe.adapters is None:
        problem = f"recipe '{recipe.name}' has none, which the strategy 'lora' is about"
        raise RecipeError(problem, key="adapters", remedy="Write adapters.lora.layers")


def as_probe(recipe: Recipe) -> Recipe:
    """Return a probe on the recipe's data, backbone and codes, without what has no effect on one."""
    plain = recipe.to_plain()
    plain["name"] = _named(recipe.name[:_LONGEST_STEM], "_codes")
    _probe(plain, recipe.codes.layer or ["penultimate"])
    return Recipe.model_validate(plain)


def with_backbone(recipe: Recipe, name: str) -> Recipe:
    """Return the recipe with another backbone; one that ships with tlscale has its weights alone, others timm's.

    Raises:
        RecipeError: the recipe's weights are those of a file or a run, which fit one backbone.
    """
    plain = recipe.to_plain()
    plain["name"] = _named(recipe.name[:_LONGEST_STEM], f"_{re.sub('[^A-Za-z0-9._-]+', '_', name)}")
    if name != recipe.backbone.name:
        if recipe.backbone.weights not in ("pretrained", "bundled", "none"):
            problem = f"{recipe.backbone.weights!r} fits '{recipe.backbone.name}' alone, and '{name}' is compared too"
            raise RecipeError(problem, key="backbone.weights", remedy="Write backbone.weights=pretrained")
        if recipe.backbone.weights == "bundled":
            plain["backbone"]["weights"] = "pretrained"
        plain["backbone"]["name"] = name
    return Recipe.model_validate(plain)


def at_size(recipe: Recipe, size: int | None) -> Recipe:
    """Return the recipe with so many labelled training images, validation included; None: with all there are."""
    plain = recipe.to_plain()
    plain["data"]["train_limit"] = size
    plain["name"] = _named(recipe.name, f"_{'all' if size is None else size}")
    return Recipe.model_validate(plain)


def with_seed(recipe: Recipe, seed: int) -> Recipe:
    """Return the recipe with another seed, and so another subset and another validation split."""
    plain = recipe.to_plain() | {"seed": seed, "name": _named(recipe.name, f"_s{seed}")}
    return Recipe.model_validate(plain)


def fit_to_size(recipe: Recipe, min_steps: int) -> Recipe:
    """Return the recipe with a fair length for its few training images.

    An equal number of epochs is the same budget an image, but of 100 images in batches of 64 an epoch is two steps:
    such a run measures the number of its steps, not what can be learned from its images. One of fewer than `min_steps`
    steps is therefore made exactly so long, and what it does by the epoch (evaluation, checkpoints, warm-up) is
    stretched with it. `drop_last` is given up where the images do not fill one batch. A probe, and a recipe without
    `data.train_limit`, stay as they are.

    Args:
        recipe: with `data.train_limit`.
        min_steps: least number of optimizer steps; 0: none.
    """
    if recipe.probe is not None or recipe.data.train_limit is None:
        return recipe
    num_images = recipe.data.train_limit
    num_images -= -(-num_images // recipe.evaluate.folds) if recipe.evaluate.folds is not None else 0  # of a fold
    num_images = max(num_images - int(num_images * recipe.data.validation_fraction), 1)
    plain = recipe.to_plain()
    if num_images < recipe.batch_size:
        plain["drop_last"] = False
    if plain["drop_last"]:
        num_images -= num_images % recipe.batch_size

    def steps(duration: Duration) -> int:
        return duration.to_steps(num_images=num_images, batch_size=recipe.batch_size)

    lengths = [steps(duration) for duration in _durations(recipe)]
    if sum(lengths) < min_steps:
        _stretch(plain, Fraction(min_steps, sum(lengths)), steps, min_steps)
    return Recipe.model_validate(plain)


def _stretch(plain: dict[str, Any], factor: Fraction, steps: Callable[[Duration], int], min_steps: int) -> None:
    """Turn epochs and images into steps, `factor` times as many; the whole is at least `min_steps`."""

    def longer(text: str | None) -> str | None:
        duration = parse_duration(text) if text is not None else None
        if duration is None or duration.unit in ("%", "steps"):
            return text
        return f"{round(steps(duration) * factor)} steps"

    for stage in plain["stages"] or ():
        stage["duration"] = f"{math.ceil(steps(parse_duration(stage['duration'])) * factor)} steps"
    if not plain["stages"]:
        plain["duration"] = f"{min_steps} steps"
    for section in (plain["evaluate"], plain["checkpoint"]):
        section["every"] = longer(section["every"])
    for schedule in (plain["schedule"], *(stage["schedule"] for stage in plain["stages"] or ())):
        for key in ("warmup", "step_every"):
            if schedule is not None:
                schedule[key] = longer(schedule[key])


def _durations(recipe: Recipe) -> list[Duration]:
    return [stage.duration for stage in recipe.stages] if recipe.stages else [recipe.duration]


def _named(name: str, suffix: str) -> str:
    return name[: _LONGEST_NAME - len(suffix)] + suffix


def _reset(plain: dict[str, Any], *keys: str) -> None:
    """Set keys back to their defaults."""
    for dotted in keys:
        *above, name = dotted.split(".")
        section = plain
        for part in above:
            section = section.get(part, {})
        section.pop(name, None)


def _untaught(plain: dict[str, Any]) -> None:
    """Remove the teacher that the recipe may have: that is no part of these strategies."""
    if plain["distill"] is not None:
        _reset(plain, "distill", "evaluate.select")


def _probe(plain: dict[str, Any], layers: list[str]) -> None:
    _untaught(plain)
    _reset(plain, *NO_EFFECT_BESIDE["probe"], "stages")
    if plain["data"]["task"] == "multi_label":
        _reset(plain, "loss.class_weights")  # which a probe has with one label alone
    plain["probe"] = plain["probe"] or {"kind": "logistic"}
    plain["codes"]["layer"] = layers
    if set(layers) == {"penultimate"}:
        _reset(plain, "codes.pool")  # the backbone has its own


def _train_new_layers(recipe: Recipe, plain: dict[str, Any], strategy: str, head: list[Any]) -> None:
    _train(recipe, plain)
    # Frozen layers are in eval mode and have no backward pass, so these would have no effect.
    idle = ("backbone.drop_rate", "backbone.drop_path_rate", "compute.gradient_checkpointing", "adapters")
    _reset(plain, *idle)
    _untaught(plain)
    plain |= {"freeze": ".*", "head": head, "optim": dict(NEW_LAYERS_OPTIM[strategy])}


def _finetune(recipe: Recipe, plain: dict[str, Any], names: Sequence[str]) -> None:
    if recipe.stages and not all(_freezes_all(stage.freeze, names) for stage in recipe.stages):
        _reset(plain, *_OF_PROBES)
        return
    _train(recipe, plain)
    if _freezes_all(recipe.freeze, names):
        _reset(plain, "freeze")


def _train(recipe: Recipe, plain: dict[str, Any]) -> None:
    """Train in one stage, as long as all stages of the recipe together."""
    _reset(plain, "probe", "stages", *_OF_PROBES)
    if not recipe.stages:
        return
    durations = _durations(recipe)
    units = dict.fromkeys(duration.unit for duration in durations)
    if len(units) > 1:
        raise RecipeError(
            f"the stages of recipe '{recipe.name}' are as long as {', '.join(map(str, durations))}, which cannot be "
            "added up for strategies without stages",
            key="stages.duration",
            remedy="Give all of them in one unit.",
        )
    plain["duration"] = str(Duration(sum((duration.amount for duration in durations), Fraction(0)), durations[0].unit))


def _freezes_all(rules: Sequence[Rule[bool]], names: Sequence[str]) -> bool:
    """Return whether no parameter is left to train."""
    firsts = (next((rule for rule in rules if rule.matches(name)), None) for name in names)
    return bool(names) and all(rule is not None and rule.value for rule in firsts)
