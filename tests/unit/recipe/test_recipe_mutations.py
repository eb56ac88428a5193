"""Random damage to a recipe: it is read, or refused by an error of ours with exit code 2."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tlscale.errors import EXIT_BAD_INPUT, RecipeError
from tlscale.recipe.load import load_recipe

RECIPE = r"""name: a
data: {source: folder, path: photos, augment: [flip, {crop: 0.4}], classes: [cat, dog]}
backbone: {name: resnet18, weights: none}
stages:
  - duration: 2 epochs
    freeze:
      - 'layer[12]\..*': true
      - '.*bn.*'
    lr: 0.1
  - duration: 500 steps
    schedule: {decay: linear, warmup: 5%}
optim: {name: adamw, lr: 1e-3, options: {betas: [0.9, 0.95]}, lr_rules: [{'layer4\..*': 0.1}]}
loss: {class_weights: {cat: 1.0, dog: 2.0}}
head: [{linear: 64}, relu, {dropout: 0.5}, linear]
"""
NESTED = "[" * 24 + "x" + "]" * 24
ODD = ["1e309", "-1", "9" * 400, "null", "[]", "{}", NESTED, "[" * 3000, "&a [*a]", "*a", "!!python/object:os.system x"]
ODD += [
    "'\\u0000'",
    '"\\ud800"',
    "0x1F",
    ".nan",
    "<<: x",
    "true",
    "2024-01-01",
    f"'{'x' * 100_000}'",
    "{'(a+)+$': true}",
]
ODD += ["\x00", "\t- x", "---", "- - - - -", "? [a]", "%YAML 1.2", "\u202e", "!!binary aGk=", "|\n  x", "0.1 epochs"]
ODD += ["{a: {b: {c: {d: {e: {f: g}}}}}}", "\x1b[31m", "a: &x [1, *x]"]


def mutated(text: str, rng: random.Random) -> bytes:
    raw = text.encode()
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(raw) + 1)
        odd = rng.choice(ODD).encode()
        lines = raw.split(b"\n")
        line = rng.randrange(len(lines))
        value = b"\n".join([*lines[:line], lines[line].partition(b": ")[0] + b": " + odd, *lines[line + 1 :]])
        raw = rng.choice(
            [
                raw[:at] + rng.randbytes(1) + raw[at + 1 :],
                raw[:at] + raw[at + rng.randint(1, 40) :],
                raw[:at] + odd + raw[at:],
                raw[:at],
                raw[:at] + raw[at : at + 80] + raw[at:],
                value,
                raw[:at] + b"\n" + b"  " * rng.randrange(60) + b"x:" + raw[at:],
            ]
        )
    return raw


def test_the_recipe_that_is_damaged_is_right(tmp_path: Path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    assert load_recipe(tmp_path / "recipe.yaml").stages


@pytest.mark.parametrize("seeds", [range(60), pytest.param(range(60, 500), marks=pytest.mark.long)], ids=["60", "440"])
def test_a_damaged_recipe_is_read_or_refused(seeds: range, tmp_path: Path):
    file, refused = tmp_path / "recipe.yaml", []
    for seed in seeds:
        file.write_bytes(mutated(RECIPE, random.Random(seed)))
        try:
            load_recipe(file)
        except RecipeError as error:
            refused.append(error)
    assert len(refused) > len(seeds) // 2
    assert {error.exit_code for error in refused} == {EXIT_BAD_INPUT}
    assert all(line.isprintable() for error in refused for line in str(error).split("\n"))
