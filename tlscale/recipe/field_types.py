"""The kinds of values that a recipe's keys take: durations, rules, head layers, augmentations, names.

Promise: each type checks and normalises what YAML gives, with a message that says what would be right, and gives plain
YAML values back. `schema` says which key takes which.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, PlainSerializer, WithJsonSchema

from tlscale.recipe.duration import Duration, parse_duration
from tlscale.recipe.rules import Rule, parse_rule

HeadLayer = str | dict[str, int | float]
Augmentation = str | dict[str, float]

ACTIVATIONS = ("relu", "gelu", "silu", "tanh", "leaky_relu", "hardswish", "elu")
HEAD_NORMS = ("layernorm", "batchnorm")
# name -> (what its number means, default, lowest, highest); None: it takes no number
AUGMENTATIONS: dict[str, tuple[str, float, float, float] | None] = {
    "flip": ("probability of a left-right flip", 0.5, 0.0, 1.0),
    "crop": ("least share of the image's area that a crop keeps", 0.35, 0.01, 1.0),
    "trivialaugment": None,
    "randaugment": ("magnitude of each of the two operations", 9.0, 0.0, 30.0),
    "erasing": ("probability that a rectangle is erased", 0.25, 0.0, 1.0),
    "mixup": ("alpha of the Beta distribution", 0.2, 0.01, 10.0),
    "cutmix": ("alpha of the Beta distribution", 1.0, 0.01, 10.0),
}
POOLS = ("avg", "max", "avgmax", "token", "none")
TRACKERS = ("wandb", "tensorboard", "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "trackio")


def _duration(value: object) -> Duration:
    return parse_duration(value)


def _freeze_rules(value: object) -> tuple[Rule[bool], ...]:
    """One regex, a list of them, or a list of `{regex: true | false}`, in order."""
    rules: list[Rule[bool]] = []
    for item in value if isinstance(value, list | tuple) else [value]:
        if isinstance(item, Rule):
            rules.append(item)
        elif isinstance(item, dict):
            for pattern, frozen in item.items():
                if not isinstance(frozen, bool):
                    raise ValueError(f"a freeze rule's value is true (freeze) or false (train), not {frozen!r}")
                rules.append(parse_rule(pattern, frozen))
        else:
            rules.append(parse_rule(item, True))
    return tuple(rules)


def _number_rules(value: object) -> tuple[Rule[float], ...]:
    """A list of `{regex: number}`, in order (a mapping is such a list)."""
    rules: list[Rule[float]] = []
    for item in value if isinstance(value, list | tuple) else [value]:
        if isinstance(item, Rule):
            rules.append(item)
            continue
        if not isinstance(item, dict):
            raise ValueError("rules are a list of 'regex: number', such as [{'layer4\\..*': 0.1}]")
        for pattern, number in item.items():
            if isinstance(number, bool) or not isinstance(number, int | float) or number < 0:
                raise ValueError(f"a rule's value is a number of at least 0, not {number!r}")
            rules.append(parse_rule(pattern, float(number)))
    return tuple(rules)


def _plain_rules(rules: tuple[Rule[Any], ...]) -> list[dict[str, Any]]:
    return [{rule.pattern: rule.value} for rule in rules]


def _named_number(item: object, what: str) -> tuple[str, Any]:
    """`name` or `{name: number}` as (name, number or None)."""
    if isinstance(item, str):
        return item, None
    if isinstance(item, dict) and len(item) == 1:
        name, number = next(iter(item.items()))
        if isinstance(name, str) and isinstance(number, int | float) and not isinstance(number, bool):
            return name, number
    raise ValueError(f"{what} is a name or one '{{name: number}}', not {item!r}")


def _unknown(what: str, name: str, known: tuple[str, ...] | dict[str, Any]) -> ValueError:
    from tlscale.errors import did_you_mean

    return ValueError(f"unknown {what} '{name}'.{did_you_mean(name, known)} There are: {', '.join(known)}")


def _head_layer(item: object) -> HeadLayer:
    name, number = _named_number(item, "a head layer")
    if name == "linear":
        if number is not None and (not isinstance(number, int) or not 1 <= number <= 65536):
            raise ValueError(f"the width of a linear layer is a whole number from 1 to 65536, not {number!r}")
    elif name == "dropout":
        if number is None or not 0 <= number < 1:
            raise ValueError("dropout takes its probability, from 0 to below 1: {dropout: 0.2}")
    elif name in ACTIVATIONS or name in HEAD_NORMS:
        if number is not None:
            raise ValueError(f"'{name}' takes no number")
    else:
        raise _unknown("head layer", name, ("linear", "dropout", *ACTIVATIONS, *HEAD_NORMS))
    return name if number is None else {name: number}


def _head(layers: list[HeadLayer]) -> list[HeadLayer]:
    if not layers or layers[-1] != "linear":
        raise ValueError("a head ends in 'linear' without a width: it takes the number of classes")
    if "linear" in layers[:-1]:
        raise ValueError("only the last 'linear' may go without a width; write {linear: 256}")
    return layers


def _augmentation(item: object) -> Augmentation:
    name, number = _named_number(item, "an augmentation")
    if name not in AUGMENTATIONS:
        raise _unknown("augmentation", name, AUGMENTATIONS)
    spec = AUGMENTATIONS[name]
    if number is None:
        return name
    if spec is None:
        raise ValueError(f"'{name}' takes no number")
    meaning, _, lowest, highest = spec
    if not lowest <= number <= highest:
        raise ValueError(f"'{name}' takes the {meaning}, from {lowest:g} to {highest:g}, not {number!r}")
    return {name: float(number)}


def augmentation_values(augment: list[Augmentation]) -> dict[str, float | None]:
    """`[flip, {mixup: 0.3}]` as `{'flip': 0.5, 'mixup': 0.3}`, defaults filled in; None for those without a number."""
    values: dict[str, float | None] = {}
    for item in augment:
        name, number = _named_number(item, "an augmentation")
        spec = AUGMENTATIONS[name]
        values[name] = spec[1] if number is None and spec is not None else number
    return values


def _augment(value: object) -> object:
    """`none` is the empty list."""
    return [] if value == "none" or value is None else value


def _augment_set(items: list[Augmentation]) -> list[Augmentation]:
    names = list(augmentation_values(items))
    if len(names) != len(items):
        raise ValueError("an augmentation is named twice")
    if "trivialaugment" in names and "randaugment" in names:
        raise ValueError("trivialaugment and randaugment are two policies for the same thing; name one")
    return items


def run_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise ValueError("a name has 1 to 100 letters, digits, '.', '_' or '-', and begins with a letter or digit")
    return name


def weights_place(weights: str) -> str:
    if not weights:
        raise ValueError("use pretrained, bundled, none or the path of a file")
    return weights


def one_or_more(value: object) -> object:
    """One name, or a list of them."""
    return [value] if isinstance(value, str) else value


def different(names: list[str]) -> list[str]:
    if not names:
        raise ValueError("name at least one")
    if len(set(names)) != len(names):
        raise ValueError("a name is given twice")
    return names


def _positive(duration: Duration) -> Duration:
    if duration.amount <= 0:
        raise ValueError("must be more than 0")
    return duration


_DURATION_JSON = WithJsonSchema({"type": "string", "examples": ["10 epochs", "500 steps", "64000 images", "5%"]})
_plain_duration = PlainSerializer(str, return_type=str)
AnyDuration = Annotated[Duration, BeforeValidator(_duration), _plain_duration, _DURATION_JSON]
PositiveDuration = Annotated[
    Duration, BeforeValidator(_duration), AfterValidator(_positive), _plain_duration, _DURATION_JSON
]
Pools = Annotated[
    list[Literal[POOLS]],  # type: ignore[valid-type]
    BeforeValidator(one_or_more),
    AfterValidator(different),
]
Names = Annotated[list[str], BeforeValidator(one_or_more), AfterValidator(different)]
_RULES_JSON = WithJsonSchema({"type": "array", "items": {"type": "object"}})
FreezeRules = Annotated[
    tuple[Rule[bool], ...], BeforeValidator(_freeze_rules), PlainSerializer(_plain_rules), _RULES_JSON
]
NumberRules = Annotated[
    tuple[Rule[float], ...], BeforeValidator(_number_rules), PlainSerializer(_plain_rules), _RULES_JSON
]
Head = Annotated[list[Annotated[HeadLayer, BeforeValidator(_head_layer)]], AfterValidator(_head)]
Augment = Annotated[
    list[Annotated[Augmentation, BeforeValidator(_augmentation)]],
    BeforeValidator(_augment),
    AfterValidator(_augment_set),
]
