"""Do what only XLA devices (TPUs) need.

XLA computes nothing when it is told to. It records, until a value is asked for or `mark_step` is called; what was
recorded is then compiled as one program, which is cached for when the very same is recorded again. So a step ends in
one call, records the same as the step before, and asks for no value.
"""

from __future__ import annotations

import os
from typing import TypeVar

import torch
import torch.distributed as torch_dist
import torch_xla
from accelerate import Accelerator
from torch import Tensor, nn

from tlscale.distributed.device import Device

M = TypeVar("M", bound=nn.Module)


class XlaDevice(Device):
    """Compute on a device that records before it computes."""

    def seed(self, number: int) -> None:
        torch.default_generator.manual_seed(number)
        torch_xla.manual_seed(number, self.device)

    def to_device(self, module: M) -> M:
        # Moving to XLA makes new parameters, unless torch is told otherwise; an optimizer's groups would keep the old.
        before = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            return module.to(self.device)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(before)

    def to_cpu(self, scalars: list[Tensor]) -> Tensor:
        # By one transfer: a stack on the device would be another program for each number of scalars.
        return torch.stack(torch_xla._XLAC._xla_get_cpu_tensors(list(scalars)))

    def mark_step(self) -> None:
        torch_xla.sync()

    def wait(self) -> None:
        torch_xla.sync(wait=True)

    def without_gradients(self) -> torch.no_grad:
        return torch.no_grad()  # in inference mode XLA cannot view what was there before


def set_up_accelerator(accelerator: Accelerator) -> None:
    """Do what Accelerate leaves undone for XLA.

    It joins several processes by XLA alone, where we want torch's group too. It would put on the device what optimizers
    count on the host, for which every step of a resumed run would wait. And on a TPU its mixed precision is an
    environment variable that makes bf16 of all numbers, the weights too, where ours is autocast.
    """
    accelerator.device_placement = False  # modules and optimizers are where they belong when it gets them
    if accelerator.mixed_precision == "bf16":
        os.environ.pop("XLA_USE_BF16", None)  # read by torch_xla when it makes its first tensor
        accelerator.native_amp = True
    if accelerator.num_processes > 1 and not torch_dist.is_initialized():
        join()


def join() -> None:
    """Make torch's process group of all processes of XLA; one of gloo can be made next to it."""
    import torch_xla.distributed.xla_backend  # noqa: F401 (registers the backend, and where its processes meet)

    torch_dist.init_process_group("xla", init_method="xla://")
