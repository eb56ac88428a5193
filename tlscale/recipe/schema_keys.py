"""The schema as a list of keys: which there are, what each takes in plain words, and what was probably meant.

Promise: everything here is read off `Recipe`; messages and the reference page therefore say what the schema checks.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from tlscale.errors import suggestion
from tlscale.recipe.duration import Duration
from tlscale.recipe.field_types import Augmentation, HeadLayer, one_or_more
from tlscale.recipe.image_size import Side
from tlscale.recipe.rules import Rule
from tlscale.recipe.schema import Recipe, Section

SECRET = re.compile(r"api_?key|token|passw(or)?d|secret|credential", re.IGNORECASE)
# What other programs call it.
SYNONYMS = {
    "accumulation_steps": "compute.micro_batch_size",
    "amp": "compute.precision",
    "arch": "backbone.name",
    "classifier": "head",
    "dataset": "data",
    "distributed_type": "compute.engine",
    "epochs": "duration",
    "fsdp": "compute.engine",
    "grad_clip": "optim.clip_grad_norm",
    "img_size": "data.image_size",
    "learning_rate": "optim.lr",
    "lr_scheduler": "schedule",
    "max_epochs": "duration",
    "max_steps": "duration",
    "mixed_precision": "compute.precision",
    "mixup": "data.augment",
    "model": "backbone",
    "num_classes": "data.classes",
    "num_epochs": "duration",
    "num_workers": "data.workers",
    "optimizer": "optim",
    "pretrained": "backbone.weights",
    "scheduler": "schedule",
    "steps": "duration",
    "transform": "data.augment",
    "wd": "optim.weight_decay",
}


# Keys that mean another thing in each section.
_COMMON_NAMES = frozenset(
    ("action", "choose", "config", "decay", "entity", "every", "keep", "kind", "labels", "layer", "match", "mode")
    + ("name", "options", "path", "pool", "project", "revision", "run", "select", "source", "tags", "views", "weights")
)


@dataclass(frozen=True, slots=True)
class Key:
    """Describe one key of the recipe; `section` is set where it holds further keys."""

    path: tuple[str, ...]
    field: FieldInfo
    section: type[Section] | None
    in_list: bool = False
    """Tell whether it is a key of the items of a list, of which there may be several."""

    @property
    def dotted(self) -> str:
        return ".".join(self.path)

    @property
    def takes(self) -> str:
        """Return what values it takes, such as `a whole number from 1 to 1000`."""
        return describe(self.field.annotation, self.field.metadata)

    @property
    def takes_names(self) -> bool:
        """Return whether it takes a mapping from the user's own names."""
        return _inner(self.field.annotation, dict) is not None

    @property
    def description(self) -> str:
        return " ".join((self.field.description or "").split())

    def default(self) -> Any:  # noqa: ANN401 - any YAML value
        """Return its default as a plain YAML value; meaningless where the key is required."""
        value = self.field.get_default(call_default_factory=True)
        if isinstance(value, Duration):
            return str(value)
        return list(value) if isinstance(value, tuple) else value


@cache
def all_keys() -> dict[str, Key]:
    """Return `optim.lr` -> its key, sections included, in schema order."""
    return {key.dotted: key for key in _walk(Recipe, ())}


def _walk(section: type[Section], prefix: tuple[str, ...], *, in_list: bool = False) -> Iterator[Key]:
    for name, info in section.model_fields.items():
        inner = _section_in(info.annotation)
        yield Key((*prefix, name), info, inner, in_list)
        if inner is not None:
            are_items = in_list or _inner(info.annotation, list) is not None
            yield from _walk(inner, (*prefix, name), in_list=are_items)


def _section_in(annotation: Any) -> type[Section] | None:  # noqa: ANN401 - annotations have no common type
    """Return the section that a key holds, itself or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next((inner for part in get_args(annotation) if (inner := _section_in(part)) is not None), None)


def names_on(path: Sequence[str | int]) -> list[str]:
    """Return the keys on `path`, without the numbers of list items: `stages[1].lr` is `stages.lr`."""
    return [part for part in path if isinstance(part, str)]


def key_of(path: Sequence[str | int]) -> Key | None:
    """Return the deepest key on `path`; what is below it (list items, names in a mapping) is part of its value."""
    return split_path(path)[0]


def split_path(path: Sequence[str | int]) -> tuple[Key | None, Sequence[str | int]]:
    """Return the deepest key on `path`, and what of the path is below it."""
    found, rest, names = None, path, []
    for depth, part in enumerate(path, start=1):
        if isinstance(part, int):
            continue
        names.append(part)
        key = all_keys().get(".".join(names))
        if key is None:
            break
        found, rest = key, path[depth:]
    return found, rest


def type_at(path: Sequence[str | int]) -> tuple[Any, Sequence[Any]]:
    """Return the type of what may stand at `path`, which may go into lists and mappings, and its bounds."""
    key, rest = split_path(path)
    assert key is not None, f"no key on {path}"
    annotation, metadata = key.field.annotation, key.field.metadata
    for part in rest:
        annotation, metadata = _inner(annotation, list if isinstance(part, int) else dict), []
    return annotation, metadata


def members_of(annotation: Any) -> list[Any]:  # noqa: ANN401 - annotations have no common type
    """Return the types that a value may have, in order, without bounds and None."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return members_of(args[0])
    if origin in (Union, UnionType):
        return [inner for part in args if part is not NoneType for inner in members_of(part)]
    return [annotation]


def _inner(annotation: Any, kind: type) -> Any:  # noqa: ANN401 - annotations have no common type
    """Return what the list (or mapping) in `annotation` holds."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is kind:
        return args[-1]
    if origin in (Union, UnionType, Annotated):
        return next((inner for part in args if (inner := _inner(part, kind)) is not None), None)
    return None


def describe(annotation: Any, metadata: Sequence[Any] = ()) -> str:  # noqa: ANN401 - annotations have no common type
    """Describe a type with its bounds in plain words; none of them begins with a capital letter."""
    if annotation == HeadLayer:
        return "a head layer, such as relu or {linear: 256}"
    if annotation == Augmentation:
        return "an augmentation, such as flip or {crop: 0.5}"
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        own = [bound for item in args[1:] for bound in (item.metadata if isinstance(item, FieldInfo) else [item])]
        return describe(args[0], [*own, *metadata])
    if origin in (Union, UnionType):
        members = [part for part in args if part is not NoneType and not (part is int and float in args)]
        words = " or ".join(describe(part, metadata) for part in members)
        return f"{words}, or null" if NoneType in args else words
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}" if len(args) > 1 else f"'{args[0]}'"
    if origin is tuple and args[0] == Side:
        return "[height, width]"
    if origin is tuple:
        regex = "a regular expression, a list of them, or a list of {'regex': true | false}"
        return regex if args[0] == Rule[bool] else "a list of {'regex': number}"
    if origin is list and any(getattr(item, "func", None) is one_or_more for item in metadata):
        return f"{describe(args[0])}, or a list of such"
    if origin is list:
        least = next((item.min_length for item in metadata if hasattr(item, "min_length")), None)
        return f"a list, each item {describe(args[0])}" + (f", at least {least} of them" if least else "")
    if origin is dict:
        return f"a mapping from names to {describe(args[1])}"
    return _describe_simple(annotation, metadata)


def _describe_simple(annotation: Any, metadata: Sequence[Any]) -> str:  # noqa: ANN401 - annotations
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "a section (keys and values, one a line, indented below it)"
    if annotation is Duration:
        return "a duration: '10 epochs', '500 steps', '64000 images' or '5%'"
    if annotation is bool:
        return "true or false"
    if annotation in (int, float):
        noun = "a whole number" if annotation is int else "a number"
        return f"{noun}{_bounds(metadata)}"
    if annotation is str:
        pattern = next((item.pattern for item in metadata if getattr(item, "pattern", None)), None)
        return f"text of the form {pattern}" if pattern else "text"
    raise AssertionError(f"no words for the type {annotation!r}")


def _bounds(metadata: Sequence[Any]) -> str:
    """Describe bounds as ` from 0 to below 1`, ` of at least 1`, ` above 0`, or nothing."""
    found = {name: getattr(item, name) for item in metadata for name in ("ge", "gt", "le", "lt") if hasattr(item, name)}
    words = {"ge": "from", "gt": "from above", "le": "to", "lt": "to below"}
    if found.keys() <= {"ge"} or found.keys() <= {"gt"}:
        words = {"ge": "of at least", "gt": "above"}
    return "".join(f" {word} {_number(found[name])}" for name, word in words.items() if name in found)


def _number(value: float) -> str:
    return "2^63-1" if value == 2**63 - 1 else f"{value:g}" if isinstance(value, float) else str(value)


def unknown_key(path: Sequence[str]) -> tuple[str, str]:
    """Return problem and remedy of a key that the schema does not have; `path` is whole, its section exists."""
    name = path[-1]
    if SECRET.search(name):
        return "keys and passwords never belong in a recipe", "Log in as the service documents it, and take this out."
    siblings = _siblings(path)
    meant = suggestion(name, siblings) or _elsewhere(name)
    place = f"section '{'.'.join(path[:-1])}'" if path[1:] else "the top level"
    return "unknown key", meant or f"The keys of {place} are: {', '.join(siblings)}."


def _elsewhere(name: str) -> str:
    """Return the keys of other sections that have this name, or nearly; a name that fits anything tells nothing."""
    telling = {key.path[-1] for key in all_keys().values() if not key.in_list} - _COMMON_NAMES
    near = difflib.get_close_matches(name, telling, n=1, cutoff=0.8)
    places = [key.dotted for key in all_keys().values() if key.path[-1] in near and not key.in_list]
    if name.lower() in SYNONYMS:
        places = list(dict.fromkeys([SYNONYMS[name.lower()], *places]))
    return f"Did you mean {' or '.join(repr(place) for place in places[:3])}?" if places else ""


def near_siblings(path: Sequence[str]) -> list[str]:
    """Return keys of the same section that an unknown key may stand for."""
    return difflib.get_close_matches(path[-1], _siblings(path), n=3, cutoff=0.6)


def _siblings(path: Sequence[str]) -> list[str]:
    return [key.path[-1] for key in all_keys().values() if key.path[:-1] == tuple(path[:-1])]
