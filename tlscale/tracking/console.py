"""Show a run to its user: one `Console` for messages, tables and the progress of training.

On a terminal progress is a live display below the messages, elsewhere plain lines; nothing is shown on other ranks.

Promise: no thread (so nothing is held when data workers fork), at most `REFRESHES_PER_S` redraws a second however
often `update` is called, text of others (class names, paths) shown as it is, without markup and without control
characters, and a terminal that is left as it was found, on exceptions too.
"""

from __future__ import annotations

import math
import re
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

from rich import box
from rich.console import Console as RichConsole
from rich.console import Group
from rich.live import Live
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tlscale.errors import one_line, own_lines

REFRESHES_PER_S = 5.0
_RATE_WINDOW = 32  # intervals between updates over which the rate for the ETA is the median
_BAR_WIDTH = 40
_NUMBER = re.compile(r"[-+]?[0-9][0-9.,_]*(e[-+]?[0-9]+)?\s?%?|-|")


def visible(text: object, encoding: str = "utf-8", spell: Callable[[object], str] = own_lines) -> str:
    """Spell out what a terminal would obey in `text`, and what `encoding` lacks (`\\x1b`).

    Args:
        spell: `own_lines` for messages, which may have several lines; `one_line` for names.
    """
    return spell(text).encode(encoding, "backslashreplace").decode(encoding)


def format_duration(seconds: float) -> str:
    """Format seconds as `42s`, `5m12s`, `3h07m` or `2d04h`."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    if minutes < 1:
        return f"{rest}s"
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours < 24 else f"{hours // 24}d{hours % 24:02d}h"


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


class Pace:
    """Report how far a long piece of work is, in a line every few seconds; report nothing of a short one."""

    def __init__(
        self,
        total: int | None,
        say: Callable[[str], None] | None,
        what: str,
        every_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin to count images of the work `what`.

        Args:
            total: images; None: nobody knows yet.
            say: takes a line; None: the console that `shows_progress`, if there is one.
            what: the work, for the line.
            every_s: least seconds before a line and between two.
        """
        self._total, self._say, self._what, self._every_s, self._clock = total, say, what, every_s, clock
        self._done = 0
        self._began_s = self._said_s = clock()

    def add(self, num_images: int) -> None:
        """Count so many more images as done."""
        self._done += num_images
        now_s = self._clock()
        if now_s - self._said_s < self._every_s or (self._total is not None and self._done >= self._total):
            return
        self._said_s = now_s
        say = self._say or (_progress[-1] if _progress else None)
        if say is not None:
            say(self._line(self._done / (now_s - self._began_s)))

    def _line(self, rate: float) -> str:
        if self._total is None:
            return f"{self._what}: {self._done:,} images, {rate:.0f} images/s"
        left_s = (self._total - self._done) / rate
        return (
            f"{self._what}: {self._done:,} of {self._total:,} images, {rate:.0f} images/s, "
            f"eta {format_duration(left_s)}"
        )


_progress: list[Callable[[str], None]] = []


def progress(text: str) -> None:
    """Show a line on long work, on the console that `shows_progress`, if there is one."""
    if _progress:
        _progress[-1](text)


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
        console: where to; by default standard output.
        clock: seconds, for the ETA and the refresh rate.
    """

    def __init__(
        self,
        *,
        enabled: bool = True,
        console: RichConsole | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._enabled = enabled
        self._console = console or RichConsole(highlight=False)
        self._clock = clock
        self._total_steps = 0
        self._eta = _Eta(0, clock())
        self._figures: _Figures | None = None
        self._drawn_at = -math.inf
        self._live: Live | None = None

    @contextmanager
    def begin(self, total_steps: int, step: int = 0) -> Iterator[Self]:
        """Begin to show progress, until the end of the `with` block; `step` of the steps were done before."""
        self._total_steps, self._figures, self._drawn_at = total_steps, None, -math.inf
        if self._enabled and self._console.is_terminal and not self._console.is_dumb_terminal:
            # No refresh thread: `update` draws, so a fork never finds rich's locks taken.
            self._live = Live(console=self._console, auto_refresh=False, vertical_overflow="crop")
            self._live.start()
        self._eta = _Eta(step, self._clock())
        try:
            yield self
        finally:
            self._end()

    def _end(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            try:
                if self._figures is not None:
                    live.update(self._render(self._figures))
            finally:
                live.stop()  # draws once more, shows the cursor, gives stdout and stderr back

    @contextmanager
    def shows_progress(self) -> Iterator[None]:
        """Show, within this context, how far long work is that was given no console."""
        _progress.append(self.say)
        try:
            yield
        finally:
            _progress.pop()

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
        if self._live is None:
            self._print(Text("  ".join([self._steps_text(self._figures), *self._figure_texts(self._figures)])))
        elif now - self._drawn_at >= 1 / REFRESHES_PER_S or step >= self._total_steps:
            self._drawn_at = now
            self._live.update(self._render(self._figures), refresh=True)

    def say(self, text: str, style: str | None = None) -> None:
        """Print `text` (above the display), as it is: no markup, no escape sequences."""
        if self._enabled:
            self._print(Text(visible(text, self._console.encoding), style=style or ""))

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Print a table (above the display); columns of numbers are aligned to the right, and cells are never cut."""
        if not self._enabled:
            return
        cells = [[visible(cell, self._console.encoding, one_line) for cell in row] for row in rows]
        caption = Text(visible(title, self._console.encoding, one_line))
        table = Table(title=caption, title_justify="left", box=box.SIMPLE_HEAD)
        for i, name in enumerate(columns):
            numbers = all(_NUMBER.fullmatch(row[i]) for row in cells)
            heading = Text(visible(name, self._console.encoding, one_line))
            table.add_column(heading, justify="right" if numbers else "left", overflow="fold")
        for row in cells:
            table.add_row(*(Text(cell) for cell in row))
        if self._console.is_terminal:
            self._console.print(table)
            return
        # A file or a pipe has no width; rich would take 80 columns for it, and fold the cells.
        width = Measurement.get(self._console, self._console.options.update(max_width=10_000), table).maximum
        RichConsole(file=self._console.file, width=max(width, 1), force_terminal=False).print(table)

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

    def _render(self, figures: _Figures) -> Group:
        share = figures.step / self._total_steps if self._total_steps else 1.0
        bar = Table.grid(padding=(0, 1))
        steps = self._steps_text(figures)
        width = max(4, min(_BAR_WIDTH, self._console.width - len(steps) - len("  100% ")))
        bar.add_row(
            Text(steps, style="bold"),
            ProgressBar(total=max(self._total_steps, 1), completed=figures.step, width=width),
            Text(f"{math.floor(100 * share)}%"),
        )
        return Group(bar, Text("  ".join(self._figure_texts(figures)), no_wrap=True, overflow="ellipsis"))
