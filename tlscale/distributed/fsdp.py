"""FSDP2 (`compute.engine: fsdp2`): what is trained is spread over the processes, a share of every tensor on each.

Promise: parameters that are trained, their gradients, moments and averages are DTensors, of whose rows each process
holds its share; they are whole only while the block that they belong to computes. What is frozen, and buffers, are not
touched: every process has all of them. It is torch's `fully_shard` on any device, as Accelerate's own FSDP trains with
DDP on a CPU and does not say so (docs/adr/0013).
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tlscale.errors import ModelError, RecipeError
from tlscale.models.freeze import is_norm
from tlscale.recipe.schema import OptimSection
from tlscale.training.optimizer import build_optimizer

M = TypeVar("M", bound=nn.Module)
_ROWS = [Shard(0)]


def local(tensor: Tensor) -> Tensor:
    """This process's share of a tensor that is spread over several; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_tensor(tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    """The share of each process of a tensor that all of them have."""
    return distribute_tensor(tensor.to(mesh.device_type), mesh, _ROWS, src_data_rank=None)


# -- shard ----------------------------------------------------------------------------------------------------------


def shard(module: nn.Module, network: nn.Module, mesh: DeviceMesh, precision: str) -> int:
    """Spread the trained parameters of `module` over the processes of `mesh`.

    `network` gets the same ones wherever it holds them, though `module` may be a part of it that is called otherwise.

    Args:
        module: what is called; all that is trained is in it.
        network: the run's own, which checkpoints are of.
        precision: the recipe's.

    Returns:
        How many blocks of it are whole one after the other, in place of all at once.

    Raises:
        ModelError: a parameter that has no rows.
        RecipeError: a precision that this torch cannot have here.
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
        "mp_policy": _policy(module, precision),
        # Of the root as well: what stayed whole after an evaluation would not see the weights that change after it.
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


def repeated_blocks(network: nn.Module) -> list[nn.Module]:
    """The modules that a network is a repetition of, as far as they are trained; none lies within another.

    A block consists of modules, and is of a class of which sequences hold two or more. One that mostly consists of
    several blocks of one class is a stage, and not a block. A block is what is whole at once, so it is to be small; and
    what costs a collective operation, so not a single layer.
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


def unsharded_bytes(network: nn.Module) -> int:
    """What a process holds whole while the largest block computes: that, and what is in no block."""

    def num_bytes(module: nn.Module) -> int:
        return sum(param.numel() * param.element_size() for param in module.parameters() if param.requires_grad)

    blocks = [num_bytes(block) for block in repeated_blocks(network)]
    return num_bytes(network) - sum(blocks) + max(blocks, default=0)


def _refuse_scalars(network: nn.Module) -> None:
    for name, param in network.named_parameters():
        if param.requires_grad and param.ndim == 0:
            raise ModelError(
                f"compute.engine: fsdp2 spreads the rows of what is trained over the processes, and {name} is a single "
                "number without rows. Freeze it, or take compute.engine: ddp"
            )


def _policy(module: nn.Module, precision: str) -> MixedPrecisionPolicy:
    """In bf16 the processes exchange bf16, but for norm layers: their operations want them in fp32.

    Gradients are summed in fp32, weights kept in fp32, and autocast does the rest, as it does under DDP.
    """
    if precision != "bf16":
        return MixedPrecisionPolicy(cast_forward_inputs=False)
    if "param_dtype_override_fn" not in {field.name for field in fields(MixedPrecisionPolicy)}:
        raise RecipeError(
            f"compute.engine: fsdp2 with compute.precision: bf16 needs torch 2.15, and this is {torch.__version__}; "
            "take fp32, or compute.engine: ddp"
        )
    norms = {id(param) for layer in module.modules() if is_norm(layer) for param in layer.parameters(recurse=False)}
    return MixedPrecisionPolicy(
        param_dtype=torch.bfloat16,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
        param_dtype_override_fn=lambda param: torch.float32 if id(param) in norms else None,
    )


# -- train ----------------------------------------------------------------------------------------------------------


def micro_batch(accelerator: Accelerator, model: nn.Module, *, is_last: bool) -> AbstractContextManager[Any]:
    """Around the forward and backward pass of a micro-batch: the processes add up gradients in the last one only."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_last)
        return nullcontext()
    return nullcontext() if is_last else accelerator.no_sync(model)


def clip_grad_norm(accelerator: Accelerator, model: nn.Module, most: float) -> Tensor:
    """Clip by the norm of the whole gradient, over all processes; the norm before."""
    if not isinstance(model, FSDPModule):
        return accelerator.clip_grad_norm_(model.parameters(), most)  # type: ignore[no-any-return]
    norm = nn.utils.clip_grad_norm_(model.parameters(), most)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


# -- the optimizer --------------------------------------------------------------------------------------------------

# Even and uneven shares, and none; from 16 on some optimizers keep sums of rows and columns.
_TRIED_SHAPES = ((34, 18), (19,), (1, 20, 18), (18, 17, 3, 3))
_TRIED_STEPS = 3


def objection_to_sharding(section: OptimSection, mesh: DeviceMesh) -> str | None:
    """Why an optimizer cannot be had here; None where it does the same on spread tensors as on whole ones.

    It is tried: most update each number by itself, or by norms that DTensors know; some look at the shape of what they
    see, or at its memory, and would learn something else without a word.
    """
    try:
        whole, spread_out = (_after_steps(section, mesh if is_spread else None) for is_spread in (False, True))
        for one, other in zip(whole, spread_out, strict=True):
            if not isinstance(other, DTensor) or not torch.allclose(
                local(shard_tensor(one, mesh)), local(other), rtol=1e-9
            ):
                return "it updates shares in another way than whole tensors"
    except RecipeError:  # it cannot be made at all
        raise
    except Exception as error:  # optimizers raise whatever they like
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'its own check'}"
    return None


def _after_steps(section: OptimSection, mesh: DeviceMesh | None) -> list[Tensor]:
    """The parameters, and what the optimizer keeps of them, after a few steps."""
    generator = torch.Generator().manual_seed(0)

    def numbers(shape: tuple[int, ...]) -> Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        return drawn if mesh is None else shard_tensor(drawn, mesh)

    params = [nn.Parameter(numbers(shape)) for shape in _TRIED_SHAPES]
    names = [f"tensor {number}" for number in range(len(params))]
    group = {"params": params, "names": names, "lr": 0.1, "base_lr": 0.1, "weight_decay": 0.01}
    optimizer = build_optimizer([group], section)
    for _ in range(_TRIED_STEPS):
        for param in params:
            param.grad = numbers(tuple(param.shape))
        optimizer.step()
    kept = [
        value
        for param in params
        for _, value in sorted(optimizer.state[param].items())
        if isinstance(value, Tensor) and value.ndim > 0
    ]
    if any(value.shape not in {param.shape for param in params} for value in kept):
        raise TypeError("it keeps tensors of another shape than the parameters'")
    return [*(param.detach() for param in params), *kept]


def sharded_groups(groups: list[dict[str, Any]], params: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
    """`groups` with what became of their parameters; the groups themselves let go of the whole ones."""
    for group in groups:
        group["params"] = [params[name] for name in group["names"]]
    return groups


# -- whole again ----------------------------------------------------------------------------------------------------


def meta_copy(network: M) -> M:
    """A copy that shares what is frozen, and buffers, and has no values for what is trained.

    It is what `gather_into` makes whole: a module that was sharded calls the other processes for good.
    """
    memo: dict[int, Any] = {id(buffer): buffer for buffer in network.buffers()}
    for param in network.parameters():
        memo[id(param)] = nn.Parameter(param.detach().to("meta")) if param.requires_grad else param
    return copy.deepcopy(network, memo)


def gather_into(hollow: M, network: nn.Module, *, keep: bool) -> M:
    """`hollow` with the whole values of the trained parameters of `network`; all processes have to call it.

    Args:
        keep: whether this process wants them; another one gives its share and keeps no memory for the rest.
    """
    shares = dict(network.named_parameters())
    for path, owner in hollow.named_modules():
        for name, param in list(owner.named_parameters(recurse=False)):
            if param.requires_grad:
                share = shares[f"{path}.{name}" if path else name].detach()
                whole = share.full_tensor() if isinstance(share, DTensor) else share
                if keep:
                    owner.register_parameter(name, nn.Parameter(whole.cpu()))
    return hollow
