"""Rules: whole names, first match wins, and no rule without effect."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlscale.errors import RecipeError
from tlscale.recipe.rules import Rule, match_rules, parse_rule

NAMES = ["conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "layer1.0.bn1.weight", "layer2.0.conv1.weight"]


def values(rules, names=NAMES):
    return {name: rule.value for name, rule in match_rules(rules, names, "freeze").items()}


def test_whole_names_only():
    assert values([parse_rule(r"bn1\..*", True)]) == {"bn1.weight": True}


def test_first_match_wins():
    rules = [parse_rule(r".*\.bn1\..*", False), parse_rule(r"layer1\..*", True)]
    assert values(rules) == {"layer1.0.conv1.weight": True, "layer1.0.bn1.weight": False}


def test_no_rules_match_nothing():
    assert values([]) == {}


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        (["layer3\\..*"], r"'layer3\..*' matches no parameter. Did you mean 'layer2' or 'layer1'"),
        (["layer1"], "'layer1.0.conv1.weight' only begins so. Write 'layer1.*'"),
        ([".*", "conv1.*"], "the rule 'conv1.*' never acts: all 1 names that it matches (such as 'conv1.weight')"),
        (["conv1.*", "conv1.*"], "never acts"),
    ],
)
def test_a_rule_without_effect_is_an_error(patterns, said):
    with pytest.raises(RecipeError) as caught:
        values([parse_rule(pattern, True) for pattern in patterns])
    assert said in str(caught.value)
    assert str(caught.value).startswith("freeze: the rule ")


@pytest.mark.parametrize("pattern", ["(", "", None, 3, "[a"])
def test_not_a_regular_expression(pattern):
    with pytest.raises(ValueError, match="regular expression"):
        parse_rule(pattern, True)


@given(st.lists(st.text("ab.", min_size=1, max_size=4), max_size=8), st.lists(st.text("ab.*", max_size=3), max_size=4))
def test_agrees_with_the_plain_definition(names, patterns):
    rules = []
    for number, pattern in enumerate(patterns):
        try:
            rules.append(Rule(pattern, float(number)) if re.compile(pattern) else None)
        except re.error:
            continue
    plain = {name: next((rule for rule in rules if re.fullmatch(rule.pattern, name)), None) for name in names}
    plain = {name: rule for name, rule in plain.items() if rule is not None}
    if {rule.value for rule in plain.values()} != {rule.value for rule in rules}:
        with pytest.raises(RecipeError):
            match_rules(rules, names, "optim.lr_rules")
    else:
        assert match_rules(rules, names, "optim.lr_rules") == plain
