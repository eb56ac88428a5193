"""Find keys of a recipe that would have no effect with its other keys.

Promise: only what differs from its default was asked for, so no key at its default is a mistake; and only recipes of
users are checked here: a run that was made is read whatever its recipe holds. What also takes the data or the network
to know is checked where these are known (`tlscale.training.setup`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from tlscale.recipe.mistakes import Findings, Origin
from tlscale.recipe.rules import Rule
from tlscale.recipe.schema import Recipe, asks_for


class _Idle(NamedTuple):
    """Keys that have no effect where `holds` does."""

    keys: tuple[str, ...]
    holds: Callable[[Recipe], bool]
    why: str


_CACHE_KEYS = ("codes.dtype", "codes.disk_gib", "codes.memory_mib", "codes.cache_gib")
_IDLE = (
    _Idle(_CACHE_KEYS, lambda recipe: recipe.codes.keep == "never", "with codes.keep=never, which caches no codes"),
    _Idle(
        ("codes.disk_gib",),
        lambda recipe: recipe.codes.keep == "always",
        "with codes.keep=always, which caches them whatever their size is",
    ),
    _Idle(("optim.lr",), lambda recipe: _is_replaced(recipe, "lr"), "as each stage has its own lr"),
    _Idle(
        ("optim.layer_decay",),
        lambda recipe: _is_replaced(recipe, "layer_decay"),
        "as each stage has its own layer_decay",
    ),
    _Idle(("schedule",), lambda recipe: _is_replaced(recipe, "schedule"), "as each stage has its own schedule"),
    _Idle(
        ("optim.decay_norm_and_bias",),
        lambda recipe: recipe.optim.weight_decay == 0,
        "with optim.weight_decay=0 (optim.weight_decay_rules reach norm layers and biases in any case)",
    ),
    _Idle(
        ("loss.class_weights",),
        lambda recipe: (
            isinstance(weights := recipe.loss.class_weights, dict) and len(set(weights.values())) == 1 < len(weights)
        ),
        "as all its weights are equal, and they are scaled to a mean of 1",
    ),
    _Idle(
        ("loss.kind",),
        lambda recipe: recipe.loss.kind == "focal" and recipe.loss.focal_gamma == 0,
        "with loss.focal_gamma=0, which is cross_entropy",
    ),
    _Idle(
        ("loss",),
        lambda recipe: recipe.distill is not None and recipe.distill.labels == 0 and recipe.distill.logits > 0,
        "with distill.labels=0: nothing is learned from labels",
    ),
)


def _is_replaced(recipe: Recipe, key: str) -> bool:
    """Return whether every stage has its own value of a key."""
    return recipe.stages is not None and all(getattr(stage, key) is not None for stage in recipe.stages)


def find_idle(recipe: Recipe, findings: Findings, origin_of: Callable[[str], Origin]) -> None:
    """Report each key that was asked for in vain.

    Args:
        recipe: whole and valid.
        findings: gets the mistakes.
        origin_of: tells where a key was written.
    """
    for key, why in _idle_keys(recipe):
        findings.add(origin_of(key), f"has no effect {why}", "Remove it.", key=key)


def _idle_keys(recipe: Recipe) -> Iterator[tuple[str, str]]:
    for keys, holds, why in _IDLE:
        if holds(recipe):
            yield from ((key, why) for key in keys if asks_for(recipe, key))
    for where, rules in [("freeze", recipe.freeze), *_stage_rules(recipe)]:
        if rules and not rules[-1].value and recipe.adapters is None:
            yield where, f"in its last rule, '{rules[-1].pattern}: false': what no rule matches is trained anyway"


def _stage_rules(recipe: Recipe) -> Iterator[tuple[str, tuple[Rule[bool], ...]]]:
    return ((f"stages[{number}].freeze", stage.freeze) for number, stage in enumerate(recipe.stages or ()))
