"""Add low-rank adapters (LoRA, Hu et al. 2021) to layers of a backbone, and merge them into its weights again.

Promise: a network with new adapters gives the very numbers of the one without. Names of parameters stay those of the
backbone, and an adapter's stand behind them (`blocks.11.attn.qkv.lora_A`); a merged network has no other names than
before. In eval mode a layer computes with its merged weight, so that what is evaluated is what is exported.

Shapes: B rows, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812 (as torch's own documentation has it)
from torch import Tensor, nn

from tlscale.errors import ModelError, suggestion
from tlscale.recipe.matching import check_time
from tlscale.recipe.rules import Rule
from tlscale.recipe.sections.network import LoraSection
from tlscale.recipe.seeds import derive_seed

_KEY = "adapters.lora"
_NAMES = ("lora_A", "lora_B")
ALL_BUT_ADAPTERS = Rule(r"(?!(.*\.)?lora_[AB]$).*", value=True)
"""The rule behind those of a recipe with adapters."""


class LoraLinear(nn.Linear):
    """A linear layer with an adapter: A is R x I, B is O x R."""

    lora_A: nn.Parameter  # noqa: N815 (as the paper and every library name it)
    lora_B: nn.Parameter  # noqa: N815
    lora_scale: float

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return F.linear(input, merged_weight(self), self.bias)
        low_rank = F.linear(F.linear(input, self.lora_A), self.lora_B)
        return torch.add(F.linear(input, self.weight, self.bias), low_rank, alpha=self.lora_scale)


class LoraConv2d(nn.Conv2d):
    """A convolution with an adapter: A is R filters like its own, B is O x R x 1 x 1."""

    lora_A: nn.Parameter  # noqa: N815
    lora_B: nn.Parameter  # noqa: N815
    lora_scale: float

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            out: Tensor = self._conv_forward(input, merged_weight(self), self.bias)
            return out
        low_rank = F.conv2d(self._conv_forward(input, self.lora_A, None), self.lora_B)
        full: Tensor = self._conv_forward(input, self.weight, self.bias)
        return torch.add(full, low_rank, alpha=self.lora_scale)


def merged_weight(layer: LoraLinear | LoraConv2d) -> Tensor:
    """Compute the weight that does what weight and adapter do together, in the weight's own type."""
    with torch.autocast(layer.weight.device.type, enabled=False):
        low_rank = layer.lora_B.flatten(1) @ layer.lora_A.flatten(1)
        return torch.add(layer.weight, low_rank.view_as(layer.weight), alpha=layer.lora_scale)


def add_adapters(
    backbone: nn.Module, section: LoraSection, freezing: Sequence[Sequence[Rule[bool]]], *, seed: int
) -> list[str]:
    """Give an adapter to each linear layer and convolution that the section names and some stage does not freeze.

    Args:
        freezing: the rules of each stage; a layer whose weight all of them freeze gets none, so that what is frozen
            is computed once as ever.
        seed: of A; B begins at zero.

    Returns:
        Names of the layers.

    Raises:
        RecipeError: the pattern takes too long.
        ModelError: it names no such layer, or only frozen ones, or the rank is too large for one.
    """
    layers = {name: module for name, module in backbone.named_modules() if _takes_adapter(module)}
    check_time(section.layers, tuple(layers), f"{_KEY}.layers")
    rule = Rule(section.layers, True)
    named = [name for name in layers if rule.matches(name)]
    if not named:
        raise _no_layer(backbone, section, list(layers))
    for rules in freezing:
        _check_time(rules, [f"{name}.weight" for name in named])
    chosen = [name for name in named if not all(_freezes(rules, f"{name}.weight") for rules in freezing)]
    if not chosen:
        problem = f"'{section.layers}' names {len(named)} layers (such as '{named[0]}'), all of which 'freeze' freezes"
        raise ModelError(problem, key=f"{_KEY}.layers", remedy="Freeze less, or name later layers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "adapters"))
        for name in chosen:
            _adapt(name, layers[name], section)
    return chosen


def _check_time(rules: Sequence[Rule[bool]], names: Sequence[str]) -> None:
    """Refuse rules that take too long, before one is matched: `match_rules` does it later."""
    for rule in rules:
        check_time(rule.pattern, tuple(names), "freeze")


def freezing_beside(backbone: nn.Module, rules: Sequence[Rule[bool]]) -> Sequence[Rule[bool]]:
    """Return the rules of a stage, and behind them one that freezes all but adapters, where there are any."""
    names = [name for name, _ in backbone.named_parameters()]
    if not any(map(is_of_adapter, names)):
        return rules
    _check_time(rules, names)
    left = [name for name in names if not any(rule.matches(name) for rule in rules)]
    if not any(map(ALL_BUT_ADAPTERS.matches, left)):
        return rules
    return [*rules, ALL_BUT_ADAPTERS]


def is_of_adapter(name: str) -> bool:
    """Return whether a parameter of this name is an adapter's."""
    return name.rpartition(".")[2] in _NAMES


@contextmanager
def merged(network: nn.Module) -> Iterator[None]:
    """Put adapters into the weights of their layers within the context, which then has no adapters."""
    adapted = [module for module in network.modules() if isinstance(module, LoraLinear | LoraConv2d)]
    own = [(module, type(module), module.weight.detach().clone(), module.lora_A, module.lora_B) for module in adapted]
    try:
        for module in adapted:
            with torch.no_grad():
                module.weight.copy_(merged_weight(module))
            del module.lora_A, module.lora_B
            _become(module, nn.Linear if isinstance(module, LoraLinear) else nn.Conv2d)
        yield
    finally:
        for module, kind, weight, lora_a, lora_b in own:
            _become(module, kind)
            module.lora_A, module.lora_B = lora_a, lora_b
            with torch.no_grad():
                module.weight.copy_(weight)


def _become(module: nn.Module, kind: type[nn.Module]) -> None:
    # The same module with another forward pass: whoever holds it, or has hooked it, has the new one.
    module.__class__ = kind


def _takes_adapter(module: nn.Module) -> bool:
    # Others compute in another way than torch's own (padding, standardised weights), and so would their adapters.
    return type(module) is nn.Linear or (type(module) is nn.Conv2d and module.groups == 1)


def _freezes(rules: Sequence[Rule[bool]], name: str) -> bool:
    first = next((rule for rule in rules if rule.matches(name)), None)
    return first is not None and first.value


def _adapt(name: str, module: nn.Module, section: LoraSection) -> None:
    weight = cast(nn.Linear | nn.Conv2d, module).weight
    num_outputs, num_inputs = len(weight), weight[0].numel()
    if section.rank > min(num_outputs, num_inputs):
        problem = f"{section.rank} is more than '{name}' has, whose weight is {num_outputs} x {num_inputs}"
        remedy = "Lower it, or leave this layer out of adapters.lora.layers"
        raise ModelError(problem, key=f"{_KEY}.rank", remedy=remedy)
    a = torch.empty(section.rank, *weight.shape[1:], dtype=weight.dtype)
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    adapted = cast(LoraLinear | LoraConv2d, module)
    _become(module, LoraLinear if isinstance(module, nn.Linear) else LoraConv2d)
    adapted.lora_A = nn.Parameter(a.to(weight.device))
    adapted.lora_B = nn.Parameter(weight.new_zeros(num_outputs, section.rank, *[1] * (weight.ndim - 2)))
    adapted.lora_scale = (section.rank if section.alpha is None else section.alpha) / section.rank


def _no_layer(backbone: nn.Module, section: LoraSection, layers: list[str]) -> ModelError:
    rule = Rule(section.layers, True)
    check_time(section.layers, tuple(name for name, _ in backbone.named_modules()), f"{_KEY}.layers")
    others = [(name, type(module).__name__) for name, module in backbone.named_modules() if rule.matches(name)]
    if others:
        name, kind = others[0]
        problem = f"'{section.layers}' names no layer that takes an adapter, but '{name}' ({kind})"
        remedy = "Adapters are for torch's linear layers and for its convolutions without groups"
        if layers:
            remedy += f", such as '{layers[-1]}'"
    else:
        problem = f"'{section.layers}' names no layer (it has to match whole names)"
        remedy = suggestion(section.layers, layers) or (f"There are '{layers[0]}' to '{layers[-1]}'" if layers else "")
    return ModelError(problem, key=f"{_KEY}.layers", remedy=remedy)
