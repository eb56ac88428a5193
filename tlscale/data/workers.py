"""Work in other processes and threads, with results in order as if there were none.

Promise: worker processes change no result and no random generator, outlive the signals that a scheduler sends to all
processes at once, and end with the iterator; one that is killed ends the run with a message.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from traceback import clear_frames
from typing import Any, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from tlscale.distributed.host import num_cores
from tlscale.distributed.signals import check_stop, signal_when_parent_dies
from tlscale.errors import TlscaleError, WorkerError, flag
from tlscale.recipe.schema import DataSection
from tlscale.storage import faults


class Pinnable(Protocol):
    """What torch's loader can carry into page-locked memory."""

    def pin_memory(self) -> Any: ...  # noqa: ANN401 (of its own type)


K = TypeVar("K")
R = TypeVar("R")
B = TypeVar("B", bound=Pinnable)

_MOST_THREADS = 16
_MOST_WORKERS = 16  # a process; each holds two batches that wait, and its own part of what decoding needs
# What the loader raises of a worker that was killed: while it waits for a batch, or while it fetches one that the
# worker announced and still holds. What a worker itself raised begins with "Caught".
_LOST = re.compile(
    r"RuntimeError: DataLoader worker \(pid.* exited unexpectedly"
    r"|(Connection\w*Error|EOFError|BrokenPipeError|FileNotFoundError): (?!Caught)"
)


class _Loads(Dataset[Any]):
    """What a worker process does: one key of the sampler in, one batch out."""

    def __init__(self, load: Callable[[Any], Any]) -> None:
        self._load = load

    def __getitem__(self, key: Any) -> Any:  # noqa: ANN401 (whatever `load` takes and gives)
        try:
            batch = self._load(key)
            faults.at("worker")
            return batch
        except TlscaleError as error:
            return error  # as a value: torch would wrap a raised one, its traceback included, into its message


def load_in_order(
    load: Callable[[K], B], wanted: Iterable[K], workers: int, pin_memory: bool
) -> Generator[B, None, None]:
    """Call `load` for each of `wanted`, in order, here or in worker processes.

    Raises:
        WorkerError: one of them was killed.
    """
    if workers == 0:
        for key in wanted:
            batch = load(key)
            yield batch.pin_memory() if pin_memory else batch
        return
    loader = DataLoader(
        _Loads(load),
        batch_size=None,
        sampler=wanted,
        num_workers=workers,
        pin_memory=pin_memory,
        collate_fn=_as_is,
        worker_init_fn=_begin_worker,
        # Forked workers share the cache. Elsewhere than on Linux forking is unsafe or unknown.
        multiprocessing_context="fork" if sys.platform == "linux" else None,
        generator=torch.Generator(),  # else it draws a number from the global one
    )
    with _keeping_handler():
        iterator = iter(loader)
    try:
        for item in iterator:
            if isinstance(item, TlscaleError):
                raise item
            yield item
    except Exception as error:
        clear_frames(error.__traceback__)  # they hold the iterator for as long as somebody holds the error
        if not _LOST.match(f"{type(error).__name__}: {error}"):
            raise
        raise WorkerError(
            f"a process that reads images was killed ({error}), most likely for lack of memory",
            remedy="Set fewer of them (data.workers=1; 0: none), and resume with " + flag("resume") + ".",
            key="data.workers",
        ) from error
    finally:
        del iterator  # ends the workers


@contextmanager
def _keeping_handler() -> Iterator[None]:
    """Take away the handler of SIGCHLD that torch installs within.

    It raises out of any line of the main thread. Without it a lost worker is found where its batch is waited for.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGCHLD"):
        yield  # where torch installs none
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def _as_is(item: R) -> R:
    return item


def _begin_worker(worker: int) -> None:
    """Use one thread, and ignore the signals that are meant for the run.

    A scheduler sends SIGTERM, and a terminal SIGINT, to every process. The training process then finishes its step and
    saves, for which it needs its workers; they end when it ends them. Where it is killed they are, too: they hold what
    it held, the lock of the run folder included, and the next start is refused for as long as they live.
    """
    signal_when_parent_dies(signal.SIGKILL)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_parent_says, args=(os.getppid(),), daemon=True).start()


def _end_when_parent_says(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def default_workers(
    section: DataSection, *, cached: bool, augmented: bool, device: torch.device, processes: int = 1
) -> int:
    """Choose how many worker processes read images for each training process.

    Args:
        cached: the images are in memory.
        device: where the network runs; on the CPU it has all cores at work, and workers would take them from it.
        processes: training processes that share this machine's cores.
    """
    if section.workers is not None:
        return section.workers
    if device.type == "cpu" or (cached and not augmented):
        return 0
    return most_workers(processes)


def most_workers(processes: int) -> int:
    """Return for how many worker processes of each training process there are cores, at most 16."""
    # One core is left to the process that feeds the device; without another one a worker can take nothing over.
    return max(min(_MOST_WORKERS, num_cores() // processes - 1), 0)


def map_in_threads(
    function: Callable[[K], R], items: Sequence[K], doing: str | None = None, *, most: int = _MOST_THREADS
) -> Iterator[R]:
    """Map with threads, `most` at most (Pillow decodes and resizes outside the interpreter's lock).

    In a worker process it maps plainly.

    Args:
        doing: what it is, in work that a stop may end in the middle; None: it is a part of a step that is finished.

    Raises:
        Stopped: it was.
    """
    if doing is not None:
        function = _asking(function, doing)
    threads = min(most, num_cores(), len(items))
    if threads < 2 or get_worker_info() is not None:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(function, items)


def _asking(function: Callable[[K], R], doing: str) -> Callable[[K], R]:
    def call(item: K) -> R:
        check_stop(doing)
        return function(item)

    return call
