"""Freeze parameters: no gradient, and norm layers and dropout of the frozen part stay in eval mode.

Promise: parameters are chosen by rules on their names and nothing else; no module is swapped, so state-dict keys
stay those of the checkpoint (timm's own `freeze` swaps batch norms for copies without `num_batches_tracked`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from tlscale.errors import ModelError
from tlscale.models.adapters import ALL_BUT_ADAPTERS
from tlscale.recipe.rules import Rule, match_rules


@dataclass(frozen=True)
class FreezeRow:
    """One line of the table that is printed: what a rule took."""

    pattern: str | None
    """None: no rule matches these."""
    is_frozen: bool
    num_tensors: int
    num_params: int
    norm_mode: str

    @property
    def rule(self) -> str:
        """Return the rule as it is shown."""
        rule = "all else but adapters" if self.pattern == ALL_BUT_ADAPTERS.pattern else self.pattern or "no rule"
        return f"{rule}{'' if self.is_frozen else '  (train)'}"


def freeze_parameters(backbone: nn.Module, rules: Sequence[Rule[bool]], where: str = "freeze") -> list[FreezeRow]:
    """Switch the gradient off for every backbone parameter whose first matching rule freezes it.

    Args:
        rules: in order; the first that matches a name wins.
        where: the recipe key that the rules came from, for messages.

    Returns:
        One row a rule, in order, and one for what no rule matches.

    Raises:
        RecipeError: a rule has no effect.
    """
    params = dict(backbone.named_parameters())
    chosen = match_rules(rules, params, where)
    for name, rule in chosen.items():
        if rule.value:
            params[name].requires_grad_(False)
    rows = []
    for rule in rules:
        names = [name for name, by in chosen.items() if by is rule]
        rows.append(_row(backbone, rule.pattern, names, is_frozen=rule.value))
    rest = [name for name in params if name not in chosen]
    if rest:
        rows.append(_row(backbone, None, rest, is_frozen=False))
    return rows


def _row(backbone: nn.Module, pattern: str | None, names: Iterable[str], *, is_frozen: bool) -> FreezeRow:
    params = {name: backbone.get_parameter(name) for name in names}
    owners = {name.rpartition(".")[0] for name in params}
    norms = [owner for owner in owners if is_norm(backbone.get_submodule(owner))]
    frozen = [owner for owner in norms if not any(p.requires_grad for p in backbone.get_submodule(owner).parameters())]
    if not norms:
        mode = "no norm"
    else:
        mode = "eval" if len(frozen) == len(norms) else "train" if not frozen else f"eval {len(frozen)}/{len(norms)}"
    return FreezeRow(pattern, is_frozen, len(params), sum(param.numel() for param in params.values()), mode)


def is_norm(module: nn.Module) -> bool:
    """Return whether this is a normalisation layer; torch's and timm's are all named so."""
    return "Norm" in type(module).__name__


def frozen_modules(root: nn.Module) -> list[nn.Module]:
    """Return the largest modules all of whose parameters are frozen (and that have some).

    Dropout and stochastic depth have no parameters: they count as frozen where the smallest module around them
    that has parameters is frozen, which is why whole subtrees are taken.
    """
    params = list(root.parameters())
    if params and not any(param.requires_grad for param in params):
        return [root]
    return [module for child in root.children() for module in frozen_modules(child)]


def unchanging_keys(network: nn.Module) -> set[str]:
    """Return names in the state dict of what training does not change: frozen parameters, buffers of frozen modules."""
    names = {name for name, param in network.named_parameters() if not param.requires_grad}
    frozen = {id(module) for root in frozen_modules(network) for module in root.modules()}
    for path, module in network.named_modules():
        if id(module) in frozen:
            names.update(f"{path}.{name}" if path else name for name, _ in module.named_buffers(recurse=False))
    return names


def check_trainable(params: Iterable[nn.Parameter], rules: Sequence[Rule[bool]], where: str = "freeze") -> None:
    """Check that something is left to train; a `ModelError` else."""
    if not any(param.requires_grad for param in params):
        raise ModelError(
            f"the rules {', '.join(repr(rule.pattern) for rule in rules)} leave nothing to train",
            key=where,
            remedy="Narrow a rule, or add a head",
        )
