"""Every mistake of a recipe tree at once, in plain words.

Promise: a mistake is reported once, with where it was written, the key, the value and the remedy; what merely follows
from another mistake is not reported. pydantic stops at the first level that fails (a section's own check does not
run when one of its fields is wrong), so what is wrong is set aside and the rest is checked again.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError

from tlscale.errors import suggestion
from tlscale.recipe.mistakes import Findings, InvalidValueError, Origin
from tlscale.recipe.schema import Recipe
from tlscale.recipe.schema_keys import (
    SECRET,
    all_keys,
    describe,
    key_of,
    members_of,
    names_on,
    near_siblings,
    split_path,
    type_at,
    unknown_key,
)
from tlscale.recipe.yaml_text import Node

Path = tuple[str | int, ...]

# Values that are valid on their own, for required keys whose own value is missing or wrong.
STAND_INS: dict[str, Any] = {
    "name": "stand-in",
    "data": {"source": "fashion_mnist"},
    "data.source": "fashion_mnist",
    "backbone": {"name": "stand-in"},
    "backbone.name": "stand-in",
    "adapters.lora": {"layers": ".*"},
    "adapters.lora.layers": ".*",
    "distill.teacher.name": "stand-in",
    "stages.duration": "1 steps",
}
_NUMBER = re.compile(r"[-+]?[0-9.]+([eE][-+]?[0-9]+)?")
_MAX_PASSES = 50  # a pass sets at least one key aside, so few recipes need more than five
_MOST_HINTS = 50  # what was meant is looked up for no more mistakes, as that takes a millisecond each
_SHOWN_CHARS = 60


def check_recipe(tree: Node, findings: Findings) -> Recipe | None:
    """Return the recipe that `tree` holds, or None after adding what is wrong with it to `findings`."""
    plain = tree.plain()
    set_aside = set(findings.lost_keys)
    for _ in range(_MAX_PASSES):
        try:
            recipe = Recipe.model_validate(plain)
        except ValidationError as error:
            groups = _by_place(error, tree)
        else:
            return recipe if not findings.mistakes else None
        fields = {place: kinds for place, kinds in groups.items() if not _is_section(place, kinds)}
        for place, mistakes in fields.items():
            _report_field(place, mistakes, tree, set_aside, findings)
            _set_aside(place, plain, set_aside)
        if not fields:
            for place, mistakes in groups.items():
                told_by = _report_section(place, mistakes[0], tree, set_aside, findings)
                if not told_by:
                    return None  # about the recipe as a whole: nothing is left to set aside
                _set_aside(told_by, plain, set_aside)
    return None


def _by_place(error: ValidationError, tree: Node) -> dict[Path, list[Any]]:
    """Group pydantic's errors by the place in the tree that they are about; of nested places the deepest."""
    groups: dict[Path, list[Any]] = {}
    for mistake in error.errors(include_url=False, include_input=False):
        place = _place(mistake["loc"], mistake["type"], tree)
        groups.setdefault(place, []).append(mistake)
    above = {place[:depth] for place in groups for depth in range(len(place))}
    return {place: mistakes for place, mistakes in groups.items() if _is_section(place, mistakes) or place not in above}


def _place(loc: Sequence[str | int], kind: str, tree: Node) -> Path:
    """Return `loc` without the names that pydantic puts in for the members of a union."""
    place: list[str | int] = []
    node = tree
    for part in loc:
        if (inner := _child(node, part)) is not None:
            place.append(part)
            node = inner
    return (*place, loc[-1]) if kind == "missing" else tuple(place)


def _child(node: Node, part: str | int) -> Node | None:
    if isinstance(node.value, dict):
        return node.value.get(str(part))
    if isinstance(node.value, list) and isinstance(part, int) and part < len(node.value):
        return node.value[part]
    return None


def _is_section(place: Path, mistakes: list[Any]) -> bool:
    """Return whether it is a mistake between the keys of a section, not of one value."""
    key = all_keys().get(".".join(names_on(place)))
    return mistakes[0]["type"] == "value_error" and (not place or (key is not None and key.section is not None))


def _at(place: Path, tree: Node) -> tuple[Node, bool]:
    """Return the value at `place` and True, or the nearest that holds it and False."""
    node = tree
    for part in place:
        inner = _child(node, part)
        if inner is None:
            return node, False
        node = inner
    return node, True


def origin_at(dotted: str, tree: Node) -> Origin:
    """Return where `optim.lr` or `stages[0].lr` was written, or what holds it."""
    parts = re.findall(r"[^.\[\]]+", dotted)
    return _at(tuple(int(part) if part.isdecimal() else part for part in parts), tree)[0].origin


def _report_field(place: Path, mistakes: list[Any], tree: Node, set_aside: set[str], findings: Findings) -> None:
    kinds = {mistake["type"] for mistake in mistakes}
    dotted = _dotted(place)
    origin = _at(place, tree)[0].origin
    if "missing" in kinds:
        if not findings.incomplete and str(place[-1]) not in set_aside and not _is_misspelt(place, tree):
            findings.add(origin, "missing", _where_to_add(place), key=dotted)
    elif "extra_forbidden" in kinds:
        if len(findings.mistakes) < _MOST_HINTS:
            findings.add(origin, *unknown_key(names_on(place)), key=dotted)
            set_aside.update(near_siblings(names_on(place)))
        else:
            findings.add(origin, "unknown key", key=dotted)
    else:
        value = _at(place, tree)[0].plain()
        findings.add(origin, *_wrong_value(place, mistakes[0], value), key=dotted, value=show_value(place, value))


def _dotted(place: Path) -> str:
    """Return `data.classes[2]`, items counted from 0."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")


def _is_misspelt(place: Path, tree: Node) -> bool:
    """Return whether an unknown key next to it is near to it, and is reported already."""
    siblings = _at(place[:-1], tree)[0].value
    assert isinstance(siblings, dict), "pydantic found a key missing in it"
    prefix = names_on(place[:-1])
    unknown = [name for name in siblings if ".".join([*prefix, name]) not in all_keys()]
    return any(place[-1] in near_siblings([*prefix, name]) for name in unknown[:_MOST_HINTS])


def _where_to_add(place: Path) -> str:
    names = names_on(place)
    key = all_keys()[".".join(names)]
    if key.section is not None:
        needed = [f"{name}: ..." for name, field in key.section.model_fields.items() if field.is_required()]
        return f"Add a section '{place[-1]}:' with at least '{', '.join(needed)}' below it."
    below = f"below '{names[-2]}:'" if names[1:] else "at the top level"
    return f"Add '{place[-1]}: ...' {below}; it takes {key.takes}."


def is_same_value(one: object, other: object) -> bool:
    """Return whether two plain values are the same; true is not 1."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def show_value(place: Path, value: object) -> str:
    """Return the value as in a recipe, on one line and short; never what looks like a secret."""
    if place and SECRET.search(str(place[-1])):
        return "..."
    shown = _flow(value)
    return shown if len(shown) <= _SHOWN_CHARS else f"{shown[: _SHOWN_CHARS - 3]}..."


def _flow(value: object) -> str:
    if isinstance(value, dict):
        inside = (f"{name}: {'...' if SECRET.search(name) else _flow(item)}" for name, item in value.items())
        return f"{{{', '.join(inside)}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_flow, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)


def _wrong_value(place: Path, mistake: Any, value: object) -> tuple[str, str | None]:  # noqa: ANN401 - pydantic's error details
    """Return problem and remedy of one value."""
    if mistake["type"] == "value_error":
        error = mistake["ctx"]["error"]
        return (error.problem, error.remedy) if isinstance(error, InvalidValueError) else (str(error), None)
    return f"must be {describe(*type_at(place))}", _hint(place, value)


def _hint(place: Path, value: object) -> str | None:
    """Return what probably went wrong, from what was wanted and what was written."""
    key, kinds = key_of(place), members_of(type_at(place)[0])
    if key is not None and key.section is not None and value is None:
        return "Take the empty section out, or write a key below it."
    if bool in kinds and value in ("yes", "no", "on", "off", "True", "False", "y", "n"):
        return "Only true and false, in lower case and without quotes, are booleans."
    if str in kinds and isinstance(value, int | float):
        return "Put it in quotes."
    if not {int, float}.isdisjoint(kinds) and isinstance(value, str) and _NUMBER.fullmatch(value):
        return "Take the quotes off."
    if any(get_origin(kind) is list for kind in kinds) and not isinstance(value, list | dict) and value is not None:
        return f"Write [{value}]."
    choices = [str(choice) for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if choices and isinstance(value, str):
        return suggestion(value, choices)
    return None


def _report_section(place: Path, mistake: Any, tree: Node, set_aside: set[str], findings: Findings) -> Path:  # noqa: ANN401
    """Report a mistake between keys, unless it is about one that was set aside; return the key to set aside."""
    error = mistake["ctx"]["error"]
    assert isinstance(error, InvalidValueError), f"a check of a section that names no keys: {error!r}"
    named = [(*place, *key.split(".")) for key in error.keys]
    told_by = next((path for path in named if _at(path, tree)[1]), place)
    known = not {path[-1] for path in named}.isdisjoint(set_aside)
    if not known and not findings.incomplete:
        findings.add(_at(told_by, tree)[0].origin, error.problem, error.remedy, key=_dotted(named[0]))
    return told_by


def _set_aside(place: Path, plain: dict[str, Any], set_aside: set[str]) -> None:
    """Take the value out of `plain`, or put one in that passes, and remember that the key has no meaning now."""
    key, rest = split_path(place)
    path = place if key is None or key.section is not None else place[: len(place) - len(rest)]
    while isinstance(path[-1], int):  # an item that is no section: the list says nothing then
        path = path[:-1]
    holder: Any = plain
    for part in path[:-1]:
        if isinstance(holder, dict) and part not in holder:
            return  # what holds it was set aside with a mistake before
        holder = holder[part]
    holder.pop(path[-1], None)
    dotted = ".".join(names_on(path))
    if dotted in STAND_INS:
        holder[path[-1]] = copy.deepcopy(STAND_INS[dotted])
    if dotted in all_keys():
        set_aside.add(str(path[-1]))
