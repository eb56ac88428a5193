"""Do what differs between kinds of devices: `Device` for torch's own kinds, `xla.XlaDevice` for XLA.

`host.device_for` chooses, and no other file asks which of the two it has. torch_xla is imported where the device is one
of its own and nowhere else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from tlscale.errors import DeviceMemoryError, Text, first_line, flag

M = TypeVar("M", bound=nn.Module)


class Device:
    """Compute on a CPU, a GPU, or whatever else computes an operation when it is called."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def seed(self, number: int) -> None:
        """Seed what is drawn on the device, and the CPU's generator."""
        # As `torch.manual_seed`, without its walk over all kinds of devices, which takes a millisecond of each step.
        torch.default_generator.manual_seed(number)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(number)

    def to_device(self, module: M) -> M:
        """Move a module to the device; its parameters stay the objects that others know."""
        return module.to(self.device)

    def to_cpu(self, scalars: list[Tensor]) -> Tensor:
        """Return computed scalars of one dtype as one tensor on the CPU: (len(scalars),). The host waits once."""
        return torch.stack(scalars).cpu()

    def mark_step(self) -> None:
        """End a step, or a batch without gradients; nothing to do here, as it was computed when it was called."""

    def wait(self) -> None:
        """Wait until the device has computed all that it was told to."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def without_gradients(self) -> torch.inference_mode | torch.no_grad:
        """Return the context of an evaluation."""
        return torch.inference_mode()


def choose_algorithms(device: torch.device, *, deterministic: bool) -> None:
    """Let torch compute with deterministic algorithms only, or else with the fastest ones."""
    torch.use_deterministic_algorithms(deterministic)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = not deterministic  # tries them at the first batch of each size
        if deterministic:  # read when the first matrices are multiplied
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


# What errors of no class of their own have in them: of the CPU, of the driver (page-locked memory, say), of libraries.
_NO_MEMORY = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")

_LESS = (
    "Set a lower one, or compute.gradient_checkpointing=true, and resume with "
    + flag("resume")
    + ": nothing that was saved is lost. Where it was an evaluation, set evaluate.batch_size. With a lower "
    "batch_size it is another training, in another folder."
)


@contextmanager
def naming_memory(key: str = "compute.micro_batch_size", remedy: Text = _LESS) -> Iterator[None]:
    """Name the keys that save memory where the device has none left; by default those of a run.

    Raises:
        DeviceMemoryError: in place of torch's error.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not any(words in str(error) for words in _NO_MEMORY):
            raise
        raise DeviceMemoryError(
            f"the device has no memory left ({first_line(error)})",
            key=key,
            remedy=remedy,
        ) from error


class CopyToCpu:
    """Copy tensors to the CPU; from a GPU while the host goes on, and the GPU computes what follows."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors, self._copied = tuple(tensors), None
        if any(tensor.is_cuda for tensor in tensors):
            self._tensors = tuple(map(_pinned_copy, tensors))
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch has no types for it
            self._copied.record()

    def wait(self) -> tuple[Tensor, ...]:
        """Return the copies once they are complete."""
        if self._copied is None:
            return tuple(tensor.cpu() for tensor in self._tensors)
        self._copied.synchronize()
        # Out of page-locked memory, which is scarce, and which the next copy takes again.
        return tuple(tensor.clone() for tensor in self._tensors)


def _pinned_copy(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


class TensorBatch:
    """Move the tensors of a dataclass, and those in its tuples, as one."""

    __slots__ = ()

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """Copy the batch to `device`."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Copy the batch to page-locked memory; torch's loader calls this by its name."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        for name, value in values.items():
            if isinstance(value, Tensor):
                values[name] = change(value)
            elif isinstance(value, tuple):
                values[name] = tuple(map(change, value))
        return type(self)(**values)
