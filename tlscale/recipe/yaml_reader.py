"""Recipe text: a strict subset of YAML, read with the line of every value, and written so that it reads back.

Promise: what looks like a number is one (`1e-3`, `1E5`, `.5`), only `true` and `false` are booleans, only `null`, `~`
and nothing at all are null, and everything else is text (`no`, `on`, `1:30`, `2024-01-01`, `0x1F`). What people
read in two ways is refused, with the remedy: `010`, `.inf`, duplicate keys, tags, anchors and aliases, merge keys, a
second document, keys that are no text. So is what only an attack needs: deep nesting and huge files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

MAX_BYTES = 1_000_000
MAX_DEPTH = 20

Scalar = str | int | float | bool | None
Plain = Scalar | list["Plain"] | dict[str, "Plain"]

_STR = "tag:yaml.org,2002:str"
_REFUSED = "tag:tlscale,2026:refused"
# In order, the first that matches the whole text. The writer uses the same table to know what needs quotes.
_KINDS: list[tuple[str, re.Pattern[str]]] = [
    ("tag:yaml.org,2002:bool", re.compile(r"(?:true|false)\Z")),
    ("tag:yaml.org,2002:null", re.compile(r"(?:~|null|)\Z")),
    ("tag:yaml.org,2002:int", re.compile(r"[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*)\Z")),
    (_REFUSED, re.compile(r"(?:[-+]?0[0-9][0-9_]*(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?|<<|[-+]?\.(?:inf|nan)|---|\.\.\.)\Z",
                          re.IGNORECASE)),
    ("tag:yaml.org,2002:float", re.compile(
        r"[-+]?(?:[0-9]+(?:_[0-9]+)*\.[0-9]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)\Z")),
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value was written: a line of a file, or (line 0) the command line."""

    where: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.where}:{self.line}" if self.line else self.where


@dataclass(frozen=True, slots=True)
class Node:
    """A value and where it was written; in a mapping that is the line of its key."""

    value: Scalar | list[Node] | dict[str, Node]
    origin: Origin

    def plain(self) -> Any:  # noqa: ANN401 - any YAML value
        """The value without origins: fresh lists and dicts, free to change."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake: where, and what is wrong and what to do."""

    origin: Origin
    text: str

    def __str__(self) -> str:
        """One line; what the user wrote is in it, so line breaks and terminal codes are escaped."""
        said = f"{self.origin}: {self.text}"
        return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in said)


@dataclass(slots=True)
class Findings:
    """Mistakes found so far, and what they make unknowable, so that no mistake is reported twice."""

    problems: list[Problem] = field(default_factory=list)
    lost_keys: set[str] = field(default_factory=set)
    """Keys whose value could not be read."""
    incomplete: bool = False
    """A file that should have contributed is missing."""

    def add(self, origin: Origin, text: str) -> None:
        self.problems.append(Problem(origin, text))


def read_yaml(text: str, origin_of: Callable[[int], Origin], findings: Findings) -> Node | None:
    """The one document in `text`.

    Args:
        text: decoded YAML.
        origin_of: a line number from 1 as an `Origin`.
        findings: gets every mistake; a value that is refused is left out of the result.

    Returns:
        The top node; None when there is none (a mistake was found, or the text is empty).
    """
    last_line = text.count("\n") + 1
    try:
        return _Builder(text, origin_of, findings).document()
    except yaml.MarkedYAMLError as error:
        # At the end of the text, the parser's mark may lie behind the last line.
        line = min(error.problem_mark.line + 1, last_line) if error.problem_mark is not None else 1
        findings.add(origin_of(line), f"not valid YAML: {_explain(error)}")
    except yaml.reader.ReaderError as error:
        at = int(error.position)
        line = text.count("\n", 0, at) + 1
        findings.add(origin_of(line), f"holds the control character #x{ord(text[at]):04x}; take it out")
    except _TooDeepError as error:
        findings.add(error.args[0], f"nested more than {MAX_DEPTH} deep; no recipe needs that")
    return None


class _TooDeepError(Exception):
    """Stops the reading: what follows cannot be placed."""


class _Builder:
    """Nodes from the parser's events; PyYAML's own composer would expand aliases and forget duplicates."""

    def __init__(self, text: str, origin_of: Callable[[int], Origin], findings: Findings) -> None:
        self._events: Iterator[Any] = iter(yaml.parse(text, Loader=yaml.SafeLoader))
        self._origin_of = origin_of
        self._findings = findings

    def document(self) -> Node | None:
        next(self._events)  # the start of the stream
        if isinstance(next(self._events), yaml.StreamEndEvent):
            return None
        node = self._node(next(self._events), depth=1)
        next(self._events)  # the end of the document
        rest = next(self._events)
        if not isinstance(rest, yaml.StreamEndEvent):
            self._findings.add(self._origin(rest), "a second document begins here; a recipe is one document")
        return node

    def _origin(self, event: Any) -> Origin:  # noqa: ANN401 - events are untyped
        return self._origin_of(event.start_mark.line + 1)

    def _node(self, event: Any, depth: int) -> Node | None:  # noqa: ANN401 - events are untyped
        origin = self._origin(event)
        if depth > MAX_DEPTH:
            raise _TooDeepError(origin)
        refused = self._refuse_decoration(event, origin)
        node: Node | None = None
        if isinstance(event, yaml.ScalarEvent):
            node = self._scalar(event, origin)
        elif isinstance(event, yaml.SequenceStartEvent):
            node = self._list(origin, depth)
        elif isinstance(event, yaml.MappingStartEvent):
            node = self._mapping(origin, depth)
        return None if refused else node

    def _refuse_decoration(self, event: Any, origin: Origin) -> bool:  # noqa: ANN401 - events are untyped
        if getattr(event, "anchor", None) is not None:
            sign = "*" if isinstance(event, yaml.AliasEvent) else "&"
            self._findings.add(
                origin,
                f"'{sign}{event.anchor}': anchors and aliases are not read in recipes; write the value out, or put "
                f"text that begins with '{sign}' in single quotes",
            )
            return True
        if getattr(event, "tag", None) is not None:
            self._findings.add(
                origin,
                f"the tag '{event.tag}': YAML tags are not read in recipes; take it out, or put text that begins with "
                "'!' in single quotes",
            )
            return True
        return False

    def _scalar(self, event: yaml.ScalarEvent, origin: Origin) -> Node | None:
        try:
            return Node(read_scalar(event.value, plain=event.implicit[0]), origin)
        except ValueError as error:
            self._findings.add(origin, str(error))
            return None

    def _list(self, origin: Origin, depth: int) -> Node | None:
        items: list[Node] = []
        whole = True
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            item = self._node(event, depth + 1)
            if item is None:
                whole = False
            else:
                items.append(item)
        return Node(items, origin) if whole else None

    def _mapping(self, origin: Origin, depth: int) -> Node:
        entries: dict[str, Node] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            key_origin = self._origin(event)
            key = self._key(event, depth)
            value = self._node(next(self._events), depth + 1)
            if key is None:
                continue
            if key in entries:
                self._findings.add(key_origin, f"'{key}' is given twice, first in {entries[key].origin}; keep one")
            elif value is None:
                self._findings.lost_keys.add(key)
            else:
                entries[key] = Node(value.value, key_origin)
        return Node(entries, origin)

    def _key(self, event: Any, depth: int) -> str | None:  # noqa: ANN401 - events are untyped
        if isinstance(event, yaml.ScalarEvent) and event.implicit[0] and event.value == "<<":
            self._findings.add(self._origin(event), "merge keys ('<<') are not read in recipes; use 'extends'")
            return None
        node = self._node(event, depth + 1)
        if node is None or isinstance(node.value, str):
            return None if node is None else str(node.value)
        shown = f"'{event.value}'" if isinstance(event, yaml.ScalarEvent) else "a list or mapping"
        self._findings.add(node.origin, f"{shown} as a key: keys are text; put it in single quotes")
        return None


def read_scalar(text: str, *, plain: bool) -> Scalar:
    """The value of one scalar.

    Args:
        text: as the YAML parser gives it, without quotes.
        plain: it was written without quotes.

    Raises:
        ValueError: it has two readings, is out of range, or is not Unicode text.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{ascii(text)} is not Unicode text") from None
    kind = next((tag for tag, pattern in _KINDS if pattern.match(text)), _STR) if plain else _STR
    match kind.rpartition(":")[2]:
        case "bool":
            return text == "true"
        case "null":
            return None
        case "int":
            return _whole(text)
        case "float":
            return _finite(text)
        case "refused":
            raise ValueError(_two_readings(text))
    return text


def _whole(text: str) -> int:
    if len(text) > 1000:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    number = float(text) if len(text) <= 1000 else math.inf
    if not math.isfinite(number):
        raise ValueError(f"'{text[:40]}' is too large; numbers in recipes are finite")
    return number


def _two_readings(text: str) -> str:
    if text == "<<":
        return "'<<' is YAML's merge key; put it in single quotes if it is meant as text"
    if text[-1].isalpha():
        return f"'{text}': numbers in recipes are finite; put it in single quotes if it is meant as text"
    number = re.sub(r"^([-+]?)0+(?=[0-9])", r"\1", text)
    return f"'{text}' begins with a zero: write {number} for the number, or '{text}' in quotes for text"


def _explain(error: yaml.MarkedYAMLError) -> str:
    """PyYAML's words, and the remedy for the mistakes that recipes invite."""
    problem = str(error.problem or error.context)
    if "escape" in problem:
        return f"{problem}; in double quotes a backslash is special, so put regular expressions in single quotes"
    if "\\t" in problem:
        return "a tab; indent with spaces"
    if "mapping values are not allowed" in problem or "could not find expected ':'" in problem:
        return f"{problem}; check the indentation, and put text that holds ': ' in single quotes"
    if "while parsing a" in str(error.context) or "cannot start any token" in problem:
        return f"{problem}; close every bracket, and put regular expressions and other signs in single quotes"
    return f"{problem}; check quotes and indentation"


class _Dumper(yaml.SafeDumper):
    """Quotes all text that the reader would not take for that text."""

    yaml_implicit_resolvers: dict[Any, Any] = {None: _KINDS}  # noqa: RUF012 - PyYAML's way to configure it

    def ignore_aliases(self, data: object) -> bool:
        return True


class _Block(dict[str, Any]):
    """A mapping that is written with one key a line."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # PyYAML writes the line breaks of Unicode as they are, and reads them back as blanks; escaped they survive.
    return dumper.represent_scalar(_STR, text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(
    _Block, lambda dumper, data: dumper.represent_mapping("tag:yaml.org,2002:map", data.items(), flow_style=False)
)


def write_yaml(plain: dict[str, Any]) -> str:
    """YAML text that `read_yaml` reads back to `plain`: two levels of one key a line, what is below in one line."""
    blocks = {key: _Block(value) if isinstance(value, dict) and value else value for key, value in plain.items()}
    text = yaml.dump(
        _Block(blocks), Dumper=_Dumper, default_flow_style=True, sort_keys=False, allow_unicode=True, width=110
    )
    return str(text)
