"""Write docs/recipe.md and docs/recipe.schema.json; with --freeze also the keys and defaults that the tests hold fast.

    python scripts/make_recipe_reference.py [--freeze]

Run it after every change of tlscale/recipe/schema.py and tlscale/recipe/sections. `--freeze` is for a change of keys or
defaults that is meant: recipes of users depend on them, so it also needs a line in CHANGELOG.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tlscale.recipe.editor_schema import editor_schema  # noqa: E402
from tlscale.recipe.field_types import AUGMENTATIONS, HEAD_LAYERS  # noqa: E402
from tlscale.recipe.schema_keys import Key, all_keys  # noqa: E402

REFERENCE = ROOT / "docs" / "recipe.md"
EDITOR_SCHEMA = ROOT / "docs" / "recipe.schema.json"
FROZEN = ROOT / "tests" / "assets" / "recipe_schema.json"

EXAMPLE = r"""# Fine-tune the upper half of a ResNet-18 on grey 32 px images.
name: resnet_fmnist
seed: 0
data: {source: fashion_mnist, image_size: 32, train_limit: 10000, augment: [flip, {crop: 0.5}]}
backbone: {name: resnet18, weights: pretrained, in_chans: 1}
freeze: '(conv1|bn1|layer[12])\..*'
head: [{linear: 256}, relu, {dropout: 0.2}, linear]
duration: 5 epochs
batch_size: 256
optim: {name: adamw, lr: 1e-3, weight_decay: 0.05, lr_rules: [{'layer3\..*': 0.1}]}
schedule: {warmup: 5%, decay: cosine}
compute: {precision: bf16}
checkpoint: {every: 1 epochs, keep: 2}
track: [wandb]
"""

HEAD = f"""# The recipe, key by key

<!-- Made by scripts/make_recipe_reference.py from tlscale/recipe/schema.py and sections/; do not edit. -->

A recipe is one YAML file. Only `name`, `data.source` and `backbone.name` (and `data.path`, where the source needs
one) must be there; everything else has the default that the tables below give. `tlscale plan RECIPE` checks a recipe
and shows what a run would do, without training.

```yaml
{EXAMPLE}```

An editor with a YAML language server completes keys, shows what they are, and marks mistakes, where the recipe begins
with this line ([recipe.schema.json](recipe.schema.json) lies next to this page; `tlscale recipes schema >
recipe.schema.json` writes it elsewhere):

```
# yaml-language-server: $schema=recipe.schema.json
```

## How a recipe is read

- **Strict YAML.** `1e-3`, `1E5`, `.5` and `10_000` are numbers. Only `true` and `false` are booleans: `yes`, `no`, `on`
  and `off` are text, and so are `1:30` and `2024-01-01`. `null`, `~` and nothing at all are null.
- **Errors**, rather than guesses: a number that begins with a zero (`010`), `.inf` and `.nan`, a key given twice, a key
  that is not text (quote it: `'10': 2.0`), tags (`!!python/...`), anchors, aliases and merge keys, a second document,
  more than 20 levels, more than 1 MB, anything but UTF-8.
- **Every mistake at once**, each as `file:line: key = value: what is wrong. What to do`.
- **`extends: other.yaml`** at the top of a recipe starts from another one, in the same folder or below it (below the
  folder of the file that is loaded, when that one extends in turn). Sections are merged key by key; every other
  value, lists, rules and mappings such as `optim.options` among them, is replaced as a whole.
- **Overrides** on the command line, `key.path=value`, follow the same rules and come last: `optim.lr=1e-3`,
  `head='[{{linear: 64}}, relu, linear]'`, `optim.options.momentum=0.9`. Text, and a regular expression for `freeze`,
  need no YAML quotes: `freeze='(conv1|bn1)\\..*'`. A value for `freeze` that reads as a YAML list is a list of rules.
  `key=null` sets null. Of two overrides of one key the last holds.
- **Paths** are relative to the folder that tlscale is started in, and may begin with `~`. The resolved recipe in the
  run folder holds them as absolute paths.
- **Secrets** never go into a recipe.

## Durations

A number and a unit: `10 epochs`, `500 steps`, `64000 images` or `5%` (of the run). A step is one update of the weights,
with `batch_size` images over all processes. Durations are turned into whole steps once, rounded up; whole epochs are
whole epochs of steps, also where the last batch of an epoch is short.

## Rules

`freeze`, `optim.lr_rules` and `optim.weight_decay_rules` are ordered lists of `{{regex: value}}` on parameter names
such as `layer3.0.conv1.weight`. A regular expression must match the *whole* name, the first rule that matches holds,
and a rule that acts on nothing is an error. Write them in single quotes: in double quotes YAML takes the backslash for
itself.

```yaml
freeze: '(conv1|bn1|layer[12])\\..*'                # one: freeze these
freeze: ['conv1\\..*', 'bn1\\..*']                   # several: freeze all of these
freeze: [{{'.*\\.bn\\d\\..*': false}}, {{'.*': true}}]    # first match wins: train the norm layers, freeze the rest
```
"""


def reference() -> str:
    """Return the whole page."""
    parts = [HEAD, "## Top level\n\n" + _table([key for key in all_keys().values() if not key.path[1:]])]
    for section in (key for key in all_keys().values() if key.section is not None):
        assert section.section is not None
        doc = " ".join((section.section.__doc__ or "").split())
        inside = [key for key in all_keys().values() if key.path[:-1] == section.path]
        parts.append(f"## `{section.dotted}`\n\n{doc}\n\n{_table(inside)}")
    parts += [_head_layers(), _augmentations()]
    return "\n".join(parts)


def _table(keys: list[Key]) -> str:
    rows = [f"| `{key.dotted}` | {_takes(key)} | {_default(key)} | {_cell(key.description)} |" for key in keys]
    return "\n".join(["| key | takes | default | what it is |", "|---|---|---|---|", *rows, ""])


def _takes(key: Key) -> str:
    return "a section, see below" if key.section is not None else _cell(key.takes)


def _cell(text: str) -> str:
    """Escape text for a table: a `|` would end the cell."""
    return text.replace("|", "\\|")


def _default(key: Key) -> str:
    if key.field.is_required():
        return "required"
    if key.section is not None and key.default() is not None:
        return "its defaults"
    return f"`{json.dumps(key.default())}`" if not isinstance(key.default(), str) else f"`{key.default()}`"


def _head_layers() -> str:
    rows = [
        ("{linear: 256}", "fully connected, 256 wide (1 to 65536)"),
        ("linear", "the last layer; as wide as there are classes"),
        ("{dropout: 0.2}", "dropout with that probability, from 0 to below 1"),
        *((name, kind.about) for name, kind in HEAD_LAYERS.items() if kind.number is None),
    ]
    lines = [f"| `{name}` | {meaning} |" for name, meaning in rows]
    return "\n".join(["## Layers of `head`", "", "| layer | what it is |", "|---|---|", *lines, ""])


def _augmentations() -> str:
    lines = [f"| `{name}` | {row} |" for name, row in _augmentation_rows()]
    head = [
        "## Augmentations of `data.augment`",
        "",
        "Each by name, or as `{name: number}`; `none` is the empty list.",
        "",
    ]
    return "\n".join([*head, "| name | its number | default | from | to |", "|---|---|---|---|---|", *lines, ""])


def _augmentation_rows() -> Iterator[tuple[str, str]]:
    for name, number in AUGMENTATIONS.items():
        if number is None:
            yield name, "takes none | | | "
        else:
            yield name, f"{number.meaning} | {number.default:g} | {number.lowest:g} | {number.highest:g}"


def frozen_schema() -> dict[str, dict[str, Any]]:
    """Return key -> what it takes and its default; a change here changes what users' recipes mean."""
    return {
        key.dotted: {"takes": key.takes, "default": "(required)" if key.field.is_required() else key.default()}
        for key in all_keys().values()
        if key.section is None
    }


def editor_schema_text() -> str:
    return json.dumps(editor_schema(), indent=1) + "\n"


def frozen_text() -> str:
    return json.dumps(frozen_schema(), indent=1) + "\n"


def main(arguments: list[str]) -> None:
    if arguments not in ([], ["--freeze"]):
        raise SystemExit(__doc__)
    REFERENCE.write_text(reference(), encoding="utf-8")
    EDITOR_SCHEMA.write_text(editor_schema_text(), encoding="utf-8")
    print(f"wrote {REFERENCE.relative_to(ROOT)} and {EDITOR_SCHEMA.relative_to(ROOT)}")
    if arguments:
        FROZEN.write_text(frozen_text(), encoding="utf-8")
        print(f"wrote {FROZEN.relative_to(ROOT)}")


if __name__ == "__main__":
    main(sys.argv[1:])
