"""The JSON Schema for editors takes what the recipe's own check takes, and refuses what it can see to be wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest
from click.testing import CliRunner

from tlscale.cli import main
from tlscale.recipe.editor_schema import editor_schema
from tlscale.recipe.load import parse_recipe
from tlscale.recipe.mistakes import Findings, Origin
from tlscale.recipe.shipped import shipped_recipes
from tlscale.recipe.yaml_text import read_yaml

ROOT = Path(__file__).resolve().parents[3]
WHOLE = "name: a\ndata: {source: folder, path: x%s}\nbackbone: {name: resnet18}\n"
# Shorthand, and one of each kind of value.
RIGHT = [
    "freeze: 'a.*'",
    "freeze: ['a.*', 'b.*']",
    "freeze: {'a.*': false, '.*': true}",
    "freeze: [{'a.*': false}, '.*']",
    "duration: 1_000 steps",
    "duration: 2.5 Epochs",
    "head: [{linear: 256}, relu, {dropout: 0.2}, batchnorm, linear]",
    "codes: {layer: layer3}\nprobe: {}",
    "codes: {layer: [layer3, penultimate], pool: [avg, max]}\nprobe: {kind: knn, neighbours: [1, 5]}",
    "codes: {pool: max, layer: layer3}\nprobe: {strengths: [1e-3, 1]}",
    "optim: {lr: 1e-3, lr_rules: [{'a.*': 0.1}, {'b.*': 2}], weight_decay_rules: {'.*': 0}}",
    "optim: {options: {betas: [0.9, 0.95], momentum: 0.9, nesterov: true}, layer_decay: null}",
    "schedule: {warmup: 5%, decay: step, step_every: 3 epochs, step_factor: 0.1}",
    "stages: [{freeze: '.*', duration: 1 epochs}, {duration: 2 steps, schedule: {warmup: 0 steps}}]",
    "loss: {class_weights: balanced}",
    "loss: {class_weights: {cat: 2, dog: 0.5}}",
    "distill: {run: runs/a, match: {penultimate: [layer3, penultimate]}, logits: 1}",
    "distill: {teacher: {name: resnet50}, match: {penultimate: layer3}}",
    "track: [wandb]\nwandb: {project: x}",
    "codes: {fold_norm: false}",
]
RIGHT_DATA = [", augment: none", ", augment: null", ", augment: [flip, {crop: 0.5}, {mixup: 1}]", ", classes: [a, b]"]
WRONG = [
    "learning_rate: 1e-3",
    "optim: {learning_rate: 1e-3}",
    "optim: {lr: fast}",
    "optim: {lr: -1}",
    "optim: {lr_rules: ['a.*']}",
    "freeze: [{'a.*': 1}]",
    "duration: 10",
    "head: [{dropout: 1.0}, linear]",
    "head: [dropout, linear]",
    "head: [relux, linear]",
    "codes: {pool: [mean]}",
    "codes: {fold_norm: true}",
    "schedule: {decay: cosin}",
    "stages: [{freeze: '.*'}]",
    "batch_size: 12.5",
]


@pytest.fixture(scope="module")
def checker():
    schema = editor_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def plain(text):
    findings = Findings()
    tree = read_yaml(text, lambda line: Origin("text", line), findings)
    assert not findings.mistakes
    return tree.plain()


def recipe(line):
    return WHOLE % line + "" if line.startswith(",") else WHOLE % "" + line + "\n"


@pytest.mark.parametrize("line", RIGHT + RIGHT_DATA)
def test_what_a_recipe_may_say_is_taken(line, checker):
    parse_recipe(recipe(line), "text")
    checker.validate(plain(recipe(line)))


@pytest.mark.parametrize("line", WRONG)
def test_what_is_wrong_is_refused(line, checker):
    assert not checker.is_valid(plain(recipe(line)))


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_recipes_that_ship_are_taken_and_unknown_keys_are_not(name, checker):
    whole = plain(shipped_recipes()[name].read_text())
    checker.validate(whole)
    assert not checker.is_valid({**whole, "epochs": 3})
    assert not checker.is_valid({**whole, "data": {**whole["data"], "epochs": 3}})


def test_recipes_in_the_docs_are_taken(checker):
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    blocks = [block for page in pages for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)]
    whole = [plain(block) for block in blocks if block.lstrip("# ").count("\nbackbone:") == 1 and "name:" in block]
    assert len(whole) >= 3
    for one in whole:
        checker.validate(one)


def test_what_extends_another_need_not_be_whole(checker):
    checker.validate(plain("extends: other.yaml\ndata: {path: x}\n"))
    for text in ("data: {source: folder}\nname: a\n", "name: a\ndata: {path: x}\nbackbone: {name: resnet18}\n"):
        assert not checker.is_valid(plain(text))
    assert not checker.is_valid(plain("extends: other.yaml\nepochs: 3\n"))


def test_the_command_prints_it():
    assert json.loads(CliRunner().invoke(main, ["recipes", "schema"]).stdout) == editor_schema()
