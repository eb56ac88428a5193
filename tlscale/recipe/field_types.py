"""Check the kinds of values that a recipe's keys take: durations, rules, head layers, augmentations, names.

Promise: each type checks and normalises what YAML gives, with a message that names what would be right, and gives plain
YAML values back. `schema` assigns them to keys.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, PlainSerializer, WithJsonSchema

from tlscale.errors import sentences, suggestion
from tlscale.recipe.duration import FORM as _DURATION_FORM
from tlscale.recipe.duration import Duration, parse_duration
from tlscale.recipe.mistakes import InvalidValueError
from tlscale.recipe.rules import Rule, parse_rule

MOST_OF_A_RULE = 1e6
HeadLayer = str | dict[str, int | float]
Augmentation = str | dict[str, float]


@dataclass(frozen=True)
class Number:
    """Describe the number that a head layer or an augmentation takes."""

    meaning: str
    lowest: float  # allowed
    highest: float  # allowed too, but not with `is_below`
    default: float | None = None  # of an augmentation that is named without its number
    is_below: bool = False
    is_whole: bool = False
    is_required: bool = False  # the name alone means nothing

    def takes(self, number: float) -> bool:
        """Return whether a number is allowed."""
        is_in_range = self.lowest <= number < self.highest if self.is_below else self.lowest <= number <= self.highest
        return is_in_range and (isinstance(number, int) or not self.is_whole)

    def json_schema(self) -> dict[str, Any]:
        most = {"exclusiveMaximum" if self.is_below else "maximum": self.highest}
        what = {"type": "integer" if self.is_whole else "number", "description": str(self)}
        return {**what, "minimum": self.lowest, **most}

    def __str__(self) -> str:
        kind, to = "a whole number, " if self.is_whole else "", "below " if self.is_below else ""
        return f"the {self.meaning}, {kind}from {self.lowest:g} to {to}{self.highest:g}"


@dataclass(frozen=True)
class HeadLayerKind:
    """Describe a kind of layer that heads are made of: what it is, and the number that it takes, if any."""

    about: str
    number: Number | None = None


# A new layer is a row here and one in `tlscale.models.heads.LAYERS`; a test compares the rows.
HEAD_LAYERS: dict[str, HeadLayerKind] = {
    "linear": HeadLayerKind("fully connected", Number("width", 1, 65536, is_whole=True)),
    "dropout": HeadLayerKind("dropout", Number("probability", 0.0, 1.0, is_below=True, is_required=True)),
    "relu": HeadLayerKind("activation"),
    "gelu": HeadLayerKind("activation"),
    "silu": HeadLayerKind("activation"),
    "tanh": HeadLayerKind("activation"),
    "leaky_relu": HeadLayerKind("activation"),
    "hardswish": HeadLayerKind("activation"),
    "elu": HeadLayerKind("activation"),
    "layernorm": HeadLayerKind("normalisation"),
    "batchnorm": HeadLayerKind("normalisation"),
}
# A new augmentation is a row here and one in `tlscale.data.transforms`; None: it takes no number.
AUGMENTATIONS: dict[str, Number | None] = {
    "flip": Number("probability of a left-right flip", 0.0, 1.0, default=0.5),
    "vertical_flip": Number("probability of a top-bottom flip", 0.0, 1.0, default=0.5),
    "crop": Number("least share of the image's area that a crop keeps", 0.01, 1.0, default=0.35),
    "rotation": Number("most degrees to either side", 0.0, 180.0, default=15.0),
    "color_jitter": Number("largest change of brightness, contrast and saturation, as a share", 0.0, 1.0, default=0.4),
    "trivialaugment": None,
    "trivialaugment_geometric": None,
    "randaugment": Number("magnitude of each of the two operations", 0.0, 30.0, default=9.0),
    "blur": Number("probability of a Gaussian blur", 0.0, 1.0, default=0.5),
    "erasing": Number("probability that a rectangle is erased", 0.0, 1.0, default=0.25),
    "mixup": Number("alpha of the Beta distribution", 0.01, 10.0, default=0.2),
    "cutmix": Number("alpha of the Beta distribution", 0.01, 10.0, default=1.0),
}
# Each moves and colors an image by draws of its own: one of them.
_POLICIES = ("trivialaugment", "trivialaugment_geometric", "randaugment")
VIEWS = ("flip", "vertical_flip", "five_crop")
POOLS = ("avg", "max", "avgmax", "token", "none")
TRACKERS = ("wandb", "tensorboard", "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "trackio")


def _freeze_rules(value: object) -> tuple[Rule[bool], ...]:
    """Read one regex, a list of them, or a list of `{regex: true | false}`, in order."""
    rules: list[Rule[bool]] = []
    for item in value if isinstance(value, list | tuple) else [value]:
        if isinstance(item, Rule):
            rules.append(item)
        elif isinstance(item, dict):
            for pattern, frozen in item.items():
                if not isinstance(frozen, bool):
                    raise InvalidValueError(f"a freeze rule's value is true (freeze) or false (train), not {frozen!r}")
                rules.append(parse_rule(pattern, frozen))
        else:
            rules.append(parse_rule(item, True))
    return tuple(rules)


def _number_rules(value: object) -> tuple[Rule[float], ...]:
    """Read a list of `{regex: number}`, in order (a mapping is such a list)."""
    rules: list[Rule[float]] = []
    for item in value if isinstance(value, list | tuple) else [value]:
        if isinstance(item, Rule):
            rules.append(item)
            continue
        if not isinstance(item, dict):
            raise InvalidValueError("rules are a list of 'regex: number'", "Write [{'layer4\\..*': 0.1}], for example.")
        for pattern, number in item.items():
            if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number <= MOST_OF_A_RULE:
                raise InvalidValueError(f"a rule's value is a number from 0 to {MOST_OF_A_RULE:g}, not {number!r}")
            rules.append(parse_rule(pattern, float(number)))
    return tuple(rules)


def _named_number(item: object, what: str) -> tuple[str, Any]:
    """Return `name` or `{name: number}` as (name, number or None)."""
    if isinstance(item, str):
        return item, None
    if isinstance(item, dict) and len(item) == 1:
        name, number = next(iter(item.items()))
        if isinstance(name, str) and isinstance(number, int | float) and not isinstance(number, bool):
            return name, number
    raise InvalidValueError(f"{what} is a name or one '{{name: number}}', not {item!r}")


def _named(what: str, item: object, known: Mapping[str, Number | None]) -> tuple[str, int | float | None]:
    """Return the name and number of a head layer or an augmentation, checked."""
    name, number = _named_number(item, f"{'an' if what[0] == 'a' else 'a'} {what}")
    if name not in known:
        remedy = sentences(suggestion(name, known), f"There are: {', '.join(known)}.")
        raise InvalidValueError(f"unknown {what} '{name}'", remedy)
    wanted = known[name]
    if wanted is None:
        if number is not None:
            raise InvalidValueError(f"'{name}' takes no number", f"Write {name}.")
    elif number is None:
        if wanted.is_required:
            raise InvalidValueError(f"'{name}' takes {wanted}", f"Write {{{name}: NUMBER}}.")
    elif not wanted.takes(number):
        raise InvalidValueError(f"'{name}' takes {wanted}, not {number!r}")
    return name, number


def _head_layer(item: object) -> HeadLayer:
    name, number = _named("head layer", item, {name: kind.number for name, kind in HEAD_LAYERS.items()})
    return name if number is None else {name: number}


def _head(layers: list[HeadLayer]) -> list[HeadLayer]:
    if not layers or layers[-1] != "linear":
        raise InvalidValueError(
            "a head ends in 'linear', which takes the number of classes", "Write linear as the last."
        )
    if "linear" in layers[:-1]:
        raise InvalidValueError("only the last 'linear' may go without a width", "Write {linear: 256}, for example.")
    return layers


def _augmentation(item: object) -> Augmentation:
    name, number = _named("augmentation", item, AUGMENTATIONS)
    return name if number is None else {name: float(number)}


def augmentation_values(augment: list[Augmentation]) -> dict[str, float | None]:
    """Return `[flip, {mixup: 0.3}]` as `{'flip': 0.5, 'mixup': 0.3}`, with defaults; None where there is no number."""
    values: dict[str, float | None] = {}
    for item in augment:
        name, number = _named_number(item, "an augmentation")
        wanted = AUGMENTATIONS[name]
        values[name] = wanted.default if number is None and wanted is not None else number
    return values


def _augment_set(items: list[Augmentation]) -> list[Augmentation]:
    names = list(augmentation_values(items))
    if len(names) != len(items):
        raise InvalidValueError("an augmentation is named twice", "Name each once.")
    if len(policies := [name for name in _POLICIES if name in names]) > 1:
        raise InvalidValueError(f"{' and '.join(policies)} are policies for the same thing", "Name one.")
    return items


def run_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
        raise InvalidValueError(
            "a name has 1 to 100 letters, digits, '.', '_' or '-', and begins with a letter or digit"
        )
    return name


def weights_place(weights: str) -> str:
    if not weights:
        raise InvalidValueError("empty", "Write pretrained, bundled, none or the path of a file.")
    if weights == "run:":
        raise InvalidValueError("names no run", "Write the folder of a finished run behind it: run:runs/NAME.")
    return weights


def one_or_more(value: object) -> object:
    """Read one name as a list of it."""
    return [value] if isinstance(value, str) else value


def different(names: list[str]) -> list[str]:
    if not names:
        raise InvalidValueError("empty", "Name at least one.")
    if len(set(names)) != len(names):
        raise InvalidValueError("a name is given twice", "Name each once.")
    return names


def _positive(duration: Duration) -> Duration:
    if duration.amount <= 0:
        raise InvalidValueError("must be more than 0")
    return duration


def _one_or_list(item: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [item, {"type": "array", "items": item}]}


def _mapping_to(value: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": value}


def _named_json(known: Mapping[str, Number | None]) -> dict[str, Any]:
    """Return the JSON Schema of `name` or `{name: number}`."""
    names = [name for name, number in known.items() if number is None or not number.is_required]
    numbers = {name: number.json_schema() for name, number in known.items() if number is not None}
    one = {"type": "object", "properties": numbers, "additionalProperties": False, "minProperties": 1}
    return {"anyOf": [{"enum": names}, {**one, "maxProperties": 1}]}


# What editors complete and check; a shorthand that a validator reads is allowed there, too.
_DURATION_JSON = WithJsonSchema(
    {
        "type": "string",
        "pattern": rf"^{_DURATION_FORM.pattern}$",
        "examples": ["10 epochs", "500 steps", "64000 images", "5%"],
    }
)
_plain_duration = PlainSerializer(str, return_type=str)
AnyDuration = Annotated[Duration, BeforeValidator(parse_duration), _plain_duration, _DURATION_JSON]
PositiveDuration = Annotated[AnyDuration, AfterValidator(_positive)]
Pools = Annotated[
    list[Literal[POOLS]],  # type: ignore[valid-type]
    BeforeValidator(one_or_more),
    AfterValidator(different),
    WithJsonSchema(_one_or_list({"enum": list(POOLS)})),
]
Names = Annotated[
    list[str],
    BeforeValidator(one_or_more),
    AfterValidator(different),
    WithJsonSchema(_one_or_list({"type": "string"})),
]
_plain_rules = PlainSerializer(lambda rules: [{rule.pattern: rule.value} for rule in rules])
_FREEZE_JSON = WithJsonSchema(_one_or_list({"anyOf": [{"type": "string"}, _mapping_to({"type": "boolean"})]}))
_RULES_JSON = WithJsonSchema(_one_or_list(_mapping_to({"type": "number", "minimum": 0, "maximum": MOST_OF_A_RULE})))
FreezeRules = Annotated[tuple[Rule[bool], ...], BeforeValidator(_freeze_rules), _plain_rules, _FREEZE_JSON]
NumberRules = Annotated[tuple[Rule[float], ...], BeforeValidator(_number_rules), _plain_rules, _RULES_JSON]
Head = Annotated[
    list[
        Annotated[
            HeadLayer,
            BeforeValidator(_head_layer),
            WithJsonSchema(_named_json({name: kind.number for name, kind in HEAD_LAYERS.items()})),
        ]
    ],
    AfterValidator(_head),
]
Augment = Annotated[
    list[Annotated[Augmentation, BeforeValidator(_augmentation)]],
    BeforeValidator(lambda value: [] if value == "none" or value is None else value),
    AfterValidator(_augment_set),
    WithJsonSchema(
        {"anyOf": [{"enum": ["none"]}, {"type": "null"}, {"type": "array", "items": _named_json(AUGMENTATIONS)}]}
    ),
]
