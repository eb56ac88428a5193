"""Heads: new layers, always freshly initialised, from the features of a backbone to logits.

Shapes: B images, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from tlscale.errors import ModelError, sentences, suggestion
from tlscale.recipe.field_types import HeadLayer


def _dropout(width: int, number: float | None, num_classes: int) -> nn.Module:
    assert number is not None, "the schema requires it"
    return nn.Dropout(number)


LAYERS: dict[str, Callable[[int, float | None, int], nn.Module]] = {
    "linear": lambda width, number, num_classes: nn.Linear(width, num_classes if number is None else int(number)),
    "dropout": _dropout,
    "relu": lambda *_: nn.ReLU(),
    "gelu": lambda *_: nn.GELU(),
    "silu": lambda *_: nn.SiLU(),
    "tanh": lambda *_: nn.Tanh(),
    "leaky_relu": lambda *_: nn.LeakyReLU(),
    "hardswish": lambda *_: nn.Hardswish(),
    "elu": lambda *_: nn.ELU(),
    "layernorm": lambda width, number, num_classes: nn.LayerNorm(width),
    "batchnorm": lambda width, number, num_classes: nn.BatchNorm1d(width),
}
"""By name, a function from (width of its input, number in the recipe or None, number of classes) to the layer. What a
recipe may write of each is in `tlscale.recipe.field_types.HEAD_LAYERS`."""


def build_head(layers: Sequence[HeadLayer], *, in_features: int, num_classes: int, seed: int) -> nn.Sequential:
    """Build the head of a recipe, from the backbone's pooled features (B, `in_features`) to (B, `num_classes`).

    Args:
        layers: the recipe's `head`, checked by the schema; the last `linear` has no width.
        seed: of the initial weights (PyTorch's default for each layer); the global generator is left as it was.

    Raises:
        ModelError: there is no such layer, as in a model that a newer tlscale exported.
    """
    head = nn.Sequential()
    width = in_features
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for item in layers:
            name, number = (item, None) if isinstance(item, str) else next(iter(item.items()))
            if name not in LAYERS:
                known = ", ".join(LAYERS)
                raise ModelError(
                    f"there is no layer '{name}'",
                    remedy=sentences(suggestion(name, LAYERS), f"There are: {known}"),
                    key="head",
                )
            layer = LAYERS[name](width, number, num_classes)
            head.append(layer)
            width = layer.out_features if isinstance(layer, nn.Linear) else width
    return head


def is_single_linear(layers: Sequence[HeadLayer]) -> bool:
    """Return whether the head is what timm itself would build: at most dropout before one linear layer."""
    return all(isinstance(layer, dict) and "dropout" in layer for layer in layers[:-1])
