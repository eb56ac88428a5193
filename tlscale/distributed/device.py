"""Do what differs between kinds of devices: `Device` for torch's own kinds, `xla.XlaDevice` for XLA.

`host.device_for` chooses, and no other file asks which of the two it has. torch_xla is imported where the device is one
of its own and nowhere else.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

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
