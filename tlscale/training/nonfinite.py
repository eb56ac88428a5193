"""A step that is looked at before it changes anything: `non_finite: skip`, and what follows on a rollback.

Promise: a step whose loss or gradient is NaN or infinite on any process is left out on all of them. It leaves no trace
in parameters, moments, averages or batch statistics; the next step is as if it had not been.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from tlscale.distributed.fsdp import local
from tlscale.distributed.processes import Processes


class Vigil:
    """Over one step: `begin` before its forward pass, `is_bad` before its update, `undo` where it is bad.

    Args:
        network: the bare one.
        fixed: names in its state dict of what training cannot change.
        scales_loss: whether a GradScaler is at work. It looks for infinite gradients itself, and some are usual then.
    """

    def __init__(self, network: nn.Module, processes: Processes, fixed: Collection[str], *, scales_loss: bool) -> None:
        self._network, self._processes, self._scales_loss = network, processes, scales_loss
        self._buffers = [buffer for name, buffer in network.named_buffers() if name not in fixed]
        self._before: list[Tensor] = []

    def begin(self) -> None:
        """Remember what a forward pass changes: batch statistics, which one NaN would spoil for good."""
        self._before = [buffer.clone() for buffer in self._buffers]

    def is_bad(self, loss_sum: Tensor) -> bool:
        """Whether the loss of any process, or a gradient, is not finite; the same answer on all processes."""
        numbers = [loss_sum.double().reshape(())]
        if not self._scales_loss:
            grads = [local(param.grad) for param in self._network.parameters() if param.grad is not None]
            grads = [grad for grad in grads if grad.numel()]  # of few rows, some processes have none
            norms = torch._foreach_norm(grads, float("inf")) if grads else ()
            numbers += [norm.double().reshape(()) for norm in norms]
        finite = bool(torch.stack(numbers).isfinite().all())
        return self._processes.any(not finite)

    @torch.no_grad()
    def undo(self) -> None:
        """Batch statistics are what they were; gradients are gone."""
        for buffer, before in zip(self._buffers, self._before, strict=True):
            buffer.copy_(before)
        self._network.zero_grad(set_to_none=True)
