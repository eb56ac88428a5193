"""Keys and defaults change only on purpose, and the reference page says what the schema says."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from tlscale.recipe.load import load_recipe
from tlscale.recipe.schema_keys import SYNONYMS, all_keys
from tlscale.recipe.validation import STAND_INS

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_recipe_reference", ROOT / "scripts/make_recipe_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_keys_and_defaults_are_frozen(script):
    frozen = json.loads(script.FROZEN.read_text())
    now = json.loads(script.frozen_text())
    changed = sorted(key for key in {*frozen, *now} if frozen.get(key) != now.get(key))
    assert not changed, (
        f"keys or defaults of the recipe changed: {changed}. Recipes of users depend on them. If it is meant, run "
        "`python scripts/make_recipe_reference.py --freeze` and add a line to CHANGELOG.md."
    )


def test_the_reference_is_up_to_date(script):
    assert script.REFERENCE.read_text(encoding="utf-8") == script.reference(), (
        "docs/recipe.md is not what the schema says; run `python scripts/make_recipe_reference.py`"
    )


def test_the_schema_for_editors_is_up_to_date(script):
    assert script.EDITOR_SCHEMA.read_text(encoding="utf-8") == script.editor_schema_text(), (
        "docs/recipe.schema.json is not what the schema says; run `python scripts/make_recipe_reference.py`"
    )


def test_the_example_of_the_reference_is_a_recipe(script, tmp_path):
    (tmp_path / "example.yaml").write_text(script.EXAMPLE)
    assert load_recipe(tmp_path / "example.yaml").optim.lr_rules[0].value == 0.1


def test_the_rules_of_the_reference_are_rules(script, tmp_path):
    block = script.HEAD.split("## Rules")[1].split("```yaml\n")[1].split("```")[0]
    file = tmp_path / "rules.yaml"
    numbers = []
    for line in block.splitlines():
        file.write_text(f"name: a\ndata: {{source: fashion_mnist}}\nbackbone: {{name: resnet18}}\n{line}\n")
        numbers.append(len(load_recipe(file).freeze))
    assert numbers == [1, 2, 2]


def test_every_key_is_described():
    for key in all_keys().values():
        assert re.search(r"[.:]$", key.description), f"{key.dotted} has no description that ends in a full stop"
        assert key.takes


def test_required_keys_have_stand_ins():
    assert {key.dotted for key in all_keys().values() if key.field.is_required()} == set(STAND_INS)


def test_synonyms_lead_to_keys():
    assert set(SYNONYMS.values()) <= set(all_keys())
    assert not set(SYNONYMS) & {key for key in all_keys()}
