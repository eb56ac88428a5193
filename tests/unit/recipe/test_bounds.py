"""No number of a recipe is without bounds, no key without effect passes, and no recipe takes long to be refused."""

from __future__ import annotations

import threading
import time
from typing import Any, get_args

import pytest

from tests.recipes.wrong_recipes import GOOD
from tlscale.errors import RecipeError
from tlscale.recipe.load import load_recipe, load_stored_recipe
from tlscale.recipe.matching import is_quick
from tlscale.recipe.rules import match_rules, parse_rule
from tlscale.recipe.schema_keys import all_keys, members_of

HUGE = (1e300, 10**400, -1)
FREE = {"optim.options": "the optimizer checks its own arguments"}


def numbers_in(annotation: Any) -> bool:
    return any(kind in (int, float) or numbers_in_args(kind) for kind in members_of(annotation))


def numbers_in_args(kind: Any) -> bool:
    return any(part in (int, float) or numbers_in_args(part) for part in get_args(kind))


NUMERIC = [key for key in all_keys().values() if key.section is None and numbers_in(key.field.annotation)]


def write(tmp_path, text: str):
    file = tmp_path / "recipe.yaml"
    file.write_text(GOOD + text)
    return file


def refused(tmp_path, text: str, overrides=()) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, text), overrides)
    return str(caught.value)


@pytest.mark.parametrize("key", NUMERIC, ids=lambda key: key.dotted)
def test_every_number_has_bounds(key, tmp_path):
    if key.dotted in FREE:
        pytest.skip(FREE[key.dotted])
    for number in HUGE:
        for shape in (number, [number], {"x": number}, [{"x": number}]):
            (tmp_path / "recipe.yaml").write_text(with_value(key.path, shape))
            with pytest.raises(RecipeError, match=key.path[-1]):
                load_recipe(tmp_path / "recipe.yaml")


def with_value(path, value) -> str:
    """The text of a recipe with this value of a key."""
    for name in reversed(path[1:]):
        value = {name: value}
    plain: dict[str, Any] = {"name": "a", "data": {"source": "fashion_mnist"}, "backbone": {"name": "resnet18"}}
    plain[path[0]] = {**plain.get(path[0], {}), **value} if path[1:] else value
    return flow(plain)


def flow(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {flow(item)}" for name, item in value.items()) + "}"
    return f"[{', '.join(map(flow, value))}]" if isinstance(value, list) else str(value)


DURATIONS = ["duration", "evaluate.every", "checkpoint.every", "log_every", "schedule.warmup"]


@pytest.mark.parametrize("key", DURATIONS)
def test_every_duration_has_bounds(key, tmp_path):
    said = refused(tmp_path, "", [f"{key}=1{'0' * 200} steps"])
    assert "more than 1,000,000,000,000,000 steps" in said


STAGED = "stages: [{duration: 1 epochs, lr: 1.0, layer_decay: 0.5, schedule: {decay: linear}}]\n"
IDLE = {
    "codes.dtype": "codes: {keep: never, dtype: float16}",
    "codes.memory_mib": "codes: {keep: never, memory_mib: 3}",
    "codes.cache_gib": "codes: {keep: never, cache_gib: 3}",
    "codes.disk_gib": "codes: {keep: always, disk_gib: 3}",
    "freeze": "freeze: [{'layer1.*': true}, {'layer2.*': false}]",
    "stages[1].freeze": "stages: [{duration: 1 epochs}, {duration: 1 epochs, freeze: [{'a': false}]}]",
    "optim.lr": STAGED + "optim: {lr: 0.1}",
    "optim.layer_decay": STAGED + "optim: {layer_decay: 0.9}",
    "schedule": STAGED + "schedule: {warmup: 0%}",
    "optim.decay_norm_and_bias": "optim: {weight_decay: 0, decay_norm_and_bias: true}",
    "loss.class_weights": "loss: {class_weights: {a: 2, b: 2.0}}",
}


@pytest.mark.parametrize("key", IDLE)
def test_a_key_without_effect_is_refused(key, tmp_path):
    said = refused(tmp_path, IDLE[key] + "\n")
    assert f"{key}: has no effect" in said
    assert "\n" not in said
    assert ":4: " in said or ":5: " in said, "the line of the key"


@pytest.mark.parametrize("key", IDLE)
def test_a_run_with_a_key_without_effect_is_still_read(key, tmp_path):
    assert load_stored_recipe(write(tmp_path, IDLE[key] + "\n")).recipe.name == "a"


DEFAULTS = [
    "codes: {keep: never, dtype: auto, disk_gib: 20, memory_mib: 4096, cache_gib: 50.0}",
    "codes: {keep: always, disk_gib: 20.0}",
    STAGED + "optim: {lr: 0.001, layer_decay: null}\nschedule: {warmup: 5%}",
    "optim: {weight_decay: 0, decay_norm_and_bias: false}",
    "freeze: [{'layer1.*': false}, {'.*': true}]",
    "loss: {class_weights: none}",
]


@pytest.mark.parametrize("text", DEFAULTS)
def test_a_key_at_its_default_is_no_mistake(text, tmp_path):
    load_recipe(write(tmp_path, text + "\n"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("loss: {name: focal}", "loss.name: unknown key. The keys of section 'loss' are: "),
        ("codes: {folds: 5}", "codes.folds: unknown key. Did you mean 'evaluate.folds'?"),
        ("optim: {batch_size: 5}", "optim.batch_size: unknown key. Did you mean 'batch_size' or"),
        ("optim: {crop_pc: 5}", "optim.crop_pc: unknown key. Did you mean 'data.crop_pct'?"),
    ],
)
def test_a_suggestion_is_of_what_may_have_been_meant(text, said, tmp_path):
    assert said in refused(tmp_path, text + "\n")


def test_20000_unknown_keys_are_refused_soon(tmp_path):
    few, many = ("".join(f"unknown_{i}: 1\n" for i in range(count)) for count in (400, 4000))
    began = time.process_time()
    refused(tmp_path, few)
    of_few = time.process_time() - began
    said = refused(tmp_path, many)
    assert time.process_time() - began - of_few < 40 * of_few, "in proportion to their number, not to its square"
    assert "4000 mistakes in the recipe" in said
    assert said.endswith("and 3,900 more")


NAMES = [f"layer{i}.{j}.conv{k}.weight" for i in range(4) for j in range(9) for k in range(3)]


@pytest.mark.parametrize("where", ["main thread", "thread"])
def test_an_expression_that_takes_for_ever_is_refused(where, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tlscale.recipe.matching.LIMIT_S", 0.5)
    caught: list[BaseException] = []

    def match():
        try:
            match_rules([parse_rule(rf"(.*)*{where[0]}!", True)], NAMES, "freeze")
        except RecipeError as error:
            caught.append(error)

    if where == "thread":
        thread = threading.Thread(target=match)
        thread.start()
        thread.join()
    else:
        match()
    assert "takes more than 0.5 s to match 108 names" in str(caught[0])
    assert str(caught[0]).startswith("freeze: the rule")


@pytest.mark.parametrize(
    "pattern", [r"(?!.*conv1)(layer[12])\..*", r"(layer1|layer2)(\.\w+)+", r"(?<=x)?.*(\d)\.conv\1.*"]
)
def test_what_may_take_long_and_does_not_is_matched(pattern):
    assert match_rules([parse_rule(pattern, True)], NAMES, "freeze")


@pytest.mark.parametrize("pattern", [r".*", r"layer[1-3]\..*", r"(conv1|bn1)\..*", r"a\.[*+(]*b\*\+", r"x{3}"])
def test_usual_expressions_start_no_process(pattern):
    assert is_quick(pattern)


@pytest.mark.parametrize("pattern", ["(" * 5000 + ")" * 5000, "x{99999999999999999999}"])
def test_an_expression_that_cannot_be_compiled_is_an_error_of_its_own(pattern):
    with pytest.raises(ValueError, match="not a regular expression"):
        parse_rule(pattern, True)
