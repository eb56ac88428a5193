"""Batch norms folded into the convolutions before them: fewer passes over memory for the same codes.

Promise: only a norm that provably reads a convolution that nothing else reads is folded, and no module changes its
name; outputs differ by rounding only.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import cast

from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from timm.models._features_fx import get_notrace_functions, get_notrace_modules
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from tlscale.errors import ModelError


def fold_norms(backbone: nn.Module, keep: Iterable[str] = ()) -> tuple[nn.Module, tuple[str, ...]]:
    """A copy in eval mode in which each batch norm that directly follows a convolution is part of its weights.

    Args:
        backbone: is left as it is.
        keep: layers whose codes are wanted: a convolution whose own output is one of them is not folded into.

    Returns:
        The copy, with the same module names, and the convolutions that took up a norm. Outputs differ by rounding only.

    Raises:
        ModelError: the backbone cannot be traced, so what follows what is not known.
    """
    folded = copy.deepcopy(backbone).eval()
    pairs = _conv_norm_pairs(folded)
    # A layer that ends in the convolution while the norm comes after it would change what it gives.
    pairs = {
        conv: norm
        for conv, norm in pairs.items()
        if all(_is_within(norm, layer) or not _is_within(conv, layer) for layer in keep)
    }
    for conv_name, norm_name in pairs.items():
        conv = cast(nn.Conv2d, folded.get_submodule(conv_name))
        norm = cast(nn.BatchNorm2d, folded.get_submodule(norm_name))
        assert norm.running_mean is not None
        assert norm.running_var is not None
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        rest = nn.Sequential()  # timm's norms have dropout and activation in them
        for name, child in norm.named_children():
            rest.add_module(name, child)
        folded.set_submodule(norm_name, rest)
    return folded, tuple(sorted(pairs))


def _is_within(module: str, layer: str) -> bool:
    return module == layer or module.startswith(f"{layer}.")


def _conv_norm_pairs(backbone: nn.Module) -> dict[str, str]:
    """Convolutions whose output goes to one batch norm and nowhere else, each run once."""
    modules = dict(backbone.named_modules())
    try:
        calls = [node for node in _Tracer().trace(backbone).nodes if node.op == "call_module"]
    except Exception as error:  # a tracer breaks on whatever the architecture does with its values
        raise ModelError(
            f"codes.fold_norm: {type(backbone).__name__} cannot be traced ({str(error).splitlines()[0]}); "
            "set it to false"
        ) from error
    times = [node.target for node in calls]
    pairs = {}
    for node in calls:
        conv = node.args[0] if node.args else None
        norm = modules[str(node.target)]
        # Only these very types: others put their weights through something before they use them.
        if type(norm) not in (nn.BatchNorm2d, BatchNormAct2d) or not isinstance(conv, fx.Node):
            continue
        if conv.op != "call_module" or type(modules[str(conv.target)]) not in (nn.Conv2d, Conv2dSame):
            continue
        alone = len(conv.users) == 1 and times.count(conv.target) == 1 and times.count(node.target) == 1
        if alone and cast(nn.BatchNorm2d, norm).running_mean is not None:
            pairs[str(conv.target)] = str(node.target)
    return pairs


class _Tracer(fx.Tracer):
    """Goes into everything but what timm says cannot be traced, and the layers that are looked for."""

    def __init__(self) -> None:
        super().__init__(autowrap_functions=tuple(get_notrace_functions()))  # type: ignore[no-untyped-call]
        self._leaves = (nn.BatchNorm2d, nn.Conv2d, *get_notrace_modules())  # type: ignore[no-untyped-call]

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, self._leaves) or super().is_leaf_module(module, name)
