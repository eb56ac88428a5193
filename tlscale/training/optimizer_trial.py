"""Try on sharded tensors whether an optimizer does the same there as on whole ones.

Most update each number on its own, or by norms that DTensors know; some look at the shape of what they see, or at its
memory, and would learn something else without a word.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from tlscale.distributed.fsdp import local, shard_tensor
from tlscale.distributed.processes import Processes
from tlscale.errors import RecipeError, kind_and_line
from tlscale.recipe.schema import OptimSection
from tlscale.training.optimizer import build_optimizer

# Even and uneven shards, and none; from 16 on some optimizers keep sums of rows and columns.
_SHAPES = ((34, 18), (19,), (1, 20, 18), (18, 17, 3, 3))
_STEPS = 3


def check_optimizer_shards(section: OptimSection, mesh: DeviceMesh | None, processes: Processes) -> None:
    """Refuse an optimizer that would learn something else on shards; `mesh` None: nothing is sharded.

    Raises:
        RecipeError: on every process, where it does not work on one.
    """
    if mesh is None:
        return
    why_not = next(filter(None, processes.gather(_objection(section, mesh))), None)
    if why_not is not None:
        raise RecipeError(
            f"'{section.name}' is not supported with compute.engine: fsdp2 ({why_not})",
            key="optim.name",
            remedy="Use another, such as adamw, sgd, lion or lamb, or write compute.engine: ddp",
        )


def _objection(section: OptimSection, mesh: DeviceMesh) -> str | None:
    try:
        unsharded, sharded = (_after_steps(section, where) for where in (None, mesh))
        for one, other in zip(unsharded, sharded, strict=True):
            if not isinstance(other, DTensor) or not torch.allclose(
                local(shard_tensor(one, mesh)), local(other), rtol=1e-9
            ):
                return "it updates shards in another way than whole tensors"
    except RecipeError:  # it cannot be made at all
        raise
    except Exception as error:  # optimizers raise whatever they like
        return kind_and_line(error)
    return None


def _after_steps(section: OptimSection, mesh: DeviceMesh | None) -> list[Tensor]:
    """Return the parameters, and what the optimizer keeps of them, after a few steps; `mesh` None: on whole tensors."""
    generator = torch.Generator().manual_seed(0)

    def numbers(shape: tuple[int, ...]) -> Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
        return drawn if mesh is None else shard_tensor(drawn, mesh)

    params = [nn.Parameter(numbers(shape)) for shape in _SHAPES]
    names = [f"tensor {number}" for number in range(len(params))]
    group = {"params": params, "names": names, "lr": 0.1, "base_lr": 0.1, "weight_decay": 0.01}
    optimizer = build_optimizer([group], section)
    for _ in range(_STEPS):
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
