"""Train on several processes: the one object that knows how the network is laid out over them.

`DdpEngine` has a whole network on each process (and is what one process trains with); `fsdp.Fsdp2Engine` has a shard of
every trained tensor on each. Both give the same loop the same calls.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

M = TypeVar("M", bound=nn.Module)
Wrapped = tuple[nn.Module, torch.optim.Optimizer]


class Engine(ABC):
    """Wrap what is trained, and do in a step what hangs on how it is wrapped.

    Attributes:
        name: as `run.json` has it.
        shards: whether a process holds shards alone of what is trained. Then all processes have to evaluate in
            lockstep, and optimizer and averages are made after the network was sharded.
    """

    name: str
    shards: ClassVar[bool]

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    @abstractmethod
    def wrap(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> Wrapped:
        """Return what is called and stepped in their place."""

    def unwrap(self, module: nn.Module) -> None:
        """Take off what was put around (and, for mixed precision, into) the module that was trained."""
        self.accelerator.unwrap_model(module, keep_fp32_wrapper=False)
        # Accelerate leaves alone what bears this mark, and so the next stage would go without mixed precision.
        vars(module).pop("_is_accelerate_prepared", None)
        self.accelerator.free_memory()

    @abstractmethod
    def micro_batch(self, model: nn.Module, *, is_last: bool) -> AbstractContextManager[Any]:
        """Return the context of the forward and backward pass of a micro-batch; only the last one sums gradients."""

    @abstractmethod
    def clip_grad_norm(self, model: nn.Module, max_norm: float) -> Tensor:
        """Clip by the norm of the whole gradient, over all processes; return the norm before."""

    @abstractmethod
    def needs_warm_up(self, model: nn.Module) -> bool:
        """Tell whether the first step of a wrapped model would sum gradients in another order than those after it."""

    @abstractmethod
    def gather(self, network: M, copy: M | None, *, keep: bool) -> M:
        """Return the network with whole parameters; all processes have to call it.

        Args:
            network: the run's own.
            copy: its `fsdp.meta_copy`, made before it was sharded; None where it was not.
            keep: whether this process wants the values.
        """


class DdpEngine(Engine):
    """Train with DDP, or with nothing around the network where there is one process."""

    shards = False

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__(accelerator)
        self.name = "one process" if accelerator.num_processes == 1 else "ddp"

    def wrap(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> Wrapped:
        wrapped: Wrapped = self.accelerator.prepare(module, optimizer)
        return wrapped

    def micro_batch(self, model: nn.Module, *, is_last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if is_last else self.accelerator.no_sync(model)

    def clip_grad_norm(self, model: nn.Module, max_norm: float) -> Tensor:
        return self.accelerator.clip_grad_norm_(model.parameters(), max_norm)  # type: ignore[no-any-return]

    def needs_warm_up(self, model: nn.Module) -> bool:
        # DDP lays out its buckets anew after its first backward pass. Two numbers add up alike in any order; of three
        # and more the place in a bucket decides the order.
        return self.accelerator.num_processes > 2 and isinstance(model, DistributedDataParallel)

    def gather(self, network: M, copy: M | None, *, keep: bool) -> M:
        return network
