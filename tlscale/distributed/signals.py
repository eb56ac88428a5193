"""Receive requests to stop: SIGTERM (a cluster takes the machine back), SIGINT (Ctrl-C), or STOP in the run folder.

Promise: the first request only sets a flag, which every long loop asks for by `check_stop`; so what is finished is
kept, and the process ends with `Stopped`. A second request ends it at once: Ctrl-C, or SIGTERM where no launcher may
have repeated its own. The file is a control file that reaches a run behind any launcher, also one that passes no signal
on; a request to one process reaches all of them, whatever they are at.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Protocol

from tlscale.errors import Stopped, Text
from tlscale.storage import faults

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LOOK_EVERY_S = 0.5  # between two looks at a disk or at other processes
_SAME_S = 1.0  # a SIGTERM so soon after the first is the same request: `timeout` and schedulers send it twice
_PR_SET_PDEATHSIG = 1  # of prctl(2)


def stop_with_launcher() -> None:
    """Ask this process to stop when its launcher dies (Linux).

    `accelerate launch` of one process neither passes SIGTERM on nor ends its child: a cluster that takes the machine
    back would end the launcher alone, and the run would continue, unsaved and unwatched.
    """
    if _is_launched():
        signal_when_parent_dies(signal.SIGTERM)


def signal_when_parent_dies(number: signal.Signals) -> None:
    """Send this process a signal when the one that started it dies, by the kernel; only Linux can."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number)


def _is_launched() -> bool:
    return "ACCELERATE_MIXED_PRECISION" in os.environ or "LOCAL_RANK" in os.environ


class Peers(Protocol):
    """Pass a request on between the processes of a run, without any of them waiting."""

    def tell(self) -> None:
        """Tell the others that this process was asked to stop."""

    def are_told(self) -> bool:
        """Report whether one of them was."""


class StopRequest:
    """Set `requested`, within this context, when the process is asked to stop: by a signal, or by `file` being there.

    Within another context of its kind it takes over what was asked there, and hands on what is asked of it.

    Args:
        file: a control file that asks for it by being there. It is looked for on every call, so only one process of a
            run should be given it.
        peers: the other processes of the run.
        look: called now and then while something asks, by the main thread alone.

    Attributes:
        by: the signal or the file that asked.
    """

    def __init__(
        self, file: Path | None = None, peers: Peers | None = None, look: Callable[[], None] | None = None
    ) -> None:
        self.by = ""
        self._file, self._peers, self._look = file, peers, look
        self._requested = self._has_told = False
        self._first_s = self._looked_s = 0.0
        self._before: dict[signal.Signals, Any] = {}
        self._outer: StopRequest | None = None

    @property
    def requested(self) -> bool:
        """Tell whether the process was asked to stop."""
        if not self._requested and self._file is not None and os.path.lexists(self._file):
            self._requested, self.by = True, f"the file '{self._file}'"
            self._first_s = time.monotonic()
        return self._requested

    def is_heard(self, *, now: bool = False) -> bool:
        """Tell whether the process, or another one of its run, was asked to stop; to ask costs next to nothing.

        Args:
            now: look at the file in any case.
        """
        now_s = time.monotonic()
        if now or now_s - self._looked_s >= _LOOK_EVERY_S:
            self._looked_s = now_s
            self._look_around()
        return self._requested

    def _look_around(self) -> None:
        if self._look is not None and threading.current_thread() is threading.main_thread():
            self._look()
        if self.requested and self._peers is not None and not self._has_told:
            self._has_told = True
            self._peers.tell()
        elif not self._requested and self._peers is not None:
            self._requested = self._peers.are_told()

    def __enter__(self) -> StopRequest:
        if _active:
            self._outer = _active[-1]
            self._requested, self.by, self._first_s = self._outer.requested, self._outer.by, self._outer._first_s
        _active.append(self)
        # Python allows signal handlers in the main thread only; elsewhere (a notebook's worker) the file alone asks.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        _active.remove(self)
        if self._outer is not None and self._requested and not self._outer._requested:
            self._outer._requested, self._outer.by, self._outer._first_s = True, self.by, self._first_s

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._first_s and number == signal.SIGINT:
            raise KeyboardInterrupt
        # A launcher sends its processes SIGTERM when one of them has stopped: that is no second request.
        if self._first_s and not _is_launched() and time.monotonic() - self._first_s > _SAME_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if not self._requested:
            self._requested, self.by = True, signal.Signals(number).name
        self._first_s = self._first_s or time.monotonic()


_active: list[StopRequest] = []


def is_stopping(*, now: bool = False) -> bool:
    """Tell whether this process was asked to stop, where work is ended in another way than by `check_stop`.

    Args:
        now: look at the control file in any case, and not twice a second.
    """
    return bool(_active) and _active[-1].is_heard(now=now)


def stopped_by() -> str:
    """Name what asked this process to stop."""
    return (_active[-1].by if _active else "") or "a signal to another process"


def check_stop(doing: str, kept: Text = "") -> None:
    """Raise `Stopped` if this process was asked to stop: long loops call it at least once a second, or a batch.

    Where processes wait for each other it is called within `Processes.run_on_all`, `run_on_main` or `main_first`, which
    take the stop of one to all.

    Args:
        doing: what is stopped, for the message: `decoding`.
        kept: a sentence on what is kept of it.

    Raises:
        Stopped: it was.
    """
    faults.ask_to_stop(doing)
    if is_stopping():
        raise Stopped(f"stopped by {stopped_by()} while {doing}", remedy=kept or None)


@contextmanager
def stoppable(doing: str) -> Iterator[None]:
    """Let a stop end what is within wherever it is: a long call of others' code, which leaves nothing half-done.

    Raises:
        Stopped: it did.
    """
    check_stop(doing)
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return
    is_over = False

    def tick(number: int, frame: FrameType | None) -> None:
        if not is_over:
            check_stop(doing)

    before = signal.signal(signal.SIGALRM, tick)
    timer_s = signal.setitimer(signal.ITIMER_REAL, _LOOK_EVERY_S, _LOOK_EVERY_S)
    try:
        yield
    finally:
        is_over = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *timer_s)  # whoever had set one
