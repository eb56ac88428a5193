"""Tell where training waits for images: measured in the first steps, and said once.

Promise: nothing is changed by it. How many processes read images is decided before the first step, so that a run and
its resumption read in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from tlscale.tracking.stopwatch import Stopwatch

_FEWEST_STEPS = 8  # that are measured, after those of the first log line
_MOST_SHARE = 0.15  # of the time


class ReadingCheck:
    """Compare the time that training waits for images with all of its time.

    Args:
        workers: processes that read images for this one, None: it trains on no images, or on a device whose cores they
            would take.
        most: as many as there are cores for.
        say: takes the line.
    """

    def __init__(self, watch: Stopwatch, workers: int | None, most: int, say: Callable[[str], None]) -> None:
        self._watch, self._workers, self._most, self._say = watch, workers, most, say
        self._began: tuple[int, float, float, float] | None = None

    def at_line(self, step: int, settled_s: float) -> None:
        """Take a log line: the number of steps done, and the seconds that the host has waited for the device so far."""
        if self._workers is None:
            return
        now = step, self._watch.train_s(), self._watch.waiting_s(), settled_s
        if self._began is None:  # workers begin, algorithms are tried, code is compiled: not what it will be
            self._began = now
        steps, train_s, waiting_s, settled_s = (new - old for new, old in zip(now, self._began, strict=True))
        if steps < _FEWEST_STEPS or train_s <= 0:
            return
        # A device that is behind has work while the host waits for images: then they are not what is waited for.
        if waiting_s > _MOST_SHARE * train_s > settled_s:
            self._say(_advice(self._workers, self._most, waiting_s, train_s))
        self._workers = None


def _advice(workers: int, most: int, waiting_s: float, train_s: float) -> str:
    """Tell what is waited for, and how many processes would read as fast as is trained."""
    computing_s = max(train_s - waiting_s, 1e-3 * train_s)
    # Those that are there read all the time; without any, this process reads while nothing is computed.
    enough = math.ceil(workers * train_s / computing_s) if workers else math.ceil(waiting_s / computing_s)
    what = f"training waits for images {waiting_s / train_s:.0%} of the time"
    if enough <= most:
        return f"{what}: data.workers={enough} would do (now {workers})"
    better = f"data.workers={most} reads faster (now {workers}), but " if most > workers else ""
    return (
        f"{what}: {better}it would take {enough} processes, and there are cores for {most}. Smaller files, or "
        "data.cache_mib for all images, decoded, take less"
    )
