"""Errors that tlscale raises on purpose, as data.

Promise: such an error says which key or thing it is about, what is wrong with it and what to do, as data; it is
rendered in one place, `render`. The command line prints it without a traceback and exits with `exit_code`. Anything
else that escapes is a bug of ours.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, ParamSpec, Self, TypeAlias, TypeVar

if TYPE_CHECKING:
    from tlscale.recipe.mistakes import Mistake

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: saved, run the same line again with --resume

# What a terminal obeys instead of showing it: C0 and C1 controls but for the tab (escape sequences begin with them),
# line breaks of Unicode, what turns the direction of text; and surrogates, which stand for bytes that are no UTF-8.
_OBEYED = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_MOST_SHOWN = 100  # mistakes of a recipe
_LONGEST_QUOTED = 1_000
_LONGEST_NAME, _MOST_NAMES = 200, 20_000  # that are compared with one that does not exist: a second's work
P = ParamSpec("P")
R = TypeVar("R")
E = TypeVar("E", bound="TlscaleError")
_OWN_BREAK = "\n  "  # lines of ours after the first are indented, and no other line is ours


@dataclass(frozen=True, slots=True)
class Wording:
    """Hold a text that names options in both of its forms. Other text is joined to it by `+`, not by an f-string."""

    shell: str
    """As the command line shows it: `--out DIR writes elsewhere`."""
    python: str
    """As Python shows it: `out=DIR writes elsewhere`."""

    def __add__(self, other: Text) -> Wording:
        return Wording(self.shell + _in_shell(other), self.python + _in_python(other))

    def __radd__(self, other: str) -> Wording:
        return Wording(other + self.shell, other + self.python)

    def __str__(self) -> str:
        return self.shell


Text: TypeAlias = str | Wording


def option(name: str, value: str = "", *, argument: str = "") -> Wording:
    """Name an option of the command line: in Python it is an argument, by default of the same name."""
    argument = argument or name.replace("-", "_")
    return Wording(f"--{name} {value}", f"{argument}={value}") if value else Wording(f"--{name}", argument)


def flag(name: str) -> Wording:
    """Name an option that takes no value: in Python it is an argument that is True."""
    return Wording(f"--{name}", f"{name.replace('-', '_')}=True")


def _in_shell(text: Text) -> str:
    return text if isinstance(text, str) else text.shell


def _in_python(text: Text) -> str:
    return text if isinstance(text, str) else text.python


def render(problem: str, key: str | None = None, remedy: str | None = None) -> str:
    """Return `key: problem. remedy`, without the parts that are not there; after a list, on a line of its own."""
    about = problem if key is None else f"{key}: {problem}"
    return f"{about}{_OWN_BREAK if _OWN_BREAK in about else '. '}{remedy}" if remedy else about


def one_line(text: object) -> str:
    """Return text of others (names, paths) as one line, with what a terminal would obey spelt out (`\\x1b`, `\\n`)."""
    return _OBEYED.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), str(text))


def counted(count: int, noun: str) -> str:
    """Return a number with what is counted: `1 group`, `2,000 groups`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def first_line(error: BaseException) -> str:
    """Return what a library says in one line of at most 200 characters."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else "no message"


def kind_and_line(error: BaseException) -> str:
    """Return `OSError: ` and what it says in one line."""
    return f"{type(error).__name__}: {first_line(error)}"


def first_sentence(error: BaseException) -> str:
    """Return the first sentence of what a library says: what follows is its advice on its own options."""
    return first_line(error).split(". ")[0]


def kind_of_file(mode: int) -> str:
    """Return what `st_mode` says a file is, in words."""
    kinds = ((stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISDIR, "a folder"))
    return next((words for is_kind, words in kinds if is_kind(mode)), "a device")


def irregular_mode(mode: int) -> str | None:
    """Return what `st_mode` says a file is, in words, where it is no regular one."""
    return None if stat.S_ISREG(mode) else f"{kind_of_file(mode)}, no regular file"


def irregular(path: str | os.PathLike[str]) -> str | None:
    """Return what a file is in words where it is no regular one: reading a pipe or a device may never end.

    None as well where nothing is there, or cannot be looked at: opening it says why.
    """
    try:
        return irregular_mode(os.stat(path).st_mode)
    except (OSError, ValueError):  # ValueError: a zero in the name
        return None


def is_unicode(text: str) -> bool:
    """Return whether text has a form in UTF-8: names of files may hold bytes that have not."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def own_lines(text: object) -> str:
    """Return a message of ours as `one_line`, but for the breaks before its indented lines."""
    return _OWN_BREAK.join(map(one_line, str(text).split(_OWN_BREAK)))


def sentences(*parts: str) -> str:
    """Join sentences by a blank; empty ones are skipped."""
    return " ".join(part for part in parts if part)


class TlscaleError(Exception):
    """Raised when a run fails for a reason that we can name.

    Attributes:
        in_python: it is shown to a caller in Python, so it names arguments in place of options.
        reported_by_main: the main process raises it as well, and another need not report it again. True for what all
            processes find at once; set on what one process hands to the others.
    """

    exit_code = EXIT_FAILED
    in_python = False
    reported_by_main = False

    def __init__(self, problem: Text, *, key: Text | None = None, remedy: Text | None = None) -> None:
        super().__init__(str(problem))
        self._said = problem, key, remedy

    @property
    def problem(self) -> str:
        """Return what is wrong; without a full stop where there is a remedy."""
        return self._shown(self._said[0])

    @property
    def key(self) -> str | None:
        """Return what it is about: a key of the recipe (`optim.lr`), or an option of the command line."""
        return None if self._said[1] is None else self._shown(self._said[1])

    @property
    def remedy(self) -> str | None:
        """Return what to do, as a sentence."""
        return None if self._said[2] is None else self._shown(self._said[2])

    def _shown(self, text: Text) -> str:
        return _in_python(text) if self.in_python else _in_shell(text)

    def recast(self, kind: type[E], key: Text | None, *, before: str = "") -> E:
        """Return the error as one of another kind, about `key`, with `before` put before its problem."""
        problem, _, remedy = self._said
        return kind(before + problem, key=key, remedy=remedy)

    def __str__(self) -> str:
        return own_lines(render(self.problem, self.key, self.remedy))


class RecipeError(TlscaleError):
    """Raised when the recipe, or an override of it, is wrong.

    Attributes:
        mistakes: each with its file and line; empty where the recipe does not fit what it names. Of a single mistake
            `key`, `problem` and `remedy` are those of the error too.
    """

    exit_code = EXIT_BAD_INPUT
    reported_by_main = True
    mistakes: tuple[Mistake, ...] = ()

    @classmethod
    def of(cls, mistakes: Sequence[Mistake]) -> Self:
        """Return the error for all mistakes of a recipe, at least one."""
        if len(mistakes) == 1:
            error = cls(mistakes[0].problem, key=mistakes[0].key, remedy=mistakes[0].remedy)
        else:
            error = cls(f"{len(mistakes)} mistakes in the recipe")
        error.mistakes = tuple(mistakes)
        return error

    def __str__(self) -> str:
        lines = [mistake.shown(in_python=self.in_python) for mistake in self.mistakes[:_MOST_SHOWN]]
        if len(self.mistakes) > _MOST_SHOWN:
            lines.append(f"and {len(self.mistakes) - _MOST_SHOWN:,} more")
        if len(lines) > 1:
            return "\n".join([f"{self.problem}:", *lines])
        return lines[0] if lines else super().__str__()


class DataError(TlscaleError):
    """Raised when the data that the recipe names are missing or wrong."""

    exit_code = EXIT_BAD_INPUT


class ModelError(TlscaleError):
    """Raised when the backbone, its weights, the freeze rules and the head do not fit together."""

    exit_code = EXIT_BAD_INPUT


class RunFolderError(TlscaleError):
    """Raised when the run folder is in use, not ours, or holds another run."""

    exit_code = EXIT_BAD_INPUT


class LaunchError(TlscaleError):
    """Raised when the processes that were launched are not those that the recipe or the launcher asked for."""

    exit_code = EXIT_BAD_INPUT
    reported_by_main = True


class CheckpointError(TlscaleError):
    """Raised when a checkpoint is damaged, or was made by another recipe."""


class ResumeError(CheckpointError):
    """Raised when the run cannot be resumed with this recipe or these inputs; its checkpoints are fine."""

    exit_code = EXIT_BAD_INPUT


class WorkerError(TlscaleError):
    """Raised when a process that reads images was killed."""


class DeviceMemoryError(TlscaleError):
    """Raised when the device has no memory left for what the recipe asks."""


class NonFiniteLossError(TlscaleError):
    """Raised when the loss, a gradient or a weight became NaN or infinite.

    Attributes:
        step: the step, counted from 1, that made it so.
    """

    reported_by_main = True

    def __init__(self, problem: Text, step: int = 0, *, key: Text | None = None, remedy: Text | None = None) -> None:
        super().__init__(problem, key=key, remedy=remedy)
        self.step = step


class DesyncError(TlscaleError):
    """Raised when the processes do not have the same weights any more."""

    reported_by_main = True


class Stopped(TlscaleError):  # noqa: N818 (a stop is no error)
    """Raised when the run was told to stop, and has saved itself: no failure."""

    exit_code = EXIT_STOPPED
    reported_by_main = True


def suggestion(word: str, known: Iterable[str], limit: int = 3) -> str:
    """Return `Did you mean 'x' or 'y'?` with the names in `known` nearest to `word`; empty when none is near."""
    names = [] if len(word) > _LONGEST_NAME else [name for name in known if len(name) <= _LONGEST_NAME]
    near = difflib.get_close_matches(word, names[:_MOST_NAMES], n=limit, cutoff=0.6)
    return f"Did you mean {' or '.join(repr(name) for name in near)}?" if near else ""


def first_few(items: Sequence[str], limit: int = 5) -> str:
    """Return `a, b, c and 7 more`: no more names in a message than anybody reads."""
    rest = len(items) - limit
    return ", ".join(items[:limit]) + (f" and {rest:,} more" if rest > 0 else "")


def quoted(names: Iterable[str]) -> list[str]:
    """Return names as a message shows them: in quotes, with unprintable characters escaped, and not without end."""
    return [
        repr(name) if len(name) <= _LONGEST_QUOTED else f"{name[:_LONGEST_NAME]!r}... ({len(name):,} characters)"
        for name in names
    ]


def quoted_list(names: Sequence[str], limit: int = 20) -> str:
    return first_few(quoted(names), limit) if names else "none"


def speaks_python(function: Callable[P, R]) -> Callable[P, R]:
    """Let the errors that leave `function` name arguments (`resume=True`) where they name options (`--resume`)."""

    @wraps(function)
    def wrapper(*args: P.args, **keys: P.kwargs) -> R:
        try:
            return function(*args, **keys)
        except TlscaleError as error:
            error.in_python = True
            error.args = (error.problem, *error.args[1:])
            raise

    return wrapper
