"""How far long work is: a bar on a terminal, lines elsewhere, on whatever screen shows it.

Promise: work that is over soon shows nothing; nobody has to be given a screen in order to report.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

from rich.console import RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tlscale.tracking.stopwatch import format_duration

REFRESHES_PER_S = 5.0
BAR_WIDTH = 40
_LEAST_BAR = 4
_BAR_AFTER_S = 0.5  # work that is over by then has no bar
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Work:
    """Hold how far a piece of long work is."""

    what: str
    done: int
    total: int | None
    """None: nobody knows yet."""
    rest: str
    """What else there is to tell."""

    def render(self, width: int) -> RenderableType:
        """Return a bar, in a line of at most so many columns; a long path loses its middle, the figures nothing."""
        rest = Text(self.rest, no_wrap=True, overflow="ellipsis")
        if self.total is None:
            return Text(f"{_shortened(self.what, width - len(self.rest) - 2)}: ", no_wrap=True) + rest
        share = f"{math.floor(100 * self.done / max(self.total, 1))}%"
        room = width - len(share) - len(self.rest) - 6
        what = _shortened(self.what, room - _LEAST_BAR)
        length = max(_LEAST_BAR, min(BAR_WIDTH, room - len(what)))
        row = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=max(self.total, 1), completed=self.done, width=length)
        row.add_row(Text(what, no_wrap=True), bar, Text(share), rest)
        return row


def _shortened(text: str, room: int) -> str:
    if len(text) <= max(room, 10):
        return text
    half = max(room, 10) // 2
    return f"{text[:half]}…{text[len(text) - half + 1 :]}"


class Screen(Protocol):
    """Show progress; see `console.Console`."""

    @property
    def has_bars(self) -> bool: ...

    def detail(self, text: str) -> None: ...

    def show_work(self, work: Work) -> None: ...

    def end_work(self) -> None: ...


class Pace:
    """Report how far a long piece of work is, in a line every few seconds; report nothing of a short one.

    On a terminal it is a bar. Where the end is not sure to be counted, use it in a `with`, which takes the bar away.
    """

    def __init__(
        self,
        total: int | None,
        what: str,
        console: Screen | None = None,
        every_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin to count images of the work `what`.

        Args:
            total: images; None: nobody knows yet.
            what: the work, for the line.
            console: where to; None: the console that `shows_progress`, if there is one.
            every_s: least seconds before a line and between two.
        """
        self._total, self._what, self._console, self._every_s, self._clock = total, what, console, every_s, clock
        self._done = 0
        self._began_s = self._said_s = clock()
        self._look_s = self._began_s + min(_BAR_AFTER_S, every_s)
        self._has_bar_on: Screen | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.end()

    def add(self, num_images: int) -> None:
        """Count so many more images as done."""
        self._done += num_images
        if self._total is not None and self._done >= self._total:
            self.end()
        elif (now_s := self._clock()) >= self._look_s:
            self._look_s = self._report(now_s)

    def end(self) -> None:
        """Take the bar away."""
        if self._has_bar_on is not None:
            self._has_bar_on.end_work()
            self._has_bar_on = None

    def _report(self, now_s: float) -> float:
        """Show how far it is, where that is due; return when to look again."""
        console = self._console or (showing[-1] if showing else None)
        if console is None:
            return now_s + self._every_s
        rest = self._rest(self._done / (now_s - self._began_s))
        if console.has_bars:
            console.show_work(Work(self._what, self._done, self._total, rest))
            self._has_bar_on = console
            return now_s + 1 / REFRESHES_PER_S
        if now_s - self._said_s >= self._every_s:
            self._said_s = now_s
            console.detail(f"{self._what}: {rest}")
        return self._said_s + self._every_s

    def _rest(self, rate: float) -> str:
        if self._total is None:
            return f"{self._done:,} images, {rate:.0f} images/s"
        left_s = (self._total - self._done) / rate
        return f"{self._done:,} of {self._total:,} images, {rate:.0f} images/s, eta {format_duration(left_s)}"


showing: list[Screen] = []
"""Those that show how far long work is that was given none; the last one does."""


def progress(text: str) -> None:
    """Show a line on long work, on the console that `shows_progress`, if there is one."""
    if showing:
        showing[-1].detail(text)


def each(items: Sequence[T], describe: Callable[[T], str]) -> Iterator[T]:
    """Give the items, the work on each of which is long, and show which one it is: by a line for each, or a bar."""
    console = showing[-1] if showing else None
    for number, item in enumerate(items, start=1):
        if console is not None and console.has_bars:
            console.show_work(Work(describe(item), number - 1, len(items), f"{number} of {len(items)}"))
        elif console is not None:
            console.detail(f"{describe(item)} ({number} of {len(items)})")
        yield item
    if console is not None and console.has_bars:
        console.end_work()
