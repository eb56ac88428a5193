"""Shard what is trained over the processes by FSDP2 (`compute.engine: fsdp2`): some rows of every tensor on each.

Promise: parameters that are trained, their gradients, moments and averages are DTensors, of whose rows each process
holds its shard; they are unsharded only while the block that they belong to computes. What is frozen, and buffers, are
not touched: every process has all of them. It is torch's `fully_shard` on any device, as Accelerate's own FSDP trains
with DDP on a CPU without a message (docs/adr/0013).
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tlscale.distributed.engine import Engine, T, Wrapped
from tlscale.errors import ModelError, RecipeError

M = TypeVar("M", bound=nn.Module)
_ROWS = [Shard(0)]


class Fsdp2Engine(Engine):
    """Train a network whose trained parameters are sharded over the processes of `mesh`."""

    shards = True
    mesh: DeviceMesh

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__(accelerator)
        self.name = "fsdp2"
        self.mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        self._empty: nn.Module | None = None  # the network's `meta_copy`, which is filled and exported in its place

    def if_whole(self, make: Callable[[], T]) -> T | None:
        return None

    @contextmanager
    def restoring(self, restore: Callable[[], None]) -> Iterator[None]:
        yield
        restore()  # into shards, which came into being when the stage was entered

    def shard(
        self,
        module: nn.Module,
        network: nn.Module,
        precision: str,
        keep_fp32: Collection[nn.Parameter],
        rebuild: Callable[[int], None],
    ) -> None:
        # Before it is sharded: a module that was is FSDP's for good, and cannot be exported.
        self._empty = meta_copy(network)
        rebuild(shard(module, network, self.mesh, precision, keep_fp32))

    def wrap(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> Wrapped:
        # Autocast alone: Accelerate would put DDP around it.
        return self.accelerator.prepare_model(module, evaluation_mode=True), optimizer

    def micro_batch(self, model: nn.Module, *, is_last: bool) -> AbstractContextManager[Any]:
        assert isinstance(model, FSDPModule)
        model.set_requires_gradient_sync(is_last)
        return nullcontext()

    def clip_grad_norm(self, model: nn.Module, max_norm: float) -> Tensor:
        norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def needs_warm_up(self, model: nn.Module) -> bool:
        return False

    def gather(self, network: M, *, keep: bool) -> M:
        assert self._empty is not None, "it was sharded"
        return gather_into(cast(M, self._empty), network, keep=keep)  # torch gave the sharded one another class


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor that is sharded; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_tensor(tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    """Shard a tensor that every process has whole."""
    return distribute_tensor(tensor.to(mesh.device_type), mesh, _ROWS, src_data_rank=None)


# -- shard ----------------------------------------------------------------------------------------------------------


def shard(
    module: nn.Module, network: nn.Module, mesh: DeviceMesh, precision: str, keep_fp32: Collection[nn.Parameter]
) -> int:
    """Shard the trained parameters of `module` over the processes of `mesh`.

    `network` gets the same ones wherever it holds them, though `module`, in which all that is trained is, may be a part
    of it that is called otherwise. `keep_fp32` are exchanged in float32 where the others are in bfloat16.

    Returns:
        The number of its blocks, which are unsharded one after the other in place of all at once.

    Raises:
        ModelError: a parameter that has no rows.
        RecipeError: a precision that this torch does not support here.
    """
    _refuse_scalars(network)
    places = [
        (owner, name, param)
        for owner in network.modules()
        for name, param in owner.named_parameters(recurse=False)
        if param.requires_grad
    ]
    before = {
        id(param): (owner, name) for owner in module.modules() for name, param in owner.named_parameters(recurse=False)
    }
    options: dict[str, Any] = {
        "mesh": mesh,
        "ignored_params": {param for param in module.parameters() if not param.requires_grad},
        "mp_policy": _policy(precision, keep_fp32),
        # Of the root as well: what stayed unsharded after an evaluation would not see the weights that change after it.
        "reshard_after_forward": True,
    }
    inside = set(module.modules())
    blocks = [block for block in repeated_blocks(network) if block in inside]
    for block in blocks:
        fully_shard(block, **options)
    fully_shard(module, **options)
    for owner, name, param in places:
        home, home_name = before[id(param)]
        owner.register_parameter(name, home.get_parameter(home_name))
    return len(blocks)


def sharded_groups(groups: list[dict[str, Any]], params: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
    """Give `groups` the shards of their parameters; the groups themselves let go of the unsharded ones."""
    for group in groups:
        group["params"] = [params[name] for name in group["names"]]
    return groups


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """Find the modules that a network is a repetition of, as far as they are trained; none lies within another.

    A block consists of modules, and is of a class of which sequences hold two or more. One that mostly consists of
    several blocks of one class is a stage, and not a block. A block is what is unsharded at once, so it is to be small;
    and what costs a collective operation, so not a single layer.
    """
    counts = Counter(
        type(child)
        for parent in network.modules()
        if isinstance(parent, nn.Sequential | nn.ModuleList)
        for child in parent.children()
        if any(child.children()) and not isinstance(child, nn.Sequential | nn.ModuleList)
    )
    candidates = {module for module in network.modules() if counts[type(module)] > 1 and _num_trained(module)}
    blocks = [module for module in network.modules() if module in candidates and not _is_stage(module, candidates)]
    within = {inner for block in blocks for inner in block.modules() if inner is not block}
    return [block for block in blocks if block not in within]


def _is_stage(module: nn.Module, candidates: set[nn.Module]) -> bool:
    inner = [part for part in module.modules() if part in candidates and part is not module]
    counts = Counter(type(part) for part in inner)
    several = [part for part in inner if counts[type(part)] > 1]
    return 2 * sum(map(_num_trained, several)) > _num_trained(module)


def _num_trained(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters() if param.requires_grad)


def trained_bytes(module: nn.Module) -> int:
    """Count the bytes of what is trained."""
    return sum(param.numel() * param.element_size() for param in module.parameters() if param.requires_grad)


def unsharded_bytes(network: nn.Module) -> int:
    """Count the bytes that are unsharded while the largest block computes: that block, and what is in no block."""
    blocks = [trained_bytes(block) for block in repeated_blocks(network)]
    return trained_bytes(network) - sum(blocks) + max(blocks, default=0)


def _refuse_scalars(network: nn.Module) -> None:
    for name, param in network.named_parameters():
        if param.requires_grad and param.ndim == 0:
            raise ModelError(
                f"fsdp2 shards trained parameters by their rows, and {name} is a single number without rows",
                key="compute.engine",
                remedy="Freeze it, or write compute.engine: ddp",
            )


def _policy(precision: str, keep_fp32: Collection[nn.Parameter]) -> MixedPrecisionPolicy:
    """Exchange bf16 where the precision is bf16, but for `keep_fp32`.

    Gradients are summed in fp32, weights kept in fp32, and autocast does the rest, as it does under DDP.
    """
    if precision != "bf16":
        return MixedPrecisionPolicy(cast_forward_inputs=False)
    if "param_dtype_override_fn" not in {field.name for field in fields(MixedPrecisionPolicy)}:
        raise RecipeError(
            f"bf16 with compute.engine: fsdp2 needs torch 2.15, and this is {torch.__version__}",
            key="compute.precision",
            remedy="Write fp32, or compute.engine: ddp",
        )
    in_fp32 = {id(param) for param in keep_fp32}
    return MixedPrecisionPolicy(
        param_dtype=torch.bfloat16,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
        param_dtype_override_fn=lambda param: torch.float32 if id(param) in in_fp32 else None,
    )


# -- unsharded again --------------------------------------------------------------------------------------------------


def meta_copy(network: M) -> M:
    """Copy a network: it shares what is frozen, and buffers, and has no values for what is trained.

    It is what `gather_into` fills: a module that was sharded calls the other processes for good.
    """
    memo: dict[int, Any] = {id(buffer): buffer for buffer in network.buffers()}
    for param in network.parameters():
        memo[id(param)] = nn.Parameter(param.detach().to("meta")) if param.requires_grad else param
    return copy.deepcopy(network, memo)


def gather_into(empty: M, network: nn.Module, *, keep: bool) -> M:
    """Give `empty`, a `meta_copy`, the unsharded values of the trained parameters; all processes have to call it.

    A process that does not `keep` them gives its shards and has no memory for the rest.
    """
    shards = dict(network.named_parameters())
    for path, owner in empty.named_modules():
        for name, param in list(owner.named_parameters(recurse=False)):
            if param.requires_grad:
                shard = shards[f"{path}.{name}" if path else name].detach()
                unsharded = shard.full_tensor() if isinstance(shard, DTensor) else shard
                if keep:
                    owner.register_parameter(name, nn.Parameter(unsharded.cpu()))
    return empty
