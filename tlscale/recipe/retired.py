"""Older recipes: the one table of keys and values that are retired, and of keys that run folders may lack.

Promise: a run folder, whose recipe is complete, is read whatever it holds of these. In a recipe of a user, a retired
key with its old default is ignored, as it never had an effect; any other value is a mistake that says what to write.
To retire a key, take it out of the schema and add a row to `RETIRED`; to retire a value, the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tlscale.recipe.mistakes import Findings
from tlscale.recipe.validation import is_same_value, show_value
from tlscale.recipe.yaml_text import Node


@dataclass(frozen=True, slots=True)
class RetiredKey:
    """Describe a key that recipes had once.

    Attributes:
        key: with dots; a key of the items of a list has no number (`stages.lr`).
        default: the value that it had by default, which had no effect.
        remedy: a whole sentence: what to write instead.
    """

    key: str
    default: Any
    remedy: str


@dataclass(frozen=True, slots=True)
class RetiredValue:
    """Describe a value that a key took once.

    Attributes:
        key: as in `RetiredKey`.
        value: the retired one.
        successor: what does the same today; a run folder is read as if it held this.
        remedy: a whole sentence: what to write instead.
    """

    key: str
    value: Any
    successor: Any
    remedy: str


RETIRED: tuple[RetiredKey | RetiredValue, ...] = (
    # Measured: 1.05 to 1.18 times faster codes on four networks, for codes of their own in the cache.
    RetiredKey("codes.fold_norm", False, "Take it out: norm layers are not folded into convolutions any more."),
    RetiredValue("non_finite.action", "rollback", "skip", "Write skip, which ends in the same weights."),
)

ADDED: dict[str, dict[str, object]] = {"evaluate": {"choose": "best"}}
"""By section, keys that are younger than some run folders, and what those runs did before there was the key."""


def is_retired_key(dotted: str) -> bool:
    """Return whether recipes had this key once."""
    return any(isinstance(row, RetiredKey) and row.key == dotted for row in RETIRED)


def replace_retired(tree: Node, findings: Findings, *, stored: bool) -> tuple[Node, list[str]]:
    """Take retired keys out of a recipe as it was read, and put the successors of retired values in.

    Args:
        findings: gets a mistake for each value that is refused; nothing where `stored`.
        stored: the recipe is that of a run folder.

    Returns:
        The recipe of today, and a line for each value of a run folder that is read in another way than it is written.
    """
    notes: list[str] = []
    for row in RETIRED:
        tree = _replace(tree, tuple(row.key.split(".")), row, findings, notes if stored else None)
    return tree, notes


def _replace(
    node: Node, path: tuple[str, ...], row: RetiredKey | RetiredValue, findings: Findings, notes: list[str] | None
) -> Node:
    """Apply one row below `node`, from which `path` leads to the key."""
    if isinstance(node.value, list):
        return Node([_replace(item, path, row, findings, notes) for item in node.value], node.origin)
    if not isinstance(node.value, dict) or path[0] not in node.value:
        return node
    entries = dict(node.value)
    name, *below = path
    if below:
        entries[name] = _replace(entries[name], tuple(below), row, findings, notes)
    elif isinstance(row, RetiredKey):
        _tell(entries.pop(name), row, row.default, findings, notes)
    elif is_same_value(entries[name].plain(), row.value):
        _tell(entries[name], row, None, findings, notes)
        entries[name] = Node(row.successor, entries[name].origin)
    return Node(entries, node.origin)


def _tell(
    node: Node, row: RetiredKey | RetiredValue, silent: object, findings: Findings, notes: list[str] | None
) -> None:
    """Report a retired value: as a note of a run folder, else as a mistake; nothing of a `silent` one."""
    value = node.plain()
    if is_same_value(value, silent):
        return
    shown = show_value((row.key,), value)
    if notes is None:
        findings.add(node.origin, "retired", row.remedy, key=row.key, value=shown)
    elif isinstance(row, RetiredValue):
        successor = show_value((row.key,), row.successor)
        notes.append(f"{row.key} = {shown}, as the run began, is retired: read as {successor}")
    else:
        notes.append(f"{row.key} = {shown}, as the run began, is retired: it has no effect")
