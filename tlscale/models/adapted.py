"""Tell what of pretrained weights was made for other images than those of the run, and what became of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tlscale.errors import ModelError, first_few


def repeated_filters(model: nn.Module, in_chans: int, made: Mapping[str, Tensor] | None = None) -> tuple[str, ...]:
    """Return a note on first filters that were pretrained on three channels, where the images have others.

    Args:
        made: tensors of a file, by the names of the network; None: those that timm loaded.

    Raises:
        ModelError: timm turns these into random ones without a word.
    """
    if in_chans in (1, 3):
        return ()
    names = _first_layers(model)
    own = model.state_dict()
    if made is not None:
        names = [name for name in names if name in made and made[name].shape != own[name].shape]
        if not names:
            return ()
    if not names or any(name not in own or own[name].ndim != 4 or own[name].shape[1] != in_chans for name in names):
        raise ModelError(
            f"the pretrained first layer of {type(model).__name__} cannot be turned into one of {in_chans} channels",
            key="backbone.in_chans",
            remedy="Choose another backbone.name, or weights: none",
        )
    base = 3 if made is None else made[names[0]].shape[1]
    kinds = " ".join(f"{channel % base + 1}" for channel in range(min(in_chans, 8))) + (" ..." if in_chans > 8 else "")
    what = f"made for {base} channels, repeated for {in_chans} ({kinds}) and scaled by {base}/{in_chans}"
    return (f"the filters of the first layer are {what}: {first_few(names)}",)


def interpolated(made: Mapping[str, Tensor], model: nn.Module) -> tuple[str, ...]:
    """Return a note on what was interpolated to the size of the images: position embeddings and the like.

    Args:
        made: tensors of the network, by its names, as they were made for images of another size.
        model: with these weights.
    """
    channels = _first_layers(model)
    own = {name: param for name, param in model.named_parameters() if name not in channels}
    names = [name for name, param in own.items() if name in made and made[name].numel() != param.numel()]
    if not names:
        return ()
    form, other = tuple(made[names[0]].shape), tuple(own[names[0]].shape)
    return (f"interpolated to the size of the images: {first_few(names)}, such as {form} to {other}",)


def _first_layers(model: nn.Module) -> list[str]:
    cfg: Any = model.pretrained_cfg
    first = cfg.get("first_conv") or ()
    return [f"{name}.weight" for name in ((first,) if isinstance(first, str) else first)]
