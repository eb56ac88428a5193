"""Show a run to its user: one `Console` for messages, tables, and the progress of training and of other long work.

On a terminal progress is a live display below the messages, elsewhere plain lines; nothing is shown on other ranks.

Promise: no thread (so nothing is held when data workers fork), at most `REFRESHES_PER_S` redraws a second however
often `update` is called, text of others (class names, paths) shown as it is, without markup and without control
characters, and a terminal that is left as it was found, on exceptions too.
"""

from __future__ import annotations

import math
import statistics
import textwrap
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Self

from rich.console import Console as RichConsole
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tlscale.errors import one_line, own_lines
from tlscale.tracking.progress import BAR_WIDTH, REFRESHES_PER_S, Work, showing
from tlscale.tracking.stopwatch import format_duration
from tlscale.tracking.table_text import tables_that_fit

_LINE_EVERY_S = 30.0  # of a part of longer work, where there are no bars
_RATE_WINDOW = 32  # intervals between updates over which the rate for the ETA is the median


def visible(text: object, encoding: str = "utf-8", spell: Callable[[object], str] = own_lines) -> str:
    """Spell out what a terminal would obey in `text`, and what `encoding` lacks (`\\x1b`).

    Args:
        spell: `own_lines` for messages, which may have several lines; `one_line` for names.
    """
    return spell(text).encode(encoding, "backslashreplace").decode(encoding)


def _in_a_cell(text: object) -> str:
    """Return text of others as one line of a width that is known: a tab has none."""
    return one_line(text).replace("\t", "\\t")


def number(value: float | None) -> str:
    """Format a figure with four decimals; `-` where there is none."""
    return "-" if value is None else f"{value:.4f}"


@dataclass(frozen=True, slots=True)
class _Figures:
    """Hold the newest figures of the run."""

    step: int
    loss: float
    lr: float
    images_per_s: float
    epoch: float
    best: float | None


class _Eta:
    """Estimate the time left from the median time of a step.

    The median ignores what is rare and long (the first compiled step, an evaluation, a night's suspend), so the
    estimate is of training alone.
    """

    def __init__(self, step: int, now: float) -> None:
        self._last = (step, now)
        self._step_times_s: deque[float] = deque(maxlen=_RATE_WINDOW)

    def update(self, step: int, now: float) -> None:
        steps = step - self._last[0]
        if steps > 0:
            self._step_times_s.append((now - self._last[1]) / steps)
            self._last = (step, now)

    def left_s(self, steps: int) -> float | None:
        return steps * statistics.median(self._step_times_s) if self._step_times_s else None


class Console:
    """Show messages and tables, and between `begin` and its end the progress of training: one object for a command.

    A command makes it, and hands it to all that has something to say; the training loop shows its progress on the same
    object, so that messages from within go above the display:

        console = Console(enabled=processes.is_main)
        with console.begin(total_steps, step):
            console.update(step, loss=..., lr=..., images_per_s=..., epoch=...)
            console.say("saved")

    Args:
        enabled: False on all ranks but the main one: then nothing is shown and every method does nothing.
        stderr: show it on standard error, of a command whose standard output is data.
        console: where to, in place of these.
        clock: seconds, for the ETA and the refresh rate.
    """

    def __init__(
        self,
        *,
        enabled: bool = True,
        stderr: bool = False,
        console: RichConsole | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._enabled = enabled
        self._console = console or RichConsole(stderr=stderr, highlight=False)
        self._clock = clock
        self._total_steps = 0
        self._eta = _Eta(0, clock())
        self._figures: _Figures | None = None
        self._drawn_at = -math.inf
        self._live: Live | None = None
        self._trains = False
        self._work: Work | None = None
        self._part: str | None = None
        self._noted: set[str] = set()  # in any part
        self._said_s = clock()

    @property
    def has_bars(self) -> bool:
        """Return whether progress is a live display, and no lines."""
        return self._enabled and self._console.is_terminal and not self._console.is_dumb_terminal

    @contextmanager
    def begin(self, total_steps: int, step: int = 0) -> Iterator[Self]:
        """Begin to show progress, until the end of the `with` block; `step` of the steps were done before."""
        self.end_work()
        self._total_steps, self._figures, self._drawn_at = total_steps, None, -math.inf
        if self.has_bars:
            self._go_live(transient=self._part is not None)
        self._trains = True
        self._eta = _Eta(step, self._clock())
        try:
            yield self
        finally:
            self._end()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Show of a part of longer work, within this context, what differs from part to part.

        A message is shown behind the part's name, and once, whichever parts have it; warnings each time. Bars vanish
        when they are done. Tables are not shown, nor what `detail` is given, but for a line now and then where there
        are no bars.
        """
        self._part, self._said_s = name, self._clock()
        try:
            yield
        finally:
            self._part = None

    def _go_live(self, *, transient: bool = False) -> None:
        # No refresh thread: `update` draws, so a fork never finds rich's locks taken. Data on standard output stay
        # there while a bar is on standard error.
        self._live = Live(
            console=self._console,
            auto_refresh=False,
            vertical_overflow="crop",
            transient=transient,
            redirect_stdout=not self._console.stderr,
        )
        self._live.start()

    def _end(self) -> None:
        self._work = None
        last = self._render()
        live, self._live, self._trains = self._live, None, False
        if live is not None:
            try:
                live.update(last)
            finally:
                live.stop()  # draws once more, shows the cursor, gives stdout and stderr back

    def show_work(self, work: Work) -> None:
        """Show how far long work is, on a console that `has_bars`: below the figures of training, where it trains."""
        self._work = work
        if self._live is None:
            self._go_live(transient=True)
        assert self._live is not None
        self._live.update(self._render(), refresh=True)

    def end_work(self) -> None:
        """Take away what `show_work` shows."""
        self._work = None
        if self._live is not None and not self._trains:
            self._end()

    @contextmanager
    def shows_progress(self) -> Iterator[None]:
        """Show, within this context, how far long work is that was given no console."""
        showing.append(self)
        try:
            yield
        finally:
            showing.pop()
            self.end_work()

    def update(
        self, step: int, *, loss: float, lr: float, images_per_s: float, epoch: float, best: float | None = None
    ) -> None:
        """Show new figures: redraw the display, or print a line where there is no terminal (so call it at log points).

        Args:
            loss: of the last log interval.
            images_per_s: over all processes.
            epoch: epochs done, a fraction.
            best: best validation figure so far.
        """
        if not self._enabled:
            return
        now = self._clock()
        self._eta.update(step, now)
        self._figures = _Figures(step, loss, lr, images_per_s, epoch, best)
        if self._live is None or not self._trains:
            self.detail("  ".join([self._steps_text(self._figures), *self._figure_texts(self._figures)]))
        elif now - self._drawn_at >= 1 / REFRESHES_PER_S or step >= self._total_steps:
            self._drawn_at = now
            self._live.update(self._render(), refresh=True)

    def say(self, text: str, style: str | None = None, *, indent: int = 0) -> None:
        """Print `text` (above the display), as it is: no markup, no escape sequences.

        Args:
            indent: columns before the lines but the first, where a terminal is too narrow for one.
        """
        if not self._enabled:
            return
        if self._part is not None:
            if style is None and text in self._noted:
                return
            self._noted.add(text)
        self._show(text, style, indent)

    def _show(self, text: str, style: str | None = None, indent: int = 0) -> None:
        text = text if self._part is None else f"{self._part}: {text}"
        self._said_s = self._clock()
        shown = visible(text, self._console.encoding)
        if indent and self._console.is_terminal and indent < self._console.width // 2:
            wrap = partial(
                textwrap.fill, width=self._console.width, subsequent_indent=" " * indent, break_on_hyphens=False
            )
            shown = "\n".join(map(wrap, shown.split("\n")))
        self._print(Text(shown, style=style or ""))

    def detail(self, text: str) -> None:
        """Print a line on work that goes as it should, as `say` does; within a `part` only where nobody saw any."""
        if self._part is None:
            self.say(text)
        elif self._enabled and not self.has_bars and self._clock() - self._said_s >= _LINE_EVERY_S:
            self._show(text)

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, num_keys: int = 1) -> None:
        """Print a table (above the display), as wide as the terminal at most; elsewhere as 80 columns, or $COLUMNS.

        What is longer is wrapped, and what has too many columns is printed as several tables. Only a word that is too
        long alone (a path) makes it wider, where it is no terminal. Numbers are aligned to the right.

        Args:
            num_keys: so many columns begin each of several tables.
        """
        if not self._enabled or self._part is not None:
            return
        encoding = self._console.encoding
        cells = [[visible(cell, encoding, _in_a_cell) for cell in row] for row in rows]
        heads = [visible(name, encoding, _in_a_cell) for name in columns]
        screen = self._console
        breaks_words = screen.is_terminal
        for width, table in tables_that_fit(
            visible(title, encoding, one_line), heads, cells, screen.width, breaks_words=breaks_words, num_keys=num_keys
        ):
            to = screen if breaks_words else RichConsole(file=screen.file, width=width, force_terminal=False)
            to.print(table)

    def _print(self, text: Text) -> None:
        self._console.print(text, soft_wrap=not self._console.is_terminal, highlight=False)

    def _steps_text(self, figures: _Figures) -> str:
        total = str(self._total_steps)
        return f"step {figures.step:>{len(total)}}/{total}"

    def _figure_texts(self, figures: _Figures) -> list[str]:
        left_s = self._eta.left_s(max(0, self._total_steps - figures.step))
        texts = [
            f"epoch {figures.epoch:.1f}",
            f"loss {figures.loss:.4f}",
            f"lr {figures.lr:.1e}",
            f"{figures.images_per_s:.0f} images/s"
            if figures.images_per_s < 1e5
            else f"{figures.images_per_s:.1e} images/s",
            f"eta {format_duration(left_s)}" if left_s is not None else "eta --",
        ]
        return texts if figures.best is None else [*texts, f"best {figures.best:.4f}"]

    def _render(self) -> Group:
        training = self._render_training(self._figures) if self._trains and self._figures is not None else ()
        return Group(*training, *([] if self._work is None else [self._work.render(self._console.width)]))

    def _render_training(self, figures: _Figures) -> Iterator[RenderableType]:
        share = figures.step / self._total_steps if self._total_steps else 1.0
        bar = Table.grid(padding=(0, 1))
        steps = self._steps_text(figures)
        width = max(4, min(BAR_WIDTH, self._console.width - len(steps) - len("  100% ")))
        bar.add_row(
            Text(steps, style="bold"),
            ProgressBar(total=max(self._total_steps, 1), completed=figures.step, width=width),
            Text(f"{math.floor(100 * share)}%"),
        )
        yield bar
        yield Text("  ".join(self._figure_texts(figures)), no_wrap=True, overflow="ellipsis")
