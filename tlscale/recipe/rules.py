"""Rules: an ordered list of regex -> value over parameter names.

Promise: `re.fullmatch`, first match wins, and a rule that matches no name at all is an error. One grammar for
freezing, learning-rate factors and weight decay, so that there is one thing to learn. (`re.match` and
`re.search`, which other frameworks use, make `bn1` hit `bn1.weight` and `layer1.0.bn1.weight` by accident.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from tlscale.errors import RecipeError, sentences, suggestion
from tlscale.recipe.matching import check_time
from tlscale.recipe.mistakes import InvalidValueError

V = TypeVar("V", bool, float)


@dataclass(frozen=True, slots=True)
class Rule(Generic[V]):
    """Give parameters whose whole name matches `pattern` the `value`."""

    pattern: str
    value: V

    def matches(self, name: str) -> bool:
        return re.fullmatch(self.pattern, name) is not None


def parse_rule(pattern: object, value: V) -> Rule[V]:
    """Return a rule whose pattern was checked to be a regular expression."""
    if not isinstance(pattern, str) or not pattern:
        remedy = "Write one in single quotes, such as 'layer[12]\\..*'."
        raise InvalidValueError("a rule's pattern is a regular expression on parameter names", remedy)
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        problem = f"{pattern!r} is not a regular expression: {error}"
        raise InvalidValueError(
            problem, "Put it in single quotes, and a backslash before each sign that is meant as it stands."
        ) from None
    return Rule(pattern, value)


def match_rules(rules: Sequence[Rule[V]], names: Iterable[str], where: str) -> dict[str, Rule[V]]:
    """Return which rule holds for which name, without the names that no rule matches.

    Args:
        rules: in order; the first that matches a name wins.
        where: the recipe key that the rules came from, for the message.

    Raises:
        RecipeError: a rule matches no name at all, or earlier rules take all of its names (names near it are shown);
            or one takes too long.
    """
    names = list(names)
    for rule in rules:
        check_time(rule.pattern, tuple(names), where)
    first = {name: next((rule for rule in rules if rule.matches(name)), None) for name in names}
    chosen = {name: rule for name, rule in first.items() if rule is not None}
    in_effect = set(map(id, chosen.values()))
    for rule in rules:
        if id(rule) not in in_effect:
            raise _no_effect(rule, names, where)
    return chosen


def _no_effect(rule: Rule[V], names: list[str], where: str) -> RecipeError:
    shadowed = [name for name in names if rule.matches(name)]
    if shadowed:
        problem = (
            f"the rule '{rule.pattern}' never acts: all {len(shadowed)} names that it matches (such as "
            f"'{shadowed[0]}') are taken by rules before it"
        )
        return RecipeError(problem, key=where, remedy="Move it up, or take it out.")
    longer = next((name for name in names if re.match(rule.pattern, name)), None)
    if longer is not None:
        problem = (
            f"the rule '{rule.pattern}' matches no whole parameter name (rules match whole names); '{longer}' only "
            "begins so"
        )
        return RecipeError(problem, key=where, remedy=f"Write '{rule.pattern}.*' to match all that begins so.")
    # Near names: those of the modules, which is what people misspell, rather than of single tensors.
    modules = {".".join(name.split(".")[:depth]) for name in names for depth in (1, 2)}
    plain = re.sub(r"\\\..*|[\\^$.*+?()\[\]{}|].*", "", rule.pattern)
    remedy = sentences(
        suggestion(plain or rule.pattern, modules),
        "The new head is never frozen." if where.endswith("freeze") else "",
        f"The top-level names are: {', '.join(sorted({name.split('.')[0] for name in names}))}.",
    )
    return RecipeError(f"the rule '{rule.pattern}' matches no parameter", key=where, remedy=remedy)
