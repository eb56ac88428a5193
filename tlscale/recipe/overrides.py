"""Overrides: `key.path=value`, mostly from the command line, read by the rules of recipe files.

Promise: a value is what it would be in a file, except that text and regular expressions need no quotes (the shell
took them off). The last override of a key holds, so that a launch script can append to a line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Union, get_args, get_origin

from tlscale.errors import is_unicode
from tlscale.recipe.mistakes import Findings, Origin
from tlscale.recipe.retired import is_retired_key
from tlscale.recipe.schema_keys import SECRET, Key, all_keys, key_of, unknown_key
from tlscale.recipe.yaml_text import Node, Scalar, read_yaml


@dataclass(frozen=True, slots=True)
class Override:
    """Put `value` at `path`; the path may end in a name below a key that takes a mapping."""

    path: tuple[str, ...]
    value: Node


def read_override(text: str, findings: Findings, prefix: str | None = None) -> Override | None:
    """Read one override, `key.path=value`; return None when it is wrong, which `findings` then has.

    Args:
        prefix: what stands before `text` where a mistake in it is reported; by default how it was given.
    """
    key_text, equals, value_text = text.partition("=")
    key_text, value_text = key_text.strip(), value_text.strip()
    shown = f"{key_text}=..." if SECRET.search(text) else text
    if prefix is None:
        origin = Origin(f"command line: {shown}", in_python=f"overrides: {shown}")
    else:
        origin = Origin(f"{prefix}{shown}")
    if not is_unicode(text):
        findings.add(origin, "not UTF-8 text", "Rename the file or folder that it names, such as with convmv.")
        return None
    if not equals or not key_text:
        findings.add(origin, "not an override", "Write key.path=value, such as optim.lr=1e-3.")
        return None
    path = _path(key_text, origin, findings)
    if path is None:
        return None
    if not value_text:
        findings.add(origin, "no value", f"Write {key_text}=null for none, or omit the override.")
    value = _value(path, value_text, origin, findings) if value_text else None
    if value is None:
        findings.lost_keys.update(path)
        return None
    return Override(path, value)


def _path(key_text: str, origin: Origin, findings: Findings) -> tuple[str, ...] | None:
    """Return the key's parts, checked against the schema."""
    if key_text.startswith("-") and key_text.lstrip("-") in all_keys():
        findings.add(origin, "an override has no dashes", f"Write {key_text.lstrip('-')}=...")
        return None
    if key_text == "extends":
        findings.add(origin, "read in recipe files only", "Write it into the file.", key="extends")
        return None
    parts = key_text.split(".")
    if is_retired_key(key_text):
        return tuple(parts)  # its value is checked with those of the file
    key = key_of(parts)
    known = len(key.path) if key is not None else 0
    if known == len(parts):
        return tuple(parts)
    if key is None or key.section is not None:
        wrong = parts[: known + 1]
        findings.add(origin, *unknown_key(wrong), key=".".join(wrong))
        return None
    if key.takes_names:
        # The names are the user's own (classes, arguments), and may hold dots.
        return (*key.path, ".".join(parts[known:]))
    problem = f"takes {key.takes} and has no keys below it"
    findings.add(origin, problem, f"Write {key.dotted}=...", key=key.dotted)
    return None


def _value(path: Sequence[str], text: str, origin: Origin, findings: Findings) -> Node | None:
    key = key_of(path)
    assert key is not None, "checked by _path"
    kind: object = key.field.annotation
    if kind is str or (get_origin(kind) in (Union, UnionType) and str in get_args(kind)):
        return Node(_text_value(key, text, origin), origin)
    if key.path == ("freeze",) and not text.startswith(("{", "[{")):
        return _regex_value(text, origin)
    return read_yaml(text, lambda _line: origin, findings)


def _text_value(key: Key, text: str, origin: Origin) -> Scalar:
    """Return literal text, but for `null` where the key takes it and for quotes that survived the shell."""
    if text in ("null", "~") and key.field.annotation is not str:
        return None
    if text[0] in "'\"":
        node = read_yaml(text, lambda _line: origin, Findings())
        if node is not None and isinstance(node.value, str):
            return node.value
    return text


def _regex_value(text: str, origin: Origin) -> Node:
    r"""Return a list such as `[a\..*, b\..*]` where it reads as one; quoted text; else a regular expression."""
    node = read_yaml(text, lambda _line: origin, Findings())
    if node is not None and (node.value is None or isinstance(node.value, list) or text[0] in "'\""):
        return node
    return Node(text, origin)
