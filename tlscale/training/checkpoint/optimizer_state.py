"""Pack the state of an optimizer, by parameter name: tensors for safetensors, and the rest as plain JSON values.

Promise: unpacked, every number is what it was, in the type that it was kept in; nothing that cannot be written so is
skipped in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tlscale.errors import CheckpointError

_USUAL = ("state", "param_groups")  # what every optimizer's state dict has


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Pack the state by parameter name: tensors for safetensors, the rest as JSON.

    Raises:
        CheckpointError: the optimizer keeps something that is neither a tensor nor a plain value.
    """
    whole = optimizer.state_dict()
    names = [name for group in optimizer.param_groups for name in group["names"]]
    tensors: dict[str, Tensor] = {}
    state = {names[index]: _pack(value, names[index], tensors) for index, value in whole["state"].items()}
    # Some optimizers count steps in their groups, or keep a random generator next to them.
    groups = [
        {
            key: _pack(value, f"group/{number}/{key}", tensors)
            for key, value in group.items()
            if isinstance(value, bool | int | float | Tensor) and key != "lr"
        }
        for number, group in enumerate(whole["param_groups"])
    ]
    others = {key: _pack(value, f"other/{key}", tensors) for key, value in whole.items() if key not in _USUAL}
    return tensors, {"state": state, "groups": groups, "others": others}


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    """Give `optimizer` the state that `pack_optimizer` packed, by parameter name.

    Raises:
        CheckpointError: it is the state of other parameters.
    """
    names = [name for group in optimizer.param_groups for name in group["names"]]
    unknown = set(plain["state"]) - set(names)
    if unknown:
        raise CheckpointError(
            f"the checkpoint has optimizer state of other parameters: {', '.join(sorted(unknown)[:3])}"
        )
    whole = optimizer.state_dict()
    if len(plain["groups"]) != len(whole["param_groups"]):
        raise CheckpointError(
            f"the checkpoint has {len(plain['groups'])} groups of parameters, the recipe makes "
            f"{len(whole['param_groups'])}"
        )
    for group, saved in zip(whole["param_groups"], plain["groups"], strict=True):
        group.update({key: _unpack(value, tensors) for key, value in saved.items()})
    whole.update({key: _unpack(value, tensors) for key, value in plain["others"].items()})
    _load(optimizer, whole, tensors, plain["state"])


def carry_moments(old: torch.optim.Optimizer, new: torch.optim.Optimizer) -> None:
    """Give `new` the state that `old` has of the parameters of both, by name; the others start afresh.

    What an optimizer keeps in its groups rather than by parameter (a count of steps in some) starts afresh, too.
    """
    tensors, plain = pack_optimizer(old)
    _load(new, new.state_dict(), tensors, plain["state"])


def _load(
    optimizer: torch.optim.Optimizer, whole: dict[str, Any], tensors: Mapping[str, Tensor], packed: Mapping[str, Any]
) -> None:
    """Load `whole`, with the packed state of each parameter of this optimizer."""
    names = [name for group in optimizer.param_groups for name in group["names"]]
    saved = {index: _unpack(packed[name], tensors) for index, name in enumerate(names) if name in packed}
    optimizer.load_state_dict({**whole, "state": saved})
    # PyTorch loads every number as the type of its parameter, which is not always the one it was kept in.
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for index, values in saved.items():
        state = optimizer.state.get(params[index], {})
        for key, value in values.items():
            if isinstance(value, Tensor) and key in state and state[key].dtype != value.dtype:
                state[key] = value.to(state[key].device)


def _pack(value: object, key: str, tensors: dict[str, Tensor]) -> Any:
    match value:
        case Tensor():
            tensors[key] = value
            return {"tensor": key}
        case dict():
            return {"dict": [[name, _pack(item, f"{key}.{name}", tensors)] for name, item in value.items()]}
        case list() | tuple():
            items = [_pack(item, f"{key}.{number}", tensors) for number, item in enumerate(value)]
            return {type(value).__name__: items}
        case None | bool() | int() | float() | str():
            return value
    raise CheckpointError(
        f"the optimizer keeps a {type(value).__name__} for '{key}', which cannot be saved",
        remedy="Use another optimizer",
    )


def _unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(packed, dict):
        return packed
    kind, value = next(iter(packed.items()))
    match kind:
        case "tensor":
            return tensors[value]
        case "dict":
            return {name: _unpack(item, tensors) for name, item in value}
        case "list":
            return [_unpack(item, tensors) for item in value]
        case "tuple":
            return tuple(_unpack(item, tensors) for item in value)
    raise CheckpointError(f"the checkpoint's optimizer state has an unknown kind '{kind}'")
