"""Agree on a stop without a collective operation in each step.

A signal reaches one process, or all of them in different steps; they have to stop after the same one. To ask all of
them in every step would make each wait for the slowest, for a flag that is hardly ever set. So they ask every k steps,
and agree on k each time they ask: as many steps as took the slowest process `every_s` seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from tlscale.distributed.processes import Processes
from tlscale.distributed.signals import is_stopping


class StopPoll:
    """Tell all processes, at steps that they agree on, whether any of them was asked to stop.

    A single process reads its own flag in every step. `every_s` is the longest time between two questions, as far as
    the time of past steps tells; `step` the number of steps done.
    """

    def __init__(
        self,
        processes: Processes,
        step: int,
        every_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._processes, self._every_s, self._clock = processes, every_s, clock
        self._asked_at, self._asked_s = step, clock()
        self._interval = 1
        self.num_asked = 0

    def is_stopping(self, step: int, *, now: bool = False) -> bool:
        """Return the same answer on every process: whether the run is to stop after this step.

        Each process calls it after each step, with the number of steps done. `now` asks in this step in any case, as
        what follows takes long; it has to be the same on every process.
        """
        if self._processes.world_size == 1:
            return is_stopping(now=True)
        if not now and step < self._asked_at + self._interval:
            return False
        now_s = self._clock()
        step_s = (now_s - self._asked_s) / max(step - self._asked_at, 1)
        answers = self._processes.gather((is_stopping(now=True), step_s))
        slowest_s = max(step_s for _, step_s in answers)
        # At most twice the last interval: the first steps may be faster than those to come, which are not yet known.
        self._interval = max(min(2 * self._interval, int(self._every_s / max(slowest_s, 1e-6))), 1)
        # From after the answers: a process that had to wait for them has not been computing.
        self._asked_at, self._asked_s = step, self._clock()
        self.num_asked += 1
        return any(requested for requested, _ in answers)
