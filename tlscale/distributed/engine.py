"""Train on several processes: the one object that knows how the network is laid out over them.

`Engine` has a whole network on each process, by DDP where there are several; `fsdp.Fsdp2Engine` has a shard of every
trained tensor on each. Both give the same loop the same calls.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)
Wrapped = tuple[nn.Module, torch.optim.Optimizer]


class Engine:
    """Wrap what is trained, and do the parts of a step that depend on how it is wrapped.

    Attributes:
        name: as `run.json` has it.
        shards: whether each process holds only shards of what is trained, so that all have to evaluate in lockstep.
        mesh: the processes over which parameters are sharded; None: they are not.
    """

    name: str
    shards: ClassVar[bool] = False
    mesh: DeviceMesh | None = None

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.name = "one process" if accelerator.num_processes == 1 else "ddp"

    def if_whole(self, make: Callable[[], T]) -> T | None:
        """Make what needs whole parameters, such as averages; return None where it is made of shards, in `shard`."""
        return make()

    @contextmanager
    def restoring(self, restore: Callable[[], None]) -> Iterator[None]:
        """Restore a checkpoint before the stage is entered within, while nothing is wrapped yet."""
        restore()
        yield

    def shard(
        self,
        module: nn.Module,
        network: nn.Module,
        precision: str,
        keep_fp32: Collection[nn.Parameter],
        rebuild: Callable[[int], None],
    ) -> None:
        """Shard what is trained of `module`, and so of `network`; do nothing where every process has all of it.

        `keep_fp32` are parameters that are exchanged in float32 where the others are in bfloat16. `rebuild` is called
        with the number of blocks: it builds the optimizer and the averages again, since the parameters are other
        objects now.
        """

    def wrap(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> Wrapped:
        """Return what is called and stepped in their place."""
        wrapped: Wrapped = self.accelerator.prepare(module, optimizer)
        return wrapped

    def unwrap(self, module: nn.Module) -> None:
        """Take off what was put around (and, for mixed precision, into) the module that was trained."""
        self.accelerator.unwrap_model(module, keep_fp32_wrapper=False)
        # Accelerate leaves alone what bears this mark, and so the next stage would go without mixed precision.
        vars(module).pop("_is_accelerate_prepared", None)
        self.accelerator.free_memory()

    def micro_batch(self, model: nn.Module, *, is_last: bool) -> AbstractContextManager[Any]:
        """Return the context of the forward and backward pass of a micro-batch; only the last one sums gradients."""
        return nullcontext() if is_last else self.accelerator.no_sync(model)

    def clip_grad_norm(self, model: nn.Module, max_norm: float) -> Tensor:
        """Clip by the norm of the whole gradient, over all processes; return the norm before."""
        return self.accelerator.clip_grad_norm_(model.parameters(), max_norm)  # type: ignore[no-any-return]

    def needs_warm_up(self, model: nn.Module) -> bool:
        """Tell whether the first step of a wrapped model would sum gradients in another order than those after it."""
        # DDP lays out its buckets anew after its first backward pass. Two numbers add up alike in any order; of three
        # and more the place in a bucket decides the order.
        return self.accelerator.num_processes > 2 and isinstance(model, DistributedDataParallel)

    def gather(self, network: M, *, keep: bool) -> M:
        """Return the run's network with whole parameters, where this process wants to `keep` them; all call it."""
        return network
