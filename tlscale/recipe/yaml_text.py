"""Recipe text: a strict subset of YAML, read with the line of every value, and written so that it reads back.

Promise: what looks like a number is one (`1e-3`, `1E5`, `.5`), only `true` and `false` are booleans, only `null`, `~`
and nothing at all are null, and everything else is text (`no`, `on`, `1:30`, `2024-01-01`, `0x1F`). What people
read in two ways is refused, with the remedy: `010`, `.inf`, duplicate keys, tags, anchors and aliases, merge keys, a
second document, keys that are no text. So is what only an attack needs: deep nesting and huge files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml

from tlscale.recipe.mistakes import Findings, InvalidValueError, Origin

MAX_BYTES = 1_000_000
MAX_DEPTH = 20

Scalar = str | int | float | bool | None

TEXT_TAG = "tag:yaml.org,2002:str"
_REFUSED = "tag:tlscale,2026:refused"
# In order, the first that matches the whole text. The writer uses the same table to know what needs quotes.
KINDS: list[tuple[str, re.Pattern[str]]] = [
    ("tag:yaml.org,2002:bool", re.compile(r"(?:true|false)\Z")),
    ("tag:yaml.org,2002:null", re.compile(r"(?:~|null|)\Z")),
    ("tag:yaml.org,2002:int", re.compile(r"[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*)\Z")),
    (_REFUSED, re.compile(r"(?:[-+]?0[0-9][0-9_]*(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?|<<|[-+]?\.(?:inf|nan)|---|\.\.\.)\Z",
                          re.IGNORECASE)),
    ("tag:yaml.org,2002:float", re.compile(
        r"[-+]?(?:[0-9]+(?:_[0-9]+)*\.[0-9]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)\Z")),
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Node:
    """Hold a value and where it was written; in a mapping that is the line of its key."""

    value: Scalar | list[Node] | dict[str, Node]
    origin: Origin

    def plain(self) -> Any:  # noqa: ANN401 - any YAML value
        """Return the value without origins: fresh lists and dicts, free to change."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value


def read_yaml(text: str, origin_of: Callable[[int], Origin], findings: Findings) -> Node | None:
    """Read the one document in `text`.

    Args:
        origin_of: a line number from 1 as an `Origin`.
        findings: gets every mistake; a value that is refused is not in the result.

    Returns:
        The top node; None when there is none (a mistake was found, or the text is empty).
    """
    last_line = text.count("\n") + 1
    try:
        return _Loader(text, origin_of, findings).get_single_data()
    except yaml.MarkedYAMLError as error:
        # At the end of the text, the parser's mark may lie behind the last line.
        line = min(error.problem_mark.line + 1, last_line) if error.problem_mark is not None else 1
        findings.add(origin_of(line), f"not valid YAML: {error.problem or error.context}", _remedy(error))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        findings.add(origin_of(line), f"holds the control character #x{ord(text[error.position]):04x}", "Take it out.")
    except _TooDeepError as error:
        findings.add(error.origin, f"nested more than {MAX_DEPTH} deep", "No recipe needs that.")
    return None


class _TooDeepError(Exception):
    """Raised to stop reading: what follows cannot be placed."""

    def __init__(self, origin: Origin) -> None:
        super().__init__(str(origin))
        self.origin = origin


class _Loader(yaml.SafeLoader):
    """Construct a `Node` for each value; report what recipes do not have, and go on without it.

    PyYAML's own loader would expand aliases, merge keys, and forget lines and all but the last of duplicate keys.
    """

    yaml_implicit_resolvers: dict[Any, Any] = {None: KINDS}  # noqa: RUF012 - PyYAML's way to configure it

    def __init__(self, text: str, origin_of: Callable[[int], Origin], findings: Findings) -> None:
        super().__init__(text)
        self._origin_of, self._findings, self._depth = origin_of, findings, 0

    def get_single_data(self) -> Node | None:
        self.get_event()  # type: ignore[no-untyped-call]  # the start of the stream
        if self.check_event(yaml.StreamEndEvent):
            return None
        node = self.construct_object(self.compose_document())
        if not self.check_event(yaml.StreamEndEvent):
            origin = self._origin(self.peek_event())  # type: ignore[no-untyped-call]
            self._findings.add(origin, "a second document begins here", "A recipe is one document.")
        return node

    def _origin(self, marked: Any) -> Origin:  # noqa: ANN401 - PyYAML's events and nodes
        return self._origin_of(marked.start_mark.line + 1)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:  # noqa: ANN401 - PyYAML's own
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if self._depth == MAX_DEPTH:
            raise _TooDeepError(self._origin(event))
        self._depth += 1
        is_refused = self._refuse_decoration(event)
        if isinstance(event, yaml.AliasEvent):
            marks: Any = (event.start_mark, event.end_mark)
            self.get_event()  # type: ignore[no-untyped-call]
            node: Any = yaml.ScalarNode(TEXT_TAG, "", *marks)
        else:
            node = super().compose_node(parent, index)
        node.is_refused = is_refused
        self._depth -= 1
        return node  # type: ignore[no-any-return]

    def _refuse_decoration(self, event: Any) -> bool:  # noqa: ANN401 - events are untyped
        """Report and take off what may be put before a value: an anchor or a tag; or an alias in its place."""
        anchor, tag = event.anchor, getattr(event, "tag", None)
        event.anchor = event.tag = None
        if anchor is not None:
            sign = "*" if isinstance(event, yaml.AliasEvent) else "&"
            problem = f"'{sign}{anchor}': anchors and aliases are not read in recipes"
            remedy = f"Write the value out, or put text that begins with '{sign}' in single quotes."
        elif tag is not None:
            problem = f"the tag '{tag}': YAML tags are not read in recipes"
            remedy = "Take it out, or put text that begins with '!' in single quotes."
        else:
            return False
        self._findings.add(self._origin(event), problem, remedy)
        return True

    def construct_object(self, node: Any, deep: bool = True) -> Node | None:  # noqa: ANN401 - nodes are untyped
        if isinstance(node, yaml.ScalarNode):
            value = self._scalar(node)
        elif isinstance(node, yaml.SequenceNode):
            value = self._sequence(node)
        else:
            value = self._mapping(node)
        return None if node.is_refused else value

    def _scalar(self, node: yaml.ScalarNode) -> Node | None:
        origin = self._origin(node)
        try:
            return Node(_scalar_value(node.tag, node.value), origin)
        except InvalidValueError as error:
            self._findings.add(origin, error.problem, error.remedy)
            return None

    def _sequence(self, node: yaml.SequenceNode) -> Node | None:
        items = [self.construct_object(item) for item in node.value]
        sound = [item for item in items if item is not None]
        return Node(sound, self._origin(node)) if len(sound) == len(items) else None

    def _mapping(self, node: yaml.MappingNode) -> Node:
        entries: dict[str, Node] = {}
        for key_node, value_node in node.value:
            key, value, origin = self._key(key_node), self.construct_object(value_node), self._origin(key_node)
            if key is None:
                continue
            if key in entries:
                first = entries[key].origin
                self._findings.add(origin, f"'{key}' is given twice, first in {first}", "Keep one.")
            elif value is None:
                self._findings.lost_keys.add(key)
            else:
                entries[key] = Node(value.value, origin)
        return Node(entries, self._origin(node))

    def _key(self, node: Any) -> str | None:  # noqa: ANN401 - nodes are untyped
        is_scalar = isinstance(node, yaml.ScalarNode)
        if is_scalar and node.tag == _REFUSED and node.value == "<<":
            self._findings.add(self._origin(node), "merge keys ('<<') are not read in recipes", "Use 'extends'.")
            return None
        key = self.construct_object(node)
        if key is None or isinstance(key.value, str):
            return None if key is None else str(key.value)
        shown = f"'{node.value}'" if is_scalar else "a list or mapping"
        self._findings.add(self._origin(node), f"{shown} as a key: keys are text", "Put it in single quotes.")
        return None


def _scalar_value(tag: str, text: str) -> Scalar:
    """Return the value of one scalar, unless it has two readings, is out of range, or is not Unicode text.

    Args:
        tag: of the first of `KINDS` that matches; that of text where it is quoted, or none does.
        text: as the YAML parser gives it, without quotes.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidValueError(f"{ascii(text)} is not Unicode text") from None
    match tag.rpartition(":")[2]:
        case "bool":
            return text == "true"
        case "null":
            return None
        case "int":
            if len(text) > 1000:
                raise InvalidValueError(f"a number of {len(text)} digits")
            return int(text)
        case "float":
            number = float(text) if len(text) <= 1000 else math.inf
            if not math.isfinite(number):
                raise InvalidValueError(f"'{text[:40]}' is too large; numbers in recipes are finite")
            return number
        case "refused":
            raise _two_readings(text)
    return text


def _two_readings(text: str) -> InvalidValueError:
    if text == "<<":
        return InvalidValueError("'<<' is YAML's merge key", "Put it in single quotes if it is meant as text.")
    if text[-1].isalpha():
        problem = f"'{text}': numbers in recipes are finite"
        return InvalidValueError(problem, "Put it in single quotes if it is meant as text.")
    number = re.sub(r"^([-+]?)0+(?=[0-9])", r"\1", text)
    problem = f"'{text}' begins with a zero"
    return InvalidValueError(problem, f"Write {number} for the number, or '{text}' in quotes for text.")


def _remedy(error: yaml.MarkedYAMLError) -> str:
    """Return what to do about the mistakes that recipes invite; PyYAML tells them apart by its words only."""
    problem = str(error.problem or error.context)
    if "escape" in problem:
        return "In double quotes a backslash is special, so put regular expressions in single quotes."
    if "\\t" in problem:
        return "Indent with spaces instead of a tab."
    if "mapping values are not allowed" in problem or "could not find expected ':'" in problem:
        return "Check the indentation, and put text that holds ': ' in single quotes."
    if "while parsing a" in str(error.context) or "cannot start any token" in problem:
        return "Close every bracket, and put regular expressions and other signs in single quotes."
    return "Check quotes and indentation."


# -- write ----------------------------------------------------------------------------------------------------------


class _Dumper(yaml.SafeDumper):
    """Quote all text that the reader would not take for that text."""

    yaml_implicit_resolvers: dict[Any, Any] = {None: KINDS}  # noqa: RUF012 - PyYAML's way to configure it

    def ignore_aliases(self, data: object) -> bool:
        return True


class _Block(dict[str, Any]):
    """Hold a mapping that is written with one key a line."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # PyYAML writes the line breaks of Unicode as they are, and reads them back as blanks; escaped they survive.
    return dumper.represent_scalar(TEXT_TAG, text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(
    _Block, lambda dumper, data: dumper.represent_mapping("tag:yaml.org,2002:map", data.items(), flow_style=False)
)


def write_yaml(plain: dict[str, Any]) -> str:
    """Write plain values as text that reads back: two levels of one key a line, what is below in one line."""
    blocks = {key: _Block(value) if isinstance(value, dict) and value else value for key, value in plain.items()}
    text = yaml.dump(
        _Block(blocks), Dumper=_Dumper, default_flow_style=True, sort_keys=False, allow_unicode=True, width=110
    )
    return str(text)
