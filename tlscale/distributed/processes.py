"""Process facts: the only helper over `Accelerator`.

Promise: the processes that run are those that the launcher started and the recipe allows, or nothing runs. All
agreement between processes goes over a CPU group of its own, so that it never waits for the accelerator.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as torch_dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, is_initialized
from accelerate.utils import InitProcessGroupKwargs
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

from tlscale.distributed.cores import num_cores
from tlscale.distributed.watchdog import Watchdog
from tlscale.errors import LaunchError, TlscaleError
from tlscale.recipe.schema import ComputeSection

P = ParamSpec("P")
T = TypeVar("T")
M = TypeVar("M", bound=torch.nn.Module)
# What a launcher may ask Accelerate for, by the variable that hands it on, and how it is taken out again.
_OTHER_ENGINES = {
    "ACCELERATE_USE_FSDP": ("FSDP", "--use_fsdp, or 'distributed_type: FSDP' in Accelerate's configuration file"),
    "ACCELERATE_USE_DEEPSPEED": ("DeepSpeed", "--use_deepspeed, or 'distributed_type: DEEPSPEED' in its file"),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", "--use_megatron_lm, or 'distributed_type: MEGATRON_LM' in its file"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("a parallelism configuration", "--use_parallelism_config, or its section"),
}
_SCHEME = "tlscale"
_MIXED = {"fp32": "no", "fp64": "no", "bf16": "bf16", "fp16": "fp16"}


@dataclass(frozen=True)
class Processes:
    """This process among all of the run."""

    accelerator: Accelerator
    rank: int
    world_size: int
    watchdog: Watchdog
    mesh: DeviceMesh | None  # over which `compute.engine: fsdp2` spreads what is trained
    _control: torch_dist.ProcessGroup | None
    _is_guest: bool  # in a program that had an Accelerator of its own

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    @property
    def control(self) -> torch_dist.ProcessGroup | None:
        """All processes, over the CPU; None where there is one."""
        return self._control

    def seed(self, seed: int) -> None:
        """Seed what the network draws from on this process's device, and the CPU's generator.

        As `torch.manual_seed`, without its walk over all kinds of devices, which takes a millisecond of each step.
        """
        torch.default_generator.manual_seed(seed)
        if self.device.type == "xla":
            from tlscale.distributed import xla

            xla.seed(seed, self.device)
        elif self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)

    def to_device(self, module: M) -> M:
        """Move a module to this process's device; its parameters stay the objects that others know."""
        if self.device.type == "xla":
            from tlscale.distributed import xla

            return xla.place(module, self.device)
        return module.to(self.device)

    def mark_step(self) -> None:
        """The end of a step, or of a batch without gradients: XLA has only recorded it so far."""
        if self.device.type == "xla":
            from tlscale.distributed import xla

            xla.mark_step()

    def to_cpu(self, scalars: list[torch.Tensor]) -> torch.Tensor:
        """Computed scalars of one dtype as one tensor on the CPU: (len(scalars),). The host waits once."""
        if self.device.type == "xla":  # for which a stack is another program for each number of scalars
            from tlscale.distributed import xla

            return torch.stack(xla.to_cpu(scalars))
        return torch.stack(scalars).cpu()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process; every process gets the same answer."""
        if self._control is None:
            return flag
        votes = torch.tensor([int(flag)])
        torch_dist.all_reduce(votes, op=torch_dist.ReduceOp.MAX, group=self._control)
        return bool(votes.item())

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of `values` over all processes, on the CPU, in the type it came in."""
        total = values.detach().cpu().clone()
        if self._control is not None:
            torch_dist.all_reduce(total, group=self._control)
        return total

    def gather(self, value: T) -> list[T]:
        """`value` of every process, by rank."""
        if self._control is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        torch_dist.all_gather_object(values, value, group=self._control)
        return values

    def to_main(self, value: T, source: int) -> T:
        """Hand `value` of the process `source` to the main one; to be called by these two alone.

        Returns:
            On the main process what the other handed over; elsewhere `value`.
        """
        box: list[Any] = [value]
        if self.rank == source != 0:
            torch_dist.send_object_list(box, dst=0, group=self._control)
        elif source != 0:
            torch_dist.recv_object_list(box, src=source, group=self._control)
        return box[0]  # type: ignore[no-any-return]

    def run_on_main(self, job: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `job` on the main process only; its result, or its error, reaches every process.

        Raises:
            TlscaleError: what the main process raised, so that no process waits for one that has left.
        """
        if self._control is None:
            return job(*args, **kwargs)
        outcome: list[Any] = [None, None]
        cause: Exception | None = None
        if self.is_main:
            try:
                outcome[0] = job(*args, **kwargs)
            except Exception as error:
                cause, outcome[1] = error, _to_send(error)
        torch_dist.broadcast_object_list(outcome, src=0, group=self._control)
        if cause is not None:
            raise cause
        if outcome[1] is not None:
            raise _echo(outcome[1])
        return outcome[0]  # type: ignore[no-any-return]

    def run_on_all(self, job: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `job` on every process; if it fails on one, it fails on all, and only the first of them says why.

        Raises:
            TlscaleError: what the first process that failed raised.
        """
        if self._control is None:
            return job(*args, **kwargs)
        outcome, error = None, None
        try:
            outcome = job(*args, **kwargs)
        except TlscaleError as raised:
            error = raised
        errors = self.gather(error)
        first = next((rank for rank, found in enumerate(errors) if found is not None), None)
        if first is None:
            return outcome  # type: ignore[return-value]
        found = errors[first]
        assert found is not None
        raise error if error is not None and first == self.rank else _echo(found)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process does what is within before the others, which then find its downloads on disk.

        Raises:
            TlscaleError: what the main process raised, on every process.
        """
        if self._control is None:
            yield
            return
        outcome: list[Any] = [None]
        if not self.is_main:
            torch_dist.broadcast_object_list(outcome, src=0, group=self._control)
            if outcome[0] is not None:
                raise _echo(outcome[0])
        try:
            yield
        except Exception as error:
            outcome[0] = _to_send(error)
            raise
        finally:
            if self.is_main:
                torch_dist.broadcast_object_list(outcome, src=0, group=self._control)

    @contextmanager
    def main_holds(self, make: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
        """The main process is within the context; if it cannot enter, no process goes on.

        Raises:
            TlscaleError: what the main process raised on entering.
        """
        with ExitStack() as stack:
            self.run_on_main(lambda: stack.enter_context(make()) and None)
            yield

    def broadcast_buffers(self, module: torch.nn.Module) -> None:
        """Give every process the main one's buffers.

        Batch statistics differ by rank, and DDP levels them only at the next forward pass; an evaluation or a
        checkpoint between two steps would see each rank's own.
        """
        if self._control is None:
            return
        for buffer in module.buffers():
            torch_dist.broadcast(buffer.data, src=0)

    def close(self) -> None:
        """Leave the run; the next one in this process may want another precision.

        Accelerate keeps precision and device for the life of the process, so it is made to forget them. An Accelerator
        that was there before stays as it was.
        """
        if not self._is_guest:
            _forget_run()


def _forget_run() -> None:
    # The processes stay joined until the program ends: a launcher's store cannot be joined twice, it would hang.
    AcceleratorState._reset_state(reset_partial_state=not torch_dist.is_initialized())
    GradientState._reset_state()


@atexit.register
def _leave_group() -> None:
    """A program that leaves its process group open prints a warning and may hang."""
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()


def _to_send(error: Exception) -> TlscaleError:
    """The error as it goes to the other processes; one that is not ours may not even be picklable."""
    return error if isinstance(error, TlscaleError) else TlscaleError(f"the main process failed: {error!r}")


def _echo(error: TlscaleError) -> TlscaleError:
    """Another process's error, which that one says."""
    error.reported_by_main = True
    return error


def start_processes(compute: ComputeSection) -> Processes:
    """Join the processes that the launcher started.

    Raises:
        LaunchError: Accelerate did not join the launcher's processes, their number is not the recipe's, or the
            precision cannot be had.
    """
    is_guest = is_initialized()
    try:
        return _join(compute, is_guest)
    except Exception:
        if not is_guest:
            _forget_run()
        raise


def _join(compute: ComputeSection, is_guest: bool) -> Processes:
    _check_precision_of_launcher(compute)
    _check_engine_of_launcher(compute)
    if "WORLD_SIZE" in os.environ:
        # Before they meet: one that ends at once would leave the others in the middle of it.
        _check_count(compute, int(os.environ["WORLD_SIZE"]))
    try:
        accelerator = Accelerator(
            mixed_precision=_MIXED[compute.precision],
            step_scheduler_with_optimizer=False,
            kwargs_handlers=[
                InitProcessGroupKwargs(init_method=_rendezvous_url(), timeout=_collective_timeout(compute))
            ],
        )
    except ValueError as error:
        if not is_guest:
            raise
        raise LaunchError(
            f"this program has an Accelerator of its own, with another precision than compute.precision = "
            f"{compute.precision}. Run tlscale in a process of its own, or make both the same."
        ) from error
    world_size, is_xla = accelerator.num_processes, accelerator.device.type == "xla"
    # Processes of XLA (one a chip) are counted by its own runtime, and not in the environment.
    launched = int(os.environ.get("WORLD_SIZE", world_size if is_xla else 1))
    if launched != world_size:
        raise LaunchError(
            f"the launcher started {launched} processes (WORLD_SIZE), but Accelerate joined {world_size}: each would "
            "train alone. On a machine without accelerators set ACCELERATE_USE_CPU=true for torchrun, or use "
            "'accelerate launch --multi_gpu'."
        )
    _check_count(compute, world_size)
    _check_device(compute, accelerator.device)
    _check_engine(compute, accelerator)
    _set_threads(compute, accelerator.device)
    if is_xla:
        from tlscale.distributed import xla

        xla.prepare(accelerator)
    control: Any = (
        torch_dist.new_group(backend="gloo", timeout=_collective_timeout(compute)) if world_size > 1 else None
    )
    watchdog = Watchdog(compute.hang_timeout_s)
    mesh = init_device_mesh(accelerator.device.type, (world_size,)) if compute.engine == "fsdp2" else None
    return Processes(accelerator, accelerator.process_index, world_size, watchdog, mesh, control, is_guest)


def _check_count(compute: ComputeSection, world_size: int) -> None:
    if compute.num_processes is not None and compute.num_processes != world_size:
        raise LaunchError(
            f"the recipe asks for compute.num_processes = {compute.num_processes}, but {world_size} run. Start it with "
            f"'accelerate launch --num_processes {compute.num_processes}' (on CPUs: ACCELERATE_USE_CPU=true accelerate "
            f"launch --multi_gpu --num_processes {compute.num_processes}), or change the recipe."
        )


def _rendezvous_url() -> str | None:
    """Where the processes find each other; None: where PyTorch says.

    torchrun keeps the store in which processes that it restarts left their addresses, and the new ones may call those
    of the dead. On one host all of them know how often they were restarted, so each start gets names of its own.
    """
    is_again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    return f"{_SCHEME}://" if is_again and os.environ.get("GROUP_WORLD_SIZE") == "1" else None


def _meet(_url: str, **options: Any) -> Iterator[tuple[Any, int, int]]:
    for store, rank, world_size in rendezvous("env://", **options):
        name = f"start_{os.environ['TORCHELASTIC_RESTART_COUNT']}"
        yield torch_dist.PrefixStore(name, store), rank, world_size  # type: ignore[attr-defined]


register_rendezvous_handler(_SCHEME, _meet)  # type: ignore[no-untyped-call]


def _collective_timeout(compute: ComputeSection) -> timedelta:
    """How long a process waits for the others: a little longer than the watchdog, which says where each one is."""
    return timedelta(seconds=compute.hang_timeout_s + 5.0)


def _check_precision_of_launcher(compute: ComputeSection) -> None:
    """`accelerate launch` hands its own mixed precision on in the environment; `no` is also its default."""
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launcher not in ("no", _MIXED[compute.precision]):
        raise LaunchError(
            f"'accelerate launch' asks for mixed precision {launcher}, the recipe for compute.precision = "
            f"{compute.precision}. Take one of the two out; the recipe's is the one that is kept with the run."
        )


def _check_engine_of_launcher(compute: ComputeSection) -> None:
    """The launcher starts processes; how they train together is the recipe's to say, which is kept with the run."""
    for variable, (name, how) in _OTHER_ENGINES.items():
        if os.environ.get(variable, "").lower() not in ("1", "true", "yes", "y", "t", "on"):
            continue
        why = "" if name != "FSDP" or os.environ.get("FSDP_VERSION", "1") == "2" else _WHY_NOT_FSDP1
        remedy = "write compute.engine: fsdp2 into the recipe, which needs nothing from the launcher"
        remedy = "the recipe's does the same" if name == "FSDP" and compute.engine == "fsdp2" else remedy
        raise LaunchError(
            f"'accelerate launch' asks for {name} ({variable}), the recipe for compute.engine = {compute.engine}.{why} "
            f"Take it out ({how}); to spread the network over the processes, {remedy}."
        )


_WHY_NOT_FSDP1 = (
    " It is version 1, too, which puts frozen and trained parameters into one flat tensor, and so cannot train a part "
    "of a network without the memory for all of it."
)


def _check_engine(compute: ComputeSection, accelerator: Accelerator) -> None:
    """Accelerate may have become something else than it was asked for: on CPUs it takes FSDP for DDP and says nothing.

    Raises:
        LaunchError: the engine is not the recipe's, or has no effect here.
    """
    kind, world_size = str(accelerator.distributed_type.value), accelerator.num_processes
    if kind not in ("NO", "XLA") and not kind.startswith("MULTI_"):
        raise LaunchError(
            f"this program has an Accelerator for {kind} with {world_size} processes, which tlscale does not train "
            "with; compute.engine says how its processes train together. Run it in a process of its own."
        )
    if compute.engine == "auto":
        return
    if world_size == 1:
        raise LaunchError(
            f"compute.engine = {compute.engine} has no effect with one process. Start more ('accelerate launch "
            "--multi_gpu --num_processes 2'), or write compute.engine=auto: any run can be gone on with that way."
        )
    if compute.engine == "fsdp2" and accelerator.device.type == "xla":
        raise LaunchError("compute.engine = fsdp2 is not to be had on XLA devices; take it out")


def _set_threads(compute: ComputeSection, device: torch.device) -> None:
    """CPU threads of this process.

    `accelerate launch` and torchrun set OMP_NUM_THREADS=1 unless told otherwise, which on a CPU leaves all cores but
    one idle; a process that was started by hand keeps what torch chose.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "LOCAL_WORLD_SIZE" in os.environ
    if compute.threads is not None:
        torch.set_num_threads(compute.threads)
    elif device.type == "cpu" and launched and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(num_cores() // local, 1))


def _check_device(compute: ComputeSection, device: torch.device) -> None:
    if compute.precision == "fp16" and device.type == "cpu":
        raise LaunchError("compute.precision = fp16 needs a GPU; on a CPU use bf16 or fp32")
    if compute.precision == "fp64" and device.type == "mps":
        raise LaunchError("compute.precision = fp64 is not to be had on this GPU (mps); use fp32")
    if device.type == "xla":
        _check_xla(compute)


def _check_xla(compute: ComputeSection) -> None:
    if compute.precision == "fp16":
        raise LaunchError("compute.precision = fp16 needs a GPU; on XLA devices (TPUs) use bf16 or fp32")
    if compute.compile:
        raise LaunchError("compute.compile is for other devices: XLA compiles by itself. Take it out")
    if compute.gradient_checkpointing:
        raise LaunchError(
            "compute.gradient_checkpointing: torch's cannot run on XLA devices (TPUs). Take it out, or lower "
            "compute.micro_batch_size"
        )
