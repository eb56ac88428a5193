"""Check a step before it changes anything (`non_finite.action: skip`).

Promise: a step whose loss or gradient is NaN or infinite on any process is skipped on all of them. It leaves no trace
in parameters, moments, averages or batch statistics; the next step is as if it had not been.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from tlscale.distributed.fsdp import local
from tlscale.distributed.processes import Processes


class FiniteCheck:
    """Check one step: `begin` before its forward pass, `is_finite` before its update, `undo` if it is not.

    `scales_loss`: a GradScaler is at work. It checks gradients itself, and some are usually infinite then.
    """

    def __init__(
        self, network: nn.Module, processes: Processes, unchanging_keys: Collection[str], *, scales_loss: bool
    ) -> None:
        self._network, self._processes, self._scales_loss = network, processes, scales_loss
        self._buffers = [buffer for name, buffer in network.named_buffers() if name not in unchanging_keys]
        self._before: list[Tensor] = []

    def begin(self) -> None:
        """Remember what a forward pass changes: batch statistics, which one NaN would spoil for good."""
        self._before = [buffer.clone() for buffer in self._buffers]

    def is_finite(self, loss_sum: Tensor) -> bool:
        """Return whether loss and gradients of all processes are finite; the same answer on each of them."""
        numbers = [loss_sum.double().reshape(())]
        if not self._scales_loss:
            grads = [local(param.grad) for param in self._network.parameters() if param.grad is not None]
            grads = [grad for grad in grads if grad.numel()]  # of few rows, some processes have none
            norms = torch._foreach_norm(grads, float("inf")) if grads else ()
            numbers += [norm.double().reshape(()) for norm in norms]
        finite = bool(torch.stack(numbers).isfinite().all())
        return not self._processes.any(not finite)

    @torch.no_grad()
    def undo(self) -> None:
        """Give batch statistics their values from before, and drop the gradients."""
        for buffer, before in zip(self._buffers, self._before, strict=True):
            buffer.copy_(before)
        self._network.zero_grad(set_to_none=True)


def are_finite(network: nn.Module) -> bool:
    """Return whether all trained parameters, as far as this process has them, are finite; others are never saved."""
    trained = [local(param.detach()) for param in network.parameters() if param.requires_grad]
    return bool(torch.stack([param.isfinite().all() for param in trained]).all())
