"""New head layers on the pooled features of a backbone, always freshly initialised.

Shapes: B images, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from tlscale.recipe.schema import HeadLayer

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "leaky_relu": nn.LeakyReLU,
    "hardswish": nn.Hardswish,
    "elu": nn.ELU,
}


def build_head(layers: Sequence[HeadLayer], *, in_features: int, num_classes: int, seed: int) -> nn.Sequential:
    """The head of the recipe: (B, `in_features`) to (B, `num_classes`).

    Args:
        layers: the recipe's `head`, checked by the schema; the last `linear` has no width.
        in_features: D, what the backbone gives after pooling.
        num_classes: C.
        seed: of the initial weights (PyTorch's default for each layer); the global generator is left as it was.
    """
    head = nn.Sequential()
    width = in_features
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in layers:
            name, number = (layer, None) if isinstance(layer, str) else next(iter(layer.items()))
            out = int(number) if name == "linear" and number is not None else num_classes
            head.append(_build_layer(name, number, width, out))
            width = out if name == "linear" else width
    return head


def _build_layer(name: str, number: float | None, width: int, out: int) -> nn.Module:
    match name:
        case "linear":
            return nn.Linear(width, out)
        case "dropout":
            assert number is not None
            return nn.Dropout(number)
        case "layernorm":
            return nn.LayerNorm(width)
        case "batchnorm":
            return nn.BatchNorm1d(width)
        case _:
            return _ACTIVATIONS[name]()


def is_single_linear(layers: Sequence[HeadLayer]) -> bool:
    """Whether the head is what timm itself would build: at most dropout before one linear layer."""
    return all(isinstance(layer, dict) and "dropout" in layer for layer in layers[:-1])
