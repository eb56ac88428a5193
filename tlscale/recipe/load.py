"""From recipe text to a `Recipe`, and back.

Promise: `load_recipe` reports every mistake of the file, of the files that it extends and of the overrides at once;
the recipe that it returns is complete and runs from any folder; `dump_recipe` writes text that loads to an equal one.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

from tlscale.errors import RecipeError, irregular, is_unicode, sentences, speaks_python
from tlscale.recipe.idle import find_idle
from tlscale.recipe.mistakes import Findings, Mistake, Origin
from tlscale.recipe.overrides import Override, read_override
from tlscale.recipe.retired import ADDED, replace_retired
from tlscale.recipe.schema import BackboneSection, Recipe
from tlscale.recipe.schema_keys import all_keys
from tlscale.recipe.sections.network import RUN
from tlscale.recipe.shipped import shipped_recipes
from tlscale.recipe.sources import SOURCES
from tlscale.recipe.validation import check_recipe, is_same_value, origin_at
from tlscale.recipe.yaml_text import MAX_BYTES, Node, read_yaml, write_yaml

MAX_EXTENDS = 5


class StoredRecipe(NamedTuple):
    """Hold the recipe of a run folder, as the run had it.

    Attributes:
        recipe: complete, with today's keys.
        added: by section, the keys that its file lacks since they came later, with what such a run did all the same.
        notes: a line for each value that is retired, and read in another way than it is written.
    """

    recipe: Recipe
    added: dict[str, dict[str, object]]
    notes: list[str]


@speaks_python
def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, resumed: bool = False) -> Recipe:
    """Read a recipe file, apply overrides, check all of it and fill in the defaults.

    Args:
        path: a YAML file. Its `extends: other.yaml` names one file to start from, in its folder or below that of
            the file that is loaded; sections are merged key by key, everything else is replaced.
        overrides: `key.path=value`, read by the same rules; the last of one key holds.
        resumed: of a run that began earlier, perhaps when keys without effect were no error: they are none here.

    Returns:
        The complete recipe, with absolute local paths (relative ones start at the current folder).

    Raises:
        RecipeError: with one line for each mistake, `file:line: key = value: what is wrong. What to do`; its
            `mistakes` are the same as data.
    """
    return _load(path, overrides, stored=False, may_be_idle=resumed)[0]


def as_recipe(recipe: Recipe | str | os.PathLike[str]) -> Recipe:
    """Return a recipe as it is, or read its file.

    Raises:
        RecipeError: as `load_recipe`.
    """
    return recipe if isinstance(recipe, Recipe) else load_recipe(os.fspath(recipe))


def load_to_run(path: str, overrides: Sequence[str], out: str | Path | None, *, resume: bool) -> Recipe:
    """Read a recipe that is to run in `out`; of a run that is resumed, keys without effect are no mistake.

    Raises:
        RecipeError: as `load_recipe`.
    """
    try:
        return load_recipe(path, overrides)
    except RecipeError:
        # A run that an older version began may have a key that is refused today, as it has no effect.
        began = load_recipe(path, overrides, resumed=True) if resume else None
        if began is None or not (Path(out or Path("runs") / began.name) / "recipe.yaml").exists():
            raise
        return began


def parse_recipe(text: str, name: str) -> Recipe:
    """Read a recipe from text, as `load_recipe` reads one from a file; `name` is what mistakes call it."""
    findings = Findings()
    tree = read_yaml(text, lambda line: Origin(name, line), findings)
    return _checked(tree, [], findings, name)


def load_stored_recipe(path: str | Path, overrides: Sequence[str] = ()) -> StoredRecipe:
    """Read the `recipe.yaml` of a run folder as the run had it: as `load_recipe`, but what is retired is no error."""
    recipe, notes = _load(path, overrides, stored=True, may_be_idle=True)
    older = {
        section: {key: value for key, value in keys.items() if key not in getattr(recipe, section).model_fields_set}
        for section, keys in ADDED.items()
    }
    return StoredRecipe(with_values(recipe, older), {section: keys for section, keys in older.items() if keys}, notes)


def _load(path: str | Path, overrides: Sequence[str], *, stored: bool, may_be_idle: bool) -> tuple[Recipe, list[str]]:
    findings = Findings()
    notes: list[str] = []
    tree = _read_chain(os.fspath(path), findings)
    changes = [change for text in overrides if (change := read_override(text, findings)) is not None]
    if tree is not None and stored:
        tree, notes = replace_retired(tree, findings, stored=True)
    return _checked(tree, changes, findings, os.fspath(path), may_be_idle=may_be_idle), notes


def _checked(
    tree: Node | None, changes: list[Override], findings: Findings, name: str, *, may_be_idle: bool = False
) -> Recipe:
    """Return the recipe in `tree` with the overrides in it; raise all that is in `findings` by then.

    Where it `may_be_idle`, a key without effect is no mistake.
    """
    recipe = None
    if tree is not None:
        for change in changes:
            tree = _set(tree, change, change.path, findings)
        whole = replace_retired(tree, findings, stored=False)[0]
        recipe = check_recipe(whole, findings)
        if recipe is not None and not may_be_idle:
            find_idle(recipe, findings, lambda key: origin_at(key, whole))
    if recipe is None or findings.mistakes:
        raise RecipeError.of(_in_order(findings.mistakes, name))
    return _with_absolute_paths(recipe)


def override_recipe(recipe: Recipe, overrides: Sequence[str], *, name: str, prefix: str) -> Recipe:
    """Apply overrides to a complete recipe, by the grammar of `load_recipe`, and check all of it.

    Args:
        name: what mistakes call the recipe, which has no file.
        prefix: what stands before an override where a mistake in it is reported.
    """
    findings = Findings()
    tree = read_yaml(dump_recipe(recipe), lambda _line: Origin(name), findings)
    assert tree is not None, "what is dumped reads back"
    changes = [change for text in overrides if (change := read_override(text, findings, prefix)) is not None]
    return _checked(tree, changes, findings, name)


def _override(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    return override_recipe(recipe, overrides, name=recipe.name, prefix="")


Recipe.override = _override


def with_values(recipe: Recipe, values: dict[str, dict[str, object]]) -> Recipe:
    """Replace values of some sections, which are taken as valid."""
    sections = {name: getattr(recipe, name).model_copy(update=keys) for name, keys in values.items()}
    return recipe.model_copy(update=sections)


def dump_recipe(recipe: Recipe) -> str:
    """Write the complete recipe as YAML text, in the order of the schema."""
    return write_yaml(recipe.to_plain())


def recipe_digest(recipe: Recipe) -> str:
    """Return the SHA-256 (hex) of the complete recipe; the same for equal recipes, whatever their files looked like."""
    text = json.dumps(recipe.to_plain(), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def diff_recipes(old: Recipe, new: Recipe) -> list[tuple[str, object, object]]:
    """Return `(key path, old value, new value)` for all that differs, in schema order; None where there is no value."""
    before, after = _flat(old.to_plain()), _flat(new.to_plain())
    return [
        (key, before.get(key), after.get(key))
        for key in dict.fromkeys([*before, *after])
        if not is_same_value(before.get(key), after.get(key))
    ]


def _flat(plain: dict[str, Any], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in plain.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _in_order(mistakes: list[Mistake], path: str) -> list[Mistake]:
    """Sort mistakes: files in the order they were read, by line, and overrides last; each once."""
    files = list(dict.fromkeys([path, *(mistake.origin.where for mistake in mistakes if mistake.origin.line)]))
    return sorted(
        dict.fromkeys(mistakes),
        key=lambda mistake: (
            (files.index(mistake.origin.where), mistake.origin.line) if mistake.origin.line else (len(files), 0)
        ),
    )


def _read_chain(path: str, findings: Findings) -> Node | None:
    """Read the file and what it extends, merged."""
    root = _resolved(os.path.dirname(path))
    seen = [_resolved(path)]
    tree = _read_file(path, Origin(path), findings)
    if tree is None:
        return None
    trees = [tree]
    while (extends := _take_extends(trees)) is not None:
        parent = _parent_file(extends, path, root, seen, findings)
        parent_tree = None if parent is None else _read_file(parent, extends.origin, findings)
        if parent is None or parent_tree is None:
            findings.incomplete = True
            break
        path = parent
        seen.append(_resolved(parent))
        trees.append(parent_tree)
    return reduce(_merge, reversed(trees))


def _resolved(path: str) -> Path:
    """Return the path absolute and without links, as far as it can be followed; opening it reports what is wrong."""
    try:
        return Path(path).resolve()
    except (OSError, ValueError, RuntimeError):  # too long, holds a NUL, a circle of links
        return Path(os.path.abspath(path))


def _take_extends(trees: list[Node]) -> Node | None:
    """Take the value of `extends` out of the last tree."""
    entries = trees[-1].value
    assert isinstance(entries, dict), "_read_file returns mappings only"
    if "extends" not in entries:
        return None
    trees[-1] = Node({key: node for key, node in entries.items() if key != "extends"}, trees[-1].origin)
    return entries["extends"]


def _parent_file(extends: Node, child: str, root: Path, seen: list[Path], findings: Findings) -> str | None:
    """Return the file that `extends` names, as a path to show; None when it may not be read."""
    name = extends.value
    if not isinstance(name, str) or not name:
        problem = "takes the name of one recipe file"
        findings.add(extends.origin, problem, "Write it so: 'extends: other.yaml'.", key="extends")
        return None
    parent = os.path.normpath(os.path.join(os.path.dirname(child), name))
    resolved = _resolved(parent)
    if os.path.isabs(name) or not resolved.is_relative_to(root):
        problem = f"lies outside '{root}', the folder of the recipe"
        remedy = "Copy that file into the folder or one below it."
    elif resolved in seen:
        problem, remedy = "goes round in a circle", "Take one 'extends' out."
    elif len(seen) > MAX_EXTENDS:
        problem = f"is more than {MAX_EXTENDS} files away from the first"
        remedy = "Write one of the files out."
    else:
        return parent
    findings.add(extends.origin, problem, remedy, key="extends", value=repr(name))
    return None


def _read_file(path: str, named_in: Origin, findings: Findings) -> Node | None:
    """Read the mapping in one file; `named_in` is where the file was asked for."""
    try:
        if Path(path).is_dir():
            names = [file.name for file in sorted(Path(path).glob("*.y*ml"))][:5]
            such_as = f", such as {', '.join(names)}" if names else ""
            findings.add(named_in, f"'{path}' is a folder", f"Name a recipe file{such_as}.")
            return None
        what = irregular(path)
        if what is not None and os.path.exists(os.path.realpath(path)):  # a shell's <(...) is a pipe without a name
            findings.add(named_in, f"'{path}' is {what}", "Name a recipe file.")
            return None
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        findings.add(named_in, f"there is no file '{path}'", _near_files(path))
        return None
    except (OSError, ValueError) as error:
        findings.add(named_in, f"'{path}' cannot be read: {getattr(error, 'strerror', None) or error}")
        return None
    first = Origin(path, 1)
    if len(data) > MAX_BYTES:
        findings.add(first, f"more than {MAX_BYTES:,} bytes", "No recipe is so long. Is it another file?")
        return None
    return _read_bytes(data, path, findings)


def _read_bytes(data: bytes, path: str, findings: Findings) -> Node | None:
    first = Origin(path, 1)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        findings.add(Origin(path, line), "not UTF-8 text", "Save the recipe as UTF-8. Is it another file?")
        return None
    so_far = len(findings.mistakes)
    tree = read_yaml(text, lambda line: Origin(path, line), findings)
    if len(findings.mistakes) > so_far and tree is None:
        return None
    if tree is None or tree.value is None:
        findings.add(first, "the file is empty", "See `tlscale recipes` for whole recipes to start from.")
        return None
    if not isinstance(tree.value, dict):
        problem = "not a recipe: the top level must be keys and values"
        findings.add(tree.origin, problem, "Write them so: 'name: my_run'.")
        return None
    return Node(tree.value, first)


def _near_files(path: str) -> str:
    """Return what there is instead: recipe files nearby, then the shipped recipes."""
    wanted = Path(path)
    beside = [str(file) for file in sorted(wanted.parent.glob("*.y*ml")) if file.is_file()]
    shipped = shipped_recipes()
    near = difflib.get_close_matches(path, beside, n=3, cutoff=0.6)
    if not near and (name := difflib.get_close_matches(wanted.stem, shipped, n=1, cutoff=0.6)):
        near = [os.path.relpath(shipped[name[0]])]
    return sentences(
        f"Did you mean {' or '.join(repr(name) for name in near)}?" if near else "",
        f"The shipped recipes are: {', '.join(shipped)}." if shipped else "",
    )


def _merge(parent: Node, child: Node, prefix: tuple[str, ...] = ()) -> Node:
    """Put the child's values over the parent's: sections key by key, the rest (lists, rules, options) as a whole."""
    if not isinstance(parent.value, dict) or not isinstance(child.value, dict):
        return child
    entries = dict(parent.value)
    for name, node in child.value.items():
        path = (*prefix, name)
        key = all_keys().get(".".join(path))
        is_section = key is not None and key.section is not None and name in entries
        entries[name] = _merge(entries[name], node, path) if is_section else node
    return Node(entries, child.origin)


def _set(tree: Node, change: Override, rest: tuple[str, ...], findings: Findings) -> Node:
    """Return `tree` with the override in it; `rest` is what is left of its path."""
    if not isinstance(tree.value, dict) and tree.value is not None:
        done = ".".join(change.path[: len(change.path) - len(rest)])
        key, origin = all_keys()[done], change.value.origin
        if isinstance(tree.value, list):
            findings.add(origin, f"is a list in {tree.origin}", f"Write all of it: {done}=[{{...}}].", key=done)
        elif key.section is None:  # a section that is no mapping is reported by the schema's check
            findings.add(origin, f"is {tree.plain()!r} in {tree.origin}", f"Write {done}={{...}}.", key=done)
        return tree
    entries = dict(tree.value or {})
    name, *below = rest
    if below:
        inner = entries.get(name, Node({}, change.value.origin))
        entries[name] = _set(inner, change, tuple(below), findings)
    else:
        whole = Node({name: change.value}, change.value.origin)
        prefix = change.path[:-1]
        return Node(_merge(Node(entries, tree.origin), whole, prefix).value, tree.origin)
    return Node(entries, tree.origin)


def _with_absolute_paths(recipe: Recipe) -> Recipe:
    """Make local paths independent of the current folder and of `~`."""
    data, distill = recipe.data, recipe.distill
    if SOURCES[data.source].is_local and data.path is not None:
        data = data.model_copy(update={"path": _absolute(data.path)})
    if data.exclude is not None:
        data = data.model_copy(update={"exclude": _absolute(data.exclude)})
    if distill is not None:
        teacher = None if distill.teacher is None else _with_absolute_weights(distill.teacher)
        run = None if distill.run is None else _absolute(distill.run)
        distill = distill.model_copy(update={"teacher": teacher, "run": run})
    backbone = _with_absolute_weights(recipe.backbone)
    return recipe.model_copy(update={"data": data, "backbone": backbone, "distill": distill})


def _with_absolute_weights(backbone: BackboneSection) -> BackboneSection:
    if backbone.from_run:
        return backbone.model_copy(update={"weights": f"{RUN}{_absolute(backbone.run)}"})
    if not backbone.from_file:
        return backbone
    return backbone.model_copy(update={"weights": _absolute(backbone.weights)})


def _absolute(path: str) -> str:
    whole = os.path.abspath(os.path.expanduser(path))
    if not is_unicode(whole):
        problem = f"'{path}' leads to {os.fsencode(whole)!r}, which is not UTF-8"
        raise RecipeError(problem, remedy="Rename the folders on the way, such as with convmv")
    return whole
