"""Mistakes in a recipe as data: where, which key and value, what is wrong, what to do.

Promise: each is rendered once, in one line, by `Mistake.__str__`; nothing looks for words in a message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tlscale.errors import render


class InvalidValueError(ValueError):
    """Raised when a check of a value, or of the keys of a section, fails.

    Attributes:
        problem: what is wrong.
        remedy: what to do, as a sentence.
        keys: those that the check is about, from the section that it belongs to: first the one that is wrong, then
            those that it does not go with. None where a single value is checked, whose key is known.
    """

    def __init__(self, problem: str, remedy: str | None = None, *, keys: Sequence[str] = ()) -> None:
        super().__init__(render(problem, keys[0] if keys else None, remedy))
        self.problem = problem
        self.remedy = remedy
        self.keys = tuple(keys)


@dataclass(frozen=True, slots=True)
class Origin:
    """Tell where a value was written: a line of a file, or (line 0) the command line."""

    where: str
    line: int = 0
    in_python: str | None = None
    """What Python's callers read in place of `where`; None: the same."""

    def __str__(self) -> str:
        return f"{self.where}:{self.line}" if self.line else self.where


@dataclass(frozen=True, slots=True)
class Mistake:
    """Hold one mistake in a recipe, or in an override of it.

    Attributes:
        origin: the file and line, or the override.
        problem: what is wrong.
        key: with dots, and items of lists by number from 0; None where it is of no single key.
        value: as it stands in the recipe, shortened.
        remedy: what to do, as a sentence.
    """

    origin: Origin
    problem: str
    key: str | None = None
    value: str | None = None
    remedy: str | None = None

    def __str__(self) -> str:
        """Render it in one line; what the user wrote is in it, so line breaks and terminal codes are escaped."""
        return self.shown(in_python=False)

    def shown(self, *, in_python: bool) -> str:
        """Render it as `str` does, or as a caller in Python reads it."""
        about = self.key if self.value is None else f"{self.key} = {self.value}"
        origin = self.origin.in_python if in_python and self.origin.in_python is not None else self.origin
        said = f"{origin}: {render(self.problem, about, self.remedy)}"
        return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in said)


@dataclass(slots=True)
class Findings:
    """Collect mistakes found so far, and what they make unknowable, so that no mistake is reported twice.

    Attributes:
        mistakes: in the order they were found.
        lost_keys: keys whose value could not be read.
        incomplete: a file that should have contributed is missing.
    """

    mistakes: list[Mistake] = field(default_factory=list)
    lost_keys: set[str] = field(default_factory=set)
    incomplete: bool = False

    def add(
        self,
        origin: Origin,
        problem: str,
        remedy: str | None = None,
        *,
        key: str | None = None,
        value: str | None = None,
    ) -> None:
        self.mistakes.append(Mistake(origin, problem, key, value, remedy))
