"""End a process that hangs, and print where it hung.

Promise: within a watch, a process that shows no sign of life for the time allowed writes the stack of each of its
threads to stderr and ends with exit code 1, whether it waits for a lock, a disk, or a collective that others never
join. It then lets go of the processes that wait for it, and the launcher ends the rest. Only time in which the process
could run is counted: one that is paused (SIGSTOP, a scheduler's suspend, a laptop's sleep) for longer than allowed goes
on where it was.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

_MOST_TICK_S = 1.0


class Watchdog:
    """Count the seconds since the last `beat` in a thread of its own, in ticks.

    A tick that took longer than it was to take counts as two at most: the process did not run meanwhile.

    Args:
        timeout_s: seconds without a sign of life.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._depth = 0
        self._beats = 0
        self._watch = 0  # its number: the thread of one that is over ends by itself

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch what runs within, which must beat. A watch within a watch is one watch."""
        self._depth += 1
        self._beats += 1
        if self._depth == 1:
            self._watch += 1
            # No lock that is held while data workers fork, and none to wait for at the end.
            threading.Thread(target=self._count, args=(self._watch,), name="watchdog", daemon=True).start()
        try:
            yield
        finally:
            self._depth -= 1

    def beat(self) -> None:
        """Give a sign of life; outside of a watch it does nothing."""
        self._beats += 1

    def _count(self, watch: int) -> None:
        tick_s = min(_MOST_TICK_S, self._timeout_s / 8)
        beats, quiet_s, last_s = self._beats, 0.0, time.monotonic()
        while self._depth and self._watch == watch:
            time.sleep(tick_s)
            now_s = time.monotonic()
            quiet_s += min(now_s - last_s, 2 * tick_s)
            last_s = now_s
            if self._beats != beats:
                beats, quiet_s = self._beats, 0.0
            if quiet_s >= self._timeout_s and self._depth and self._watch == watch:
                self._end()

    def _end(self) -> None:
        # Not sys.stderr, which may be a notebook's or a progress bar's, without a file that C can write to.
        assert sys.__stderr__ is not None, "a process without stderr"
        sys.__stderr__.write(f"Timeout ({timedelta(seconds=self._timeout_s)})!\n")
        sys.__stderr__.flush()
        faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        os._exit(1)
