"""Build optimizers by timm's names, with parameter groups made from rules.

Promise: only trainable parameters, each in one group; a group keeps its own peak learning rate in `base_lr`, and
the loop sets `lr = base_lr * lr_factor(step)`. No scheduler object exists.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from torch import nn
from torch.distributed.tensor import DTensor

from tlscale.errors import RecipeError, sentences, suggestion
from tlscale.recipe.rules import match_rules
from tlscale.recipe.schema import OptimSection

Group = dict[str, Any]


def parameter_groups(
    params: Mapping[str, nn.Parameter],
    section: OptimSection,
    *,
    layer_depth: Mapping[str, int],
    never_decayed: frozenset[str],
    where: str = "",
) -> list[Group]:
    """Group trainable parameters by (learning rate, weight decay), in order of first appearance.

    Args:
        params: all parameters by name; the frozen ones are skipped.
        layer_depth: layers away from the head, by name (0 is the head), for `layer_decay`.
        never_decayed: names that the architecture wants without weight decay (position embeddings and the like).
        where: the stage whose `lr_rules` these are, for messages; empty where they are the recipe's.

    Raises:
        RecipeError: a rule has no effect.
    """
    params = {name: param for name, param in params.items() if param.requires_grad}
    lr_factors = match_rules(section.lr_rules, params, f"{where or 'optim.'}lr_rules")
    decays = match_rules(section.weight_decay_rules, params, "optim.weight_decay_rules")
    groups: dict[tuple[float, float], Group] = {}
    for name, param in params.items():
        lr = section.lr * (lr_factors[name].value if name in lr_factors else 1.0)
        if section.layer_decay is not None:
            lr *= section.layer_decay ** layer_depth[name]
        plain = (param.ndim <= 1 or name in never_decayed) and not section.decay_norm_and_bias
        decay = decays[name].value if name in decays else 0.0 if plain else section.weight_decay
        group = groups.setdefault(
            (lr, decay), {"params": [], "lr": lr, "base_lr": lr, "weight_decay": decay, "names": []}
        )
        group["params"].append(param)
        group["names"].append(name)
    return list(groups.values())


def build_optimizer(groups: list[Group], section: OptimSection) -> torch.optim.Optimizer:
    """Build timm's optimizer `section.name` over `groups`.

    Raises:
        RecipeError: no such optimizer here, or an option that it does not take.
    """
    check_optimizer(section)
    if get_optimizer_info(_base_name(section.name)).second_order:
        problem = f"'{section.name}' needs second derivatives, which the training loop does not compute"
        raise RecipeError(problem, key="optim.name", remedy="Use another, such as adamw, lamb, or muon")
    options: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in section.options.items()
    }
    if (implementation := _implementation(groups, section)) is not None:
        options[implementation] = True
    # Copies: an optimizer writes into its groups (some count steps there), and another may be built from the same ones.
    groups = [{**group} for group in groups]
    try:
        optimizer = create_optimizer_v2(groups, opt=section.name, lr=section.lr, weight_decay=0.0, **options)
    except Exception as error:  # optimizers raise whatever they like about their arguments
        given = f" with {dict(section.options)}" if section.options else ""
        raise RecipeError(f"'{section.name}' cannot be made{given}: {error}", key="optim") from error
    return optimizer


def _implementation(groups: list[Group], section: OptimSection) -> str | None:
    """Return which of torch's implementations to use; None for its default, or where there are none.

    `fused` updates all parameters in one pass, where torch's default on a CPU is a loop over the tensors
    (benchmarks/optimizer_step.py compares them). For sharded tensors torch has a fused Adam alone. What the recipe
    chooses in `optim.options` wins.
    """
    optimizer_class = get_optimizer_info(_base_name(section.name)).opt_class
    if isinstance(optimizer_class, str) or not optimizer_class.__module__.startswith("torch.optim"):
        return None
    known = inspect.signature(optimizer_class.__init__).parameters
    if {"fused", "foreach", "capturable", "differentiable"} & set(section.options):
        return None
    params = [param for group in groups for param in group["params"]]
    if any(isinstance(param, DTensor) for param in params) and not optimizer_class.__name__.startswith("Adam"):
        return "foreach" if "foreach" in known else None
    return "fused" if "fused" in known and {param.device.type for param in params} <= {"cpu", "cuda"} else None


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set every group to its own peak times `factor`; return the highest learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return max(float(group["lr"]) for group in optimizer.param_groups)


def _base_name(name: str) -> str:
    """Return timm's name without the prefix that wraps any optimizer in Lookahead."""
    return name.lower().removeprefix("lookahead_")


def check_optimizer(section: OptimSection) -> None:
    """Check the name and the options of an optimizer.

    Raises:
        RecipeError: timm has no such optimizer, or it does not take an option.
    """
    names, base = [str(name) for name in list_optimizers()], _base_name(section.name)
    if base not in names:
        remedy = sentences(suggestion(base, names), f"There are: {', '.join(names)}")
        raise RecipeError(f"timm has no optimizer '{section.name}'", key="optim.name", remedy=remedy)
    optimizer_class = get_optimizer_info(base).opt_class
    if isinstance(optimizer_class, str):
        return  # of another package; it checks its own arguments
    known = set(inspect.signature(optimizer_class.__init__).parameters) - {"self", "params", "lr", "weight_decay"}
    for key in section.options:
        if key not in known:
            remedy = sentences(suggestion(key, known), f"It takes: {', '.join(sorted(known))}")
            raise RecipeError(f"'{section.name}' takes no '{key}'", key="optim.options", remedy=remedy)
