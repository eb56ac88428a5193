"""Check tensors from a file before they go into a network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tlscale.errors import ModelError
from tlscale.models.weights import named


def check_like(state: Mapping[str, Tensor], own: Mapping[str, Tensor], what: str) -> None:
    """Check that tensors are those that a network has: by name, shape, and whether they are whole numbers.

    Raises:
        ModelError: they are not.
    """
    if missing := sorted(own.keys() - state.keys()):
        raise ModelError(f"{what} lacks {named(missing)}")
    if unknown := sorted(state.keys() - own.keys()):
        raise ModelError(f"{what} has what the network has no place for: {named(unknown)}")
    for name, tensor in own.items():
        found = state[name]
        if found.shape != tensor.shape:
            raise ModelError(f"{what} has {name} of shape {tuple(found.shape)}, not {tuple(tensor.shape)}")
        if found.is_floating_point() != tensor.is_floating_point():
            raise ModelError(f"{what} has {name} of type {found.dtype}, not {tensor.dtype}")


def refuse_non_finite(state: Mapping[str, Tensor], what: str) -> None:
    """Find what one wrong bit makes of a number in an export without checksums."""
    wrong = [name for name, tensor in state.items() if not bool(torch.isfinite(tensor).all())]
    if wrong:
        raise ModelError(f"{what} has NaN or infinite numbers in {named(wrong)}")


def check_classifiers(model: nn.Module, num_classes: int | None) -> None:
    """Check that what the settings call the classifier is one, as scores are computed by it, apart from the rest.

    Args:
        num_classes: None of a backbone, whose head is ours.

    Raises:
        ModelError: it is no layer of the network, or gives another number of scores.
    """
    if num_classes is None:
        return
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    names, state = cfg.get("classifier") or (), model.state_dict()
    for name in (names,) if isinstance(names, str) else names:
        weight, bias = (state.get(f"{name}.{part}") for part in ("weight", "bias"))
        if weight is None or bias is None or weight.ndim < 2 or len(weight) != num_classes:
            raise ModelError(f"the settings call {name!r} the classifier, which is none of {num_classes} classes")
