"""Receive requests to stop: SIGTERM (a cluster takes the machine back), SIGINT (Ctrl-C), or STOP in the run folder.

Promise: the first request only sets a flag, so that the step is finished and saved; a second Ctrl-C ends at once. The
file is a control file that reaches a run behind any launcher, also one that passes no signal on.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_PR_SET_PDEATHSIG = 1  # of prctl(2)


def stop_with_launcher() -> None:
    """Ask this process to stop when its launcher dies (Linux).

    `accelerate launch` of one process neither passes SIGTERM on nor ends its child: a cluster that takes the machine
    back would end the launcher alone, and the run would continue, unsaved and unwatched.
    """
    if "ACCELERATE_MIXED_PRECISION" in os.environ or "LOCAL_RANK" in os.environ:
        signal_when_parent_dies(signal.SIGTERM)


def signal_when_parent_dies(number: signal.Signals) -> None:
    """Send this process a signal when the one that started it dies, by the kernel; only Linux can."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number)


class StopRequest:
    """Set `requested`, within this context, when the process is asked to stop: by a signal, or by `file` being there.

    The file is looked for on every call, so only one process of a run should be given it.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.by = ""  # the signal or the file that asked
        self._file = file
        self._requested = False
        self._before: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Tell whether the process was asked to stop."""
        if not self._requested and self._file is not None and os.path.lexists(self._file):
            self._requested, self.by = True, f"the file '{self._file}'"
        return self._requested

    def __enter__(self) -> StopRequest:
        # Python allows signal handlers in the main thread only; elsewhere (a notebook's worker) the file alone asks.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._requested = True
        self.by = signal.Signals(number).name
