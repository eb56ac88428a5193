"""What is retired is read from run folders, ignored at its old default, and refused with its remedy otherwise."""

from __future__ import annotations

import pytest

from tlscale.errors import RecipeError
from tlscale.recipe import retired
from tlscale.recipe.load import load_recipe, load_stored_recipe
from tlscale.recipe.mistakes import Findings, Origin
from tlscale.recipe.retired import RETIRED, RetiredKey, RetiredValue, replace_retired
from tlscale.recipe.schema_keys import all_keys
from tlscale.recipe.yaml_text import read_yaml

TABLE = (
    RetiredKey("codes.squash", False, "Take it out: codes are not squashed any more."),
    RetiredKey("stages.tempo", 1, "Write schedule.warmup."),
    RetiredValue("non_finite.action", "rewind", "skip", "Write skip, which ends in the same weights."),
)


@pytest.fixture(autouse=True)
def table(monkeypatch):
    """Rows for the tests; those of the library come and go."""
    monkeypatch.setattr(retired, "RETIRED", TABLE)


def replaced(text, *, stored):
    findings = Findings()
    tree = read_yaml(text, lambda line: Origin("r.yaml", line), findings)
    tree, notes = replace_retired(tree, findings, stored=stored)
    return tree.plain(), notes, [str(problem) for problem in findings.mistakes]


@pytest.mark.parametrize("stored", [False, True])
def test_an_old_default_is_ignored(stored):
    text = "codes: {squash: false, views: 2}\nstages: [{tempo: 1}, {lr: 1.0}]\nnon_finite: {action: skip}\n"
    plain = {"codes": {"views": 2}, "stages": [{}, {"lr": 1.0}], "non_finite": {"action": "skip"}}
    assert replaced(text, stored=stored) == (plain, [], [])


def test_any_other_value_in_a_recipe_says_what_to_write():
    plain, notes, problems = replaced("codes: {squash: true}\nstages:\n- {tempo: 2}\n- {tempo: true}\n", stored=False)
    assert (plain, notes) == ({"codes": {}, "stages": [{}, {}]}, [])
    assert problems == [
        "r.yaml:1: codes.squash = true: retired. Take it out: codes are not squashed any more.",
        "r.yaml:3: stages.tempo = 2: retired. Write schedule.warmup.",
        "r.yaml:4: stages.tempo = true: retired. Write schedule.warmup.",
    ]
    plain, notes, problems = replaced("name: a\nnon_finite: {action: rewind}\n", stored=False)
    assert plain["non_finite"] == {"action": "skip"}, "nothing follows from it"
    assert problems == [
        "r.yaml:2: non_finite.action = 'rewind': retired. Write skip, which ends in the same weights.",
    ]


def test_a_run_folder_may_hold_it():
    plain, notes, problems = replaced("codes: {squash: true}\nnon_finite: {action: rewind}\n", stored=True)
    assert (plain, problems) == ({"codes": {}, "non_finite": {"action": "skip"}}, [])
    assert notes == [
        "codes.squash = true, as the run began, is retired: it has no effect",
        "non_finite.action = 'rewind', as the run began, is retired: read as 'skip'",
    ]


@pytest.mark.parametrize("text", ["codes: 3\n", "codes:\n", "codes: [1, 2]\n", "stages: {tempo: 1}\n", "3\n"])
def test_other_mistakes_are_left_to_the_schema(text):
    plain, notes, problems = replaced(text, stored=False)
    assert (notes, problems) == ([], [])
    assert plain == ({"stages": {}} if "tempo" in text else replaced(text, stored=True)[0])


GOOD = "name: a\ndata: {source: fashion_mnist}\nbackbone: {name: resnet18}\n"


def test_overrides_are_read_by_the_same_rules(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(GOOD)
    assert load_recipe(file, ["codes.squash=false"]) == load_recipe(file)
    with pytest.raises(RecipeError, match=r"codes\.squash=true: codes\.squash = true: retired\. Take it out"):
        load_recipe(file, ["codes.squash=true"])
    file.write_text(GOOD + "non_finite: {action: rewind}\ncodes: {squash: true}\n")
    stored = load_stored_recipe(file)
    assert (stored.recipe.non_finite.action, len(stored.notes)) == ("skip", 2)
    with pytest.raises(RecipeError, match="rewind"):  # what a user asks of a run folder is no part of it
        load_stored_recipe(file, ["non_finite.action=rewind"])


def test_rows_are_of_the_schema():
    for row in RETIRED:
        known = row.key in all_keys()
        assert known == isinstance(row, RetiredValue), f"{row.key}: a retired key is not in the schema, a value's is"
        assert row.remedy.endswith(".")
    for section, keys in retired.ADDED.items():
        assert {f"{section}.{key}" for key in keys} <= set(all_keys())
