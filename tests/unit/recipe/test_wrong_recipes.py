"""Every row of the table of wrong recipes gives its message, and nothing that merely follows from it."""

from __future__ import annotations

import re

import pytest

from tests.recipes.wrong_recipes import AT, GOOD, WRONG_RECIPES
from tlscale.errors import RecipeError
from tlscale.recipe.load import load_recipe
from tlscale.recipe.schema_keys import all_keys


@pytest.mark.parametrize(("text", "overrides", "fragments"), [row[1:] for row in WRONG_RECIPES],
                         ids=[row[0] for row in WRONG_RECIPES])  # fmt: skip
def test_message(text, overrides, fragments, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, overrides)
    message = str(caught.value)
    for fragment in fragments:  # as the command line has them
        assert fragment.replace(AT, str(file)).replace("command line: ", "overrides: ") in message
    if not any("mistakes in the recipe" in fragment for fragment in fragments):
        assert "\n" not in message, "one mistake, one line"
    assert "hunter2" not in message


def test_the_recipe_that_the_rows_spoil_is_right(tmp_path):
    (tmp_path / "recipe.yaml").write_text(GOOD)
    assert load_recipe(tmp_path / "recipe.yaml").name == "a"


def test_rows_have_ids_of_their_own():
    assert len({row[0] for row in WRONG_RECIPES}) == len(WRONG_RECIPES) >= 30


def test_each_key_of_the_schema_has_a_row():
    """Such as `{AT}:4: evaluate.folds = 1: must be` or `stages[1].lr: missing`."""
    fragments = [re.sub(r"\[\d+\]", "", fragment) for row in WRONG_RECIPES for fragment in row[3]]
    keys = [key.dotted for key in all_keys().values() if key.section is None]
    assert len(keys) > 100
    told = re.compile(r"(?:^|: )([a-z0-9_.]+)(?: =|:)")
    named = {match[1] for fragment in fragments for match in told.finditer(fragment)}
    assert [key for key in keys if key not in named] == []
