"""The seconds of a run, by what they were spent on.

Promise: the parts add up to the whole, as one part is measured at any time: a part within another is taken out of it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PARTS = ("start", "scan", "decode", "codes", "train", "evaluate", "test", "export", "save")
"""What `result.json` tells apart; `start` is all that is in no other part."""
_WAITING = "waiting"  # for batches, while training


class Stopwatch:
    """Measures the parts of a run; `with watch("decode"): ...` counts what is within as decoding."""

    def __init__(self, began_s: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin now, or at what `clock` showed when the run began."""
        self._clock = clock
        self._since_s = clock() if began_s is None else began_s
        self._current = ["start"]
        self._spent_s: dict[str, float] = {}
        self._earlier_s: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Count the time within as `part`, and not as what is around it."""
        self._settle()
        self._current.append(part)
        try:
            yield
        finally:
            self._settle()
            self._current.pop()

    def each(self, items: Iterator[Any]) -> Iterator[Any]:
        """Give the items, and count the time that they are waited for as waiting, which is a part of training."""
        while True:
            with self(_WAITING):
                item = next(items, self)
            if item is self:
                return
            yield item

    def add_earlier(self, spent_s: Mapping[str, float]) -> None:
        """Add what earlier starts of the run spent; of two accounts of the same starts the longer one holds."""
        if sum(spent_s.values()) > sum(self._earlier_s.values()):
            self._earlier_s = dict(spent_s)

    def spent(self) -> dict[str, float]:
        """Return the seconds of each part so far, over all starts: what `add_earlier` takes."""
        self._settle()
        parts = dict.fromkeys([*self._earlier_s, *self._spent_s])
        return {part: self._earlier_s.get(part, 0.0) + self._spent_s.get(part, 0.0) for part in parts}

    def total_s(self) -> float:
        """Return the seconds so far, over all starts."""
        return sum(self.spent().values())

    def train_s(self) -> float:
        """Return the seconds of training so far, over all starts; waiting for batches counts."""
        spent_s = self.spent()
        return spent_s.get("train", 0.0) + spent_s.get(_WAITING, 0.0)

    def waiting_s(self) -> float:
        """Return the seconds that training waited for batches so far, over all starts."""
        return self.spent().get(_WAITING, 0.0)

    def _settle(self) -> None:
        now_s = self._clock()
        part = self._current[-1]
        self._spent_s[part] = self._spent_s.get(part, 0.0) + now_s - self._since_s
        self._since_s = now_s

    def this_start(self) -> dict[str, Any]:
        """Return `wall_s` and `seconds` of this start alone, for `describe_seconds`."""
        self._settle()
        seconds = {part: spent_s for part, spent_s in self._spent_s.items() if part != _WAITING}
        return {"wall_s": sum(self._spent_s.values()), "seconds": seconds}

    def figures(self, images_seen: int | None = None, parts: Iterable[str] = PARTS) -> dict[str, Any]:
        """Return the keys of `result.json` that are about time.

        Args:
            images_seen: in training; None: nothing was trained.
            parts: those that are there even if they took no time.
        """
        spent_s = self.spent()
        waiting_s = spent_s.pop(_WAITING, 0.0)
        if images_seen is not None:
            spent_s["train"] = spent_s.get("train", 0.0) + waiting_s
        seconds = {part: round(spent_s.get(part, 0.0), 3) for part in dict.fromkeys([*parts, *spent_s])}
        figures: dict[str, Any] = {"wall_s": round(sum(seconds.values()), 3), "seconds": seconds}
        if images_seen is not None:
            speed = images_seen / max(spent_s["train"], 1e-9)
            figures |= {"waiting_s": round(waiting_s, 3), "images_per_s": round(speed, 1)}
        return figures


def with_seconds_of(
    runs: Sequence[Mapping[str, Any]], figures: dict[str, Any], part: str, images_seen: int
) -> dict[str, Any]:
    """Return figures with the seconds of runs, part by part, in place of those that were counted as `part` meanwhile.

    Args:
        runs: results of runs that ran within this one; with none the figures are as they were.
        figures: as `Stopwatch.figures` gives them.
        part: what their time was counted as.
        images_seen: in training, by all of them.
    """
    if not runs:
        return figures
    seconds = {name: spent_s for name, spent_s in figures["seconds"].items() if name != part}
    for run in runs:
        for name, spent_s in run["seconds"].items():
            seconds[name] = round(seconds.get(name, 0.0) + spent_s, 3)
    return {
        "wall_s": round(sum(seconds.values()), 3),
        "seconds": seconds,
        "waiting_s": round(sum(run["waiting_s"] for run in runs), 3),
        "images_per_s": round(images_seen / max(seconds["train"], 1e-9), 1),
    }


def format_duration(seconds: float) -> str:
    """Format seconds as `42s`, `5m12s`, `3h07m` or `2d04h`."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    if minutes < 1:
        return f"{rest}s"
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours < 24 else f"{hours // 24}d{hours % 24:02d}h"


def describe_seconds(figures: Mapping[str, Any]) -> str:
    """Return what `Stopwatch.figures` gave in one line: `96.1 s: start 6.0, decode 70.2, train 17.4, ...`."""
    shown = [f"{part} {spent_s:.1f}" for part, spent_s in figures["seconds"].items() if spent_s >= 0.05]
    if figures.get("waiting_s", 0.0) >= 0.05:
        waited = f" (waiting {figures['waiting_s']:.1f})"
        shown = [f"{part}{waited}" if part.startswith("train ") else part for part in shown]
    return f"{figures['wall_s']:.1f} s" + (f": {', '.join(shown)}" if shown else "")


_IMPORTED_S = time.monotonic()


def process_began_s() -> float:
    """Return when this process began, by `time.monotonic`; where there is no /proc, when this was imported."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # starttime, the 22nd field
        age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return _IMPORTED_S
    return time.monotonic() - age_s if age_s >= 0 else _IMPORTED_S  # after the import, in a fork of who made that
