"""Check what the launcher and Accelerate made of a start, and say where its processes meet.

Promise: the processes that run are those that the launcher started and the recipe allows, or nothing runs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as torch_dist
from accelerate import Accelerator
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

from tlscale.distributed.host import num_cores
from tlscale.errors import LaunchError, sentences
from tlscale.recipe.schema import ComputeSection

# What a launcher may ask Accelerate for, by the variable that hands it on, and how to remove it.
_OTHER_ENGINES = {
    "ACCELERATE_USE_FSDP": ("FSDP", "--use_fsdp, or 'distributed_type: FSDP' in Accelerate's configuration file"),
    "ACCELERATE_USE_DEEPSPEED": ("DeepSpeed", "--use_deepspeed, or 'distributed_type: DEEPSPEED' in its file"),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", "--use_megatron_lm, or 'distributed_type: MEGATRON_LM' in its file"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("a parallelism configuration", "--use_parallelism_config, or its section"),
}
_FSDP1 = (
    "It is version 1, too, which puts frozen and trained parameters into one flat tensor, and so cannot train a part "
    "of a network without the memory for all of it."
)
_SCHEME = "tlscale"
# Accelerate's word for each of the recipe's precisions.
MIXED_PRECISION = {"fp32": "no", "fp64": "no", "bf16": "bf16", "fp16": "fp16"}


# -- before the processes meet ----------------------------------------------------------------------------------------


def check_launcher(compute: ComputeSection) -> None:
    """Compare what the launcher put into the environment with the recipe.

    Before the processes meet: one that ends at once would leave the others in the middle of it.

    Raises:
        LaunchError: the launcher asks for another precision, engine or number of processes.
    """
    _check_precision(compute)
    _check_no_other_engine(compute)
    if "WORLD_SIZE" in os.environ:
        _check_count(compute, int(os.environ["WORLD_SIZE"]))


def _check_precision(compute: ComputeSection) -> None:
    # `accelerate launch` hands its own mixed precision on in the environment; `no` is also its default.
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launcher not in ("no", MIXED_PRECISION[compute.precision]):
        raise LaunchError(
            f"{compute.precision} in the recipe, but 'accelerate launch' asks for mixed precision {launcher}",
            key="compute.precision",
            remedy="Remove one of the two; the recipe's is saved with the run.",
        )


def _check_no_other_engine(compute: ComputeSection) -> None:
    # The launcher starts processes; how they train together is in the recipe, which is saved with the run.
    for variable, (name, how) in _OTHER_ENGINES.items():
        if os.environ.get(variable, "").lower() not in ("1", "true", "yes", "y", "t", "on"):
            continue
        why = _FSDP1 if name == "FSDP" and os.environ.get("FSDP_VERSION", "1") != "2" else ""
        instead = "write compute.engine: fsdp2 into the recipe, which needs nothing from the launcher"
        instead = "the recipe's does the same" if name == "FSDP" and compute.engine == "fsdp2" else instead
        raise LaunchError(
            f"{compute.engine} in the recipe, but 'accelerate launch' asks for {name} ({variable})",
            key="compute.engine",
            remedy=sentences(why, f"Remove it ({how}); to shard the network over the processes, {instead}."),
        )


def _check_count(compute: ComputeSection, world_size: int) -> None:
    if compute.num_processes is not None and compute.num_processes != world_size:
        raise LaunchError(
            f"{compute.num_processes} in the recipe, but {world_size} run",
            key="compute.num_processes",
            remedy=f"Start it with 'accelerate launch --num_processes {compute.num_processes}' (on CPUs: "
            f"ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {compute.num_processes}), "
            "or change the recipe.",
        )


# -- how they meet ----------------------------------------------------------------------------------------------------


def rendezvous_url() -> str | None:
    """Return where the processes find each other; None: where PyTorch says.

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


def collective_timeout(compute: ComputeSection) -> timedelta:
    """Return how long a process waits for the others: a little longer than the watchdog, which prints where each is."""
    return timedelta(seconds=compute.hang_timeout_s + 5.0)


# -- after they met ---------------------------------------------------------------------------------------------------


def check_joined(compute: ComputeSection, accelerator: Accelerator) -> None:
    """Compare what Accelerate joined with the launcher and the recipe.

    Raises:
        LaunchError: Accelerate did not join the launcher's processes, their number is not the recipe's, or precision or
            engine are not supported here.
    """
    world_size, is_xla = accelerator.num_processes, accelerator.device.type == "xla"
    # Processes of XLA (one a chip) are counted by its own runtime, and not in the environment.
    launched = int(os.environ.get("WORLD_SIZE", world_size if is_xla else 1))
    if launched != world_size:
        raise LaunchError(
            f"the launcher started {launched} processes (WORLD_SIZE), but Accelerate joined {world_size}: each "
            "would train alone",
            remedy="On a machine without accelerators set ACCELERATE_USE_CPU=true for torchrun, or use 'accelerate "
            "launch --multi_gpu'.",
        )
    _check_count(compute, world_size)
    _check_device(compute, accelerator.device)
    _check_engine(compute, accelerator)
    if is_xla:
        _check_xla(compute)


def _check_engine(compute: ComputeSection, accelerator: Accelerator) -> None:
    # Accelerate may be another than it was asked for: on CPUs it trains with DDP in place of FSDP without a message.
    kind, world_size = str(accelerator.distributed_type.value), accelerator.num_processes
    if kind not in ("NO", "XLA") and not kind.startswith("MULTI_"):
        raise LaunchError(
            f"this program has an Accelerator for {kind} with {world_size} processes, which tlscale does not "
            "train with; compute.engine decides how its processes train together",
            remedy="Run it in a process of its own.",
        )
    if compute.engine != "auto" and world_size == 1:
        raise LaunchError(
            f"{compute.engine} has no effect with one process",
            key="compute.engine",
            remedy="Start more ('accelerate launch --multi_gpu --num_processes 2'), or write compute.engine=auto: any "
            "run can be resumed with that.",
        )


def _check_device(compute: ComputeSection, device: torch.device) -> None:
    if compute.precision == "fp16" and device.type == "cpu":
        raise LaunchError("fp16 needs a GPU", key="compute.precision", remedy="On a CPU use bf16 or fp32")
    if compute.precision == "fp64" and device.type == "mps":
        raise LaunchError("fp64 is not supported on this GPU (mps)", key="compute.precision", remedy="Use fp32")


def _check_xla(compute: ComputeSection) -> None:
    if compute.precision == "fp16":
        raise LaunchError("fp16 needs a GPU", key="compute.precision", remedy="On XLA devices (TPUs) use bf16 or fp32")
    if compute.compile:
        raise LaunchError("is for other devices: XLA compiles in any case", key="compute.compile", remedy="Remove it")
    if compute.gradient_checkpointing:
        raise LaunchError(
            "torch's cannot run on XLA devices (TPUs)",
            key="compute.gradient_checkpointing",
            remedy="Remove it, or lower compute.micro_batch_size",
        )
    if compute.engine == "fsdp2":
        raise LaunchError("fsdp2 is not supported on XLA devices (TPUs)", key="compute.engine", remedy="Remove it")


def set_threads(compute: ComputeSection, device: torch.device) -> None:
    """Set the CPU threads of this process.

    `accelerate launch` and torchrun set OMP_NUM_THREADS=1 unless told otherwise, which on a CPU leaves all cores but
    one idle; a process that was started by hand keeps what torch chose.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "LOCAL_WORLD_SIZE" in os.environ
    if compute.threads is not None:
        torch.set_num_threads(compute.threads)
    elif device.type == "cpu" and launched and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(num_cores() // local, 1))
