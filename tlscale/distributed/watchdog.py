"""End a process that hangs, and print where it hung.

Promise: within a watch, a process that shows no sign of life for the time allowed writes the stack of each of its
threads to stderr and ends with exit code 1, whatever holds it: a lock, a disk, a collective that others never join.
It then lets go of the processes that wait for it, and the launcher ends the rest.
"""

from __future__ import annotations

import faulthandler
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

_LEAST_S = 1.0  # between two settings of the timer: a step may take a millisecond


class Watchdog:
    """Run a timer of the interpreter's own (a C thread, which needs no lock of Python's), set back by each `beat`."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._depth = 0
        self._set_at_s = 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch what runs within, which must beat. A watch within a watch is one watch."""
        self._depth += 1
        self._set()
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """Give a sign of life; outside of a watch it does nothing."""
        if self._depth and time.monotonic() - self._set_at_s >= min(_LEAST_S, self._timeout_s / 4):
            self._set()

    def _set(self) -> None:
        self._set_at_s = time.monotonic()
        # Not sys.stderr, which may be a notebook's or a progress bar's, without a file that C can write to.
        assert sys.__stderr__ is not None, "a process without stderr"
        faulthandler.dump_traceback_later(self._timeout_s, exit=True, file=sys.__stderr__)
