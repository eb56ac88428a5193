"""Join the processes of a run, and let them agree: the only helper over `Accelerator`.

Promise: all agreement between processes goes over a CPU group of its own, so that it never waits for the accelerator;
an error of one process ends all of them, and one of them reports it.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as torch_dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, is_initialized
from accelerate.utils import InitProcessGroupKwargs

from tlscale.distributed import launch
from tlscale.distributed.device import Device
from tlscale.distributed.engine import Engine
from tlscale.distributed.fsdp import Fsdp2Engine
from tlscale.distributed.host import device_for
from tlscale.distributed.settings import keep_settings
from tlscale.distributed.signals import Peers
from tlscale.distributed.watchdog import Watchdog
from tlscale.errors import LaunchError, TlscaleError
from tlscale.recipe.schema import ComputeSection

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """Know this process among all of the run, and let them agree."""

    accelerator: Accelerator
    rank: int
    world_size: int
    watchdog: Watchdog
    control: torch_dist.ProcessGroup | None  # of all processes over the CPU; None where there is one
    engine: Engine  # how they train together
    local: Device  # this process's
    _is_guest: bool  # in a program that had an Accelerator of its own
    _put_back: Callable[[], None]

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        return self.local.device

    @property
    def pins_memory(self) -> bool:
        """Whether batches are made in page-locked memory, from which a GPU copies while the host goes on."""
        return self.device.type == "cuda"

    def without_gradients(self) -> torch.inference_mode | torch.no_grad:
        """Return the context of an evaluation; what FSDP2 makes in inference mode it could not use in training."""
        return torch.no_grad() if self.engine.shards else self.local.without_gradients()

    # -- agreement ----------------------------------------------------------------------------------------------------

    def any(self, flag: bool) -> bool:
        """Tell every process whether the flag is set on any of them."""
        return self.any_later(flag)()

    def any_later(self, flag: bool) -> Callable[[], bool]:
        """Ask as `any` does, and go on: what is returned waits for the answer."""
        if self.control is None:
            return lambda: flag
        votes = torch.tensor([int(flag)])
        work = torch_dist.all_reduce(votes, op=torch_dist.ReduceOp.MAX, group=self.control, async_op=True)

        def answer() -> bool:
            work.wait()
            return bool(votes.item())

        return answer

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum `values` over all processes, on the CPU, in the type it came in."""
        total = values.detach().cpu().clone()
        if self.control is not None:
            torch_dist.all_reduce(total, group=self.control)
        return total

    def gather(self, value: T) -> list[T]:
        """Return `value` of every process, by rank."""
        if self.control is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        torch_dist.all_gather_object(values, value, group=self.control)
        return values

    def to_main(self, value: T, source: int) -> T:
        """Hand `value` of the process `source` to the main one, which returns it; to be called by these two alone."""
        box: list[Any] = [value]
        if self.rank == source != 0:
            torch_dist.send_object_list(box, dst=0, group=self.control)
        elif source != 0:
            torch_dist.recv_object_list(box, src=source, group=self.control)
        return box[0]  # type: ignore[no-any-return]

    def run_on_main(self, job: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `job` on the main process only; its result, or its error, reaches every process, so that none waits."""
        if self.control is None:
            return job(*args, **kwargs)
        outcome: list[Any] = [None, None]
        cause: Exception | None = None
        if self.is_main:
            try:
                outcome[0] = job(*args, **kwargs)
            except Exception as error:
                cause, outcome[1] = error, _to_send(error)
        torch_dist.broadcast_object_list(outcome, src=0, group=self.control)
        if cause is not None:
            raise cause
        if outcome[1] is not None:
            raise _echo(outcome[1])
        return outcome[0]  # type: ignore[no-any-return]

    def run_on_all(self, job: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `job` on every process; if it fails on one, the first error is raised on all, and reported once."""
        if self.control is None:
            return job(*args, **kwargs)
        outcome, error = None, None
        try:
            outcome = job(*args, **kwargs)
        except TlscaleError as raised:
            error = raised
        self._raise_first(self.gather(error), error)
        return outcome  # type: ignore[return-value]

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Let the main process do what is within before the others, which then find its downloads on disk.

        Raises:
            TlscaleError: the error of the first process that failed, on every process.
        """
        if self.control is None:
            yield
            return
        outcome: list[Any] = [None]
        if not self.is_main:
            torch_dist.broadcast_object_list(outcome, src=0, group=self.control)
            if outcome[0] is not None:
                raise _echo(outcome[0])
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            own = error
        outcome[0] = None if own is None else _to_send(own)
        if self.is_main:
            torch_dist.broadcast_object_list(outcome, src=0, group=self.control)
        if not self.is_main or own is None:
            self._raise_first(self.gather(outcome[0]), own)
        elif own is not None:
            raise own

    def _raise_first(self, errors: list[TlscaleError | None], own: Exception | None) -> None:
        """Raise the error of the first process that has one, on all of them; only that one reports it."""
        first = next((rank for rank, found in enumerate(errors) if found is not None), None)
        if first is None:
            return
        found = errors[first]
        assert found is not None
        raise own if own is not None and first == self.rank else _echo(found)

    @contextmanager
    def main_holds(self, make: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
        """Keep the main process within the context; its error on entering is raised on every process."""
        with ExitStack() as stack:
            self.run_on_main(lambda: stack.enter_context(make()) and None)
            yield

    def peers(self) -> Peers | None:
        """Return what passes a request to stop on; None where there is one process. Every process calls it as often."""
        return None if self.control is None else _Store(f"tlscale stop {next(_numbers)}")

    def broadcast_buffers(self, module: torch.nn.Module) -> None:
        """Give every process the main one's buffers.

        Batch statistics differ by rank, and DDP broadcasts them only at the next forward pass; an evaluation or a
        checkpoint between two steps would see each rank's own.
        """
        if self.control is None:
            return
        for buffer in module.buffers():
            torch_dist.broadcast(buffer.data, src=0)

    def close(self) -> None:
        """Leave the run; the next one in this process may want another precision, and its own settings.

        Accelerate keeps precision and device for the life of the process, so it is made to forget them. An Accelerator
        that was there before stays as it was.
        """
        self._put_back()
        if not self._is_guest:
            _forget_run()


class _Store:
    """Set a key in the store in which the processes met: one of them sets it, and the others look."""

    def __init__(self, key: str) -> None:
        self._key, self._store = key, torch_dist.distributed_c10d._get_default_store()

    def tell(self) -> None:
        # A store whose process has left: whoever is still there finds out by the next collective.
        with suppress(RuntimeError):
            self._store.set(self._key, "1")

    def are_told(self) -> bool:
        with suppress(RuntimeError):
            return bool(self._store.check([self._key]))
        return False


_numbers = count()


def _forget_run() -> None:
    # The processes stay joined until the program ends: a launcher's store cannot be joined twice, it would hang.
    AcceleratorState._reset_state(reset_partial_state=not torch_dist.is_initialized())
    GradientState._reset_state()


@atexit.register
def _leave_group() -> None:
    # A program that leaves its process group open prints a warning and may hang.
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()


def _to_send(error: Exception) -> TlscaleError:
    # An error that is not ours may not even be picklable.
    return error if isinstance(error, TlscaleError) else TlscaleError(f"the main process failed: {error!r}")


def _echo(error: TlscaleError) -> TlscaleError:
    # Another process reports it; this one only ends.
    error.reported_by_main = True
    return error


def start_processes(compute: ComputeSection) -> Processes:
    """Join the processes that the launcher started; raise `LaunchError` as `check_launcher` and `check_joined` do."""
    is_guest, put_back = is_initialized(), keep_settings()
    try:
        return _join(compute, is_guest, put_back)
    except Exception:
        put_back()
        if not is_guest:
            _forget_run()
        raise


def _join(compute: ComputeSection, is_guest: bool, put_back: Callable[[], None]) -> Processes:
    launch.check_launcher(compute)
    accelerator = _make_accelerator(compute, is_guest)
    launch.check_joined(compute, accelerator)
    launch.set_threads(compute, accelerator.device)
    if accelerator.device.type == "xla":
        from tlscale.distributed import xla

        xla.set_up_accelerator(accelerator)
    timeout = launch.collective_timeout(compute)
    several = accelerator.num_processes > 1
    return Processes(
        accelerator,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        watchdog=Watchdog(compute.hang_timeout_s),
        control=torch_dist.new_group(backend="gloo", timeout=timeout) if several else None,  # type: ignore[arg-type]
        engine=Fsdp2Engine(accelerator) if compute.engine == "fsdp2" else Engine(accelerator),
        local=device_for(accelerator.device),
        _is_guest=is_guest,
        _put_back=put_back,
    )


def _make_accelerator(compute: ComputeSection, is_guest: bool) -> Accelerator:
    group = InitProcessGroupKwargs(init_method=launch.rendezvous_url(), timeout=launch.collective_timeout(compute))
    try:
        return Accelerator(
            mixed_precision=launch.MIXED_PRECISION[compute.precision],
            step_scheduler_with_optimizer=False,
            kwargs_handlers=[group],
        )
    except ValueError as error:
        if not is_guest:
            raise
        raise LaunchError(
            f"{compute.precision}, but this program has an Accelerator of its own with another precision",
            key="compute.precision",
            remedy="Run tlscale in a process of its own, or make both the same.",
        ) from error
