"""Compute codes (features) from any layer of a backbone, one vector an image.

Promise: a layer is a module, named as in the backbone, and its code is what that module returns in a plain forward
pass in eval mode. That is the same for every architecture, which timm's `forward_intermediates` is not: it exists in
some only, counts its indices differently in each, and may hand out maps that a later in-place layer has changed. What
cannot be read as one vector an image, or may be read in two ways, is an error and never a guess.

Shapes: B images, C channels, H x W pixels or positions, P positions, K prefix tokens (class, distillation, register),
D features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from tlscale.errors import ModelError, TlscaleError, first_line, sentences, suggestion
from tlscale.models.positions import Positions, is_grid, num_rows
from tlscale.recipe.field_types import POOLS

PENULTIMATE = "penultimate"


class Layer(NamedTuple):
    """A layer that is worth trying, as timm describes it; None where it does not."""

    name: str
    stride: int | None
    channels: int | None


class CodesRow(NamedTuple):
    """What one (layer, pool) gives: `width` numbers an image, from positions `stride` pixels apart (None: from one)."""

    layer: str
    pool: str
    stride: int | None
    width: int


def layer_names(backbone: nn.Module) -> list[Layer]:
    """Return the stages of the backbone, earliest first, without the penultimate codes.

    They are those that timm lists; where it lists none that can be named, the parts that the backbone is made of.
    Any other module may be named as well.
    """
    modules, known = dict(backbone.named_modules()), []
    for info in _feature_info(backbone):
        name = info["module"]
        if name and name in modules:
            while _is_list(modules[name]) and (inside := [key for key, _ in modules[name].named_children()]):
                name = f"{name}.{inside[-1]}"  # the last of a list of modules
            known.append(Layer(name, int(info["reduction"]), int(info["num_chs"])))
    return known if len(known) > 1 else [Layer(name, None, None) for name in _parts(backbone)]


def stages(backbone: nn.Module) -> tuple[str, ...]:
    """Return names of the stages, earliest first; the last is 'penultimate'."""
    return (*(layer.name for layer in layer_names(backbone)), PENULTIMATE)


def early_layers(backbone: nn.Module) -> list[str]:
    """Return names of the stages before the penultimate codes, earliest first.

    Where the last stage is as wide as those, they are that stage pooled (and normalised), and it is no earlier layer.
    """
    layers = layer_names(backbone)
    width: object = backbone.num_features
    return [layer.name for layer in (layers[:-1] if len(layers) > 1 and layers[-1].channels == width else layers)]


def _feature_info(backbone: nn.Module) -> list[dict[str, Any]]:
    found = getattr(backbone, "feature_info", None) or []
    return cast(list[dict[str, Any]], getattr(found, "info", found))


def _is_list(module: nn.Module) -> bool:
    """Return whether this only holds modules, and is never called itself."""
    return type(module).forward is nn.Module.forward


def _parts(module: nn.Module, prefix: str = "") -> list[str]:
    names = []
    for name, child in module.named_children():
        if _is_list(child):
            names += _parts(child, f"{prefix}{name}.")
        elif any(True for _ in child.parameters()):
            names.append(f"{prefix}{name}")
    return names


class LayerCodes(nn.Module):
    """Images (B, C, H, W) to one tensor (B, D) for each (layer, pool), in order, in one pass.

    The pass ends with the last layer that is wanted; only the first pass runs to the end, to check that no wanted
    layer runs twice. Gradients are the caller's to switch off. Codes are float32, or float64 from a float64 backbone.

    Args:
        backbone: a timm model without classifier. It stays in eval mode and is otherwise left as it is.
        wanted: pairs of a layer, 'penultimate' (what the backbone itself gives, whose pooling is its own) or the name
            of a module, and a pool. 'avg', 'max' and 'avgmax' (both, so twice as wide) go over positions and leave
            prefix tokens out; 'token' is the first prefix token; 'none' keeps everything, channels first for maps.

    Raises:
        ModelError: no such layer or pool.
    """

    def __init__(self, backbone: nn.Module, wanted: Sequence[tuple[str, str]]) -> None:
        super().__init__()
        assert wanted, "no layer is wanted"
        for layer, pool in wanted:
            _check_layer(backbone, layer)
            if pool not in POOLS:
                remedy = sentences(suggestion(pool, POOLS), f"There are: {', '.join(POOLS)}.")
                raise ModelError(f"there is no '{pool}'", key="codes.pool", remedy=remedy)
        self.backbone = backbone
        self.wanted = tuple((layer, pool) for layer, pool in wanted)
        self._ran_to_the_end = False
        self.eval()

    def train(self, mode: bool = True) -> LayerCodes:
        """Keep eval mode: codes depend on the image alone."""
        return super().train(False)

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, ...]:
        """Compute the codes of each (layer, pool); a `ModelError` where a layer gives no one vector an image."""
        hooked = self._pass(images_BCHW, to_the_end=not self._ran_to_the_end)
        self._ran_to_the_end = True
        return tuple(hooked.codes[pair] for pair in self.wanted)

    def describe(self, images_BCHW: Tensor) -> list[CodesRow]:
        """Describe what each (layer, pool) gives, by one pass of `images_BCHW` (two are enough)."""
        try:
            with torch.no_grad():
                hooked = self._pass(images_BCHW, to_the_end=True)
        except TlscaleError:
            raise
        except Exception as error:  # each architecture complains in its own way about images too small for it
            size = " x ".join(str(pixels) for pixels in images_BCHW.shape[2:])
            raise ModelError(
                f"{type(self.backbone).__name__} cannot take images of {size} pixels: {first_line(error)}",
                key="data.image_size",
                remedy="Set it to a size that the backbone takes.",
            ) from error
        known = {layer.name: layer.stride for layer in layer_names(self.backbone)}
        return [
            CodesRow(layer, pool, known.get(layer) or hooked.strides[layer], int(hooked.codes[layer, pool].shape[1]))
            for layer, pool in self.wanted
        ]

    def _pass(self, images_BCHW: Tensor, *, to_the_end: bool) -> _Hooked:
        if self.backbone.training:  # by a train() of the backbone's own
            self.backbone.eval()
        return _run_hooked(self.backbone, self.wanted, images_BCHW, to_the_end=to_the_end)


def features_and_codes(
    backbone: nn.Module, wanted: Sequence[tuple[str, str]], images_BCHW: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Compute what the backbone gives, and the codes of each (layer, pool), by one pass in the mode that it is in.

    Gradients flow through both. `wanted` is as `LayerCodes` checked it.
    """
    hooked = _run_hooked(backbone, wanted, images_BCHW, to_the_end=True)
    assert hooked.features is not None
    return hooked.features, tuple(hooked.codes[pair] for pair in wanted)


def _run_hooked(
    backbone: nn.Module, wanted: Sequence[tuple[str, str]], images_BCHW: Tensor, *, to_the_end: bool
) -> _Hooked:
    hooked = _Hooked(backbone, wanted, images_BCHW.shape, to_the_end)
    with ExitStack() as hooks:
        for layer in hooked.pools:
            if layer != PENULTIMATE:
                hook = backbone.get_submodule(layer).register_forward_hook(partial(hooked.take, layer))
                hooks.callback(hook.remove)
        try:
            hooked.features = backbone(images_BCHW)
        except _EverythingTaken:
            return hooked
    if PENULTIMATE in hooked.pools:
        hooked.take_penultimate(hooked.features)
    if missing := [layer for layer in hooked.pools if layer not in hooked.strides]:
        raise ModelError(
            f"{type(backbone).__name__} does not run its module '{missing[0]}' on its own, so it gives no codes",
            key="codes.layer",
            remedy=f"Name a module around or in it, or a stage: {', '.join(stages(backbone))}.",
        )
    return hooked


def _check_layer(backbone: nn.Module, layer: str) -> None:
    modules = dict(backbone.named_modules())
    if layer == PENULTIMATE or (layer and layer in modules and not _is_list(modules[layer])):
        return
    kind = type(backbone).__name__
    if layer in modules and layer:
        inside = [f"'{layer}.{name}'" for name, _ in modules[layer].named_children()]
        remedy = f"Name one of {', '.join(inside)}."
        raise ModelError(f"'{layer}' of {kind} is a list of layers", key="codes.layer", remedy=remedy)
    owner, _, own = layer.rpartition(".")
    if owner in modules and hasattr(modules[owner], own) and owner:
        problem = f"'{layer}' of {kind} is a parameter or value, not a layer"
        raise ModelError(problem, key="codes.layer", remedy=f"Name the module '{owner}'.")
    known = stages(backbone)
    siblings = [name for name in modules if name and name.rpartition(".")[0] == owner]
    near = suggestion(layer, [*siblings, PENULTIMATE]) or suggestion(layer, known)
    raise ModelError(
        f"{kind} has no layer '{layer}'",
        key="codes.layer",
        remedy=sentences(
            near,
            f"Its stages: {', '.join(known)}; any module may be named, as in the parameters' names "
            f"({len(modules) - 1} of them).",
        ),
    )


class _EverythingTaken(Exception):  # noqa: N818 (the way out of a pass, no error)
    """All the layers that are wanted have run."""


@dataclass
class _Hooked:
    """The hooks of one pass, and what they took: codes are pooled at once, so that no map stays in memory."""

    backbone: nn.Module
    wanted: Sequence[tuple[str, str]]
    images_shape: torch.Size
    to_the_end: bool
    pools: dict[str, list[str]] = field(default_factory=dict)
    codes: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    strides: dict[str, int | None] = field(default_factory=dict)
    features: Tensor | None = None  # what the backbone gives, if the pass went to the end

    def __post_init__(self) -> None:
        for layer, pool in self.wanted:
            self.pools.setdefault(layer, []).append(pool)

    def take(self, layer: str, module: nn.Module, args: object, value: object) -> None:
        kind = type(self.backbone).__name__
        if layer in self.strides:
            problem = f"'{layer}' of {kind} runs more than once in a pass"
            raise ModelError(problem, key="codes.layer", remedy="Name a module around it.")
        tensor = only_tensor(value)
        if tensor is None:
            inside = ", ".join(f"'{layer}.{name}'" for name, _ in module.named_children())
            raise ModelError(
                f"'{layer}' of {kind} gives a {type(value).__name__}, not one tensor",
                key="codes.layer",
                remedy=f"Name a module {f'in it ({inside}), or ' if inside else ''}after it.",
            )
        tensor = at_least_float32(tensor)
        found = layout_of(tensor, layer, self.backbone, self.images_shape).positions(tensor)
        self.strides[layer] = None if found.height is None else round(self.images_shape[2] / found.height)
        for pool in self.pools[layer]:
            self.codes[layer, pool] = found.pooled(pool, layer)
        if not self.to_the_end and len(self.strides) == len(self.pools):
            raise _EverythingTaken

    def take_penultimate(self, features: object) -> None:
        if not isinstance(features, Tensor) or features.ndim != 2:
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ModelError(f"{type(self.backbone).__name__} gives {shape}, not one vector an image", key="backbone")
        self.strides[PENULTIMATE] = None
        for pool in self.pools[PENULTIMATE]:
            self.codes[PENULTIMATE, pool] = at_least_float32(features)


def at_least_float32(value: Tensor) -> Tensor:
    """Raise half precision to float32."""
    return value if value.dtype == torch.float64 else value.float()


class Layout(NamedTuple):
    """How what a layer gives is to be read, by network and size of images: K of tokens, the channels' side of maps."""

    num_dims: int
    num_prefix: int = 0
    channel_dim: int = 1
    images_hw: tuple[int, int] = (1, 1)

    def positions(self, value: Tensor) -> Positions:
        """Read the positions and the prefix tokens."""
        if self.num_dims == 2:
            return Positions(value.unsqueeze(1), value.new_zeros(len(value), 0, value.shape[1]), None)
        if self.num_dims == 3:
            num_positions = value.shape[1] - self.num_prefix
            height = num_rows(num_positions, self.images_hw)
            return Positions(value[:, self.num_prefix :], value[:, : self.num_prefix], height)
        value = value.movedim(self.channel_dim, 1)
        positions = value.flatten(2).transpose(1, 2)
        return Positions(positions, positions[:, :0], value.shape[2], is_map=True)


def layout_of(value: Tensor, layer: str, backbone: nn.Module, images_shape: torch.Size) -> Layout:
    """Find out how what a layer gave is to be read.

    Raises:
        ModelError: it cannot be read as one vector an image, or in two ways.
    """
    if value.ndim not in (2, 3, 4) or value.shape[0] != images_shape[0]:
        raise ModelError(
            f"'{layer}' of {type(backbone).__name__} gives {tuple(value.shape)} for {images_shape[0]} images: neither "
            "a map (B, C, H, W) or (B, H, W, C), nor tokens (B, N, D), nor a vector (B, D) an image",
            key="codes.layer",
            remedy=f"Name a module around it, or a stage: {', '.join(stages(backbone))}.",
        )
    if value.ndim == 3:
        num_prefix = _num_prefix(value, layer, backbone, images_shape)
        return Layout(3, num_prefix=num_prefix, images_hw=(images_shape[2], images_shape[3]))
    return Layout(value.ndim, channel_dim=_channel_dim(value, layer, backbone, images_shape) if value.ndim == 4 else 1)


def only_tensor(value: object) -> Tensor | None:
    """Return the one tensor that a layer gave; None where it gave none, or several."""
    tensors = [one for one in value if isinstance(one, Tensor)] if isinstance(value, tuple | list) else [value]
    return tensors[0] if len(tensors) == 1 and isinstance(tensors[0], Tensor) else None


def _num_prefix(value: Tensor, layer: str, backbone: nn.Module, images_shape: torch.Size) -> int:
    """Find K by counting: some architectures add their class token only after the layers that timm lists."""
    declared = int(getattr(backbone, "num_prefix_tokens", 0) or 0)
    infos = _feature_info(backbone)
    own = {known.stride for known in layer_names(backbone) if known.name == layer and known.stride is not None}
    strides = own or {int(info["reduction"]) for info in infos}
    if not strides and not declared:
        return 0
    sizes = {math.ceil(images_shape[2] / stride) * math.ceil(images_shape[3] / stride) for stride in strides}
    # One is looked for as well: some declare none and have a class token all the same.
    fitting = {num for num in {0, 1, declared} if value.shape[1] - num in sizes}
    if len(fitting) == 1:
        return fitting.pop()
    raise ModelError(
        f"'{layer}' of {type(backbone).__name__} gives {tuple(value.shape)}; which of these are positions of the image "
        f"{'is not clear' if fitting else 'is not known'} (timm reports {sorted(sizes)} positions and {declared} "
        "prefix tokens)",
        key="codes.layer",
        remedy=f"Name a module around it, or a stage: {', '.join(stages(backbone))}.",
    )


def _channel_dim(value: Tensor, layer: str, backbone: nn.Module, images_shape: torch.Size) -> int:
    """Return 1 for (B, C, H, W), 3 for (B, H, W, C): as timm notes of the stage, else by which two sides are alike.

    Where images are not square: by which two have their proportions.
    """
    num_chs = {known.channels for known in layer_names(backbone) if known.name == layer}
    by_width = [dim for dim in (1, 3) if value.shape[dim] in num_chs]
    if len(by_width) == 1:
        return by_width[0]
    if by_width:  # both fit: then it is as the architecture declares, or as timm's do unless they declare it
        return 3 if getattr(backbone, "output_fmt", None) == "NHWC" else 1
    _, one, two, three = value.shape
    wants_last = any(isinstance(module, nn.Linear | nn.LayerNorm) for module in backbone.modules())
    images_hw = (images_shape[2], images_shape[3])
    may_be_first, may_be_last = is_grid((two, three), images_hw), is_grid((one, two), images_hw)
    if may_be_first and not (may_be_last and wants_last):
        return 1
    if may_be_last and not may_be_first:
        return 3
    raise ModelError(
        f"'{layer}' of {type(backbone).__name__} gives {tuple(value.shape)}, and which side is the channels' does "
        "not follow from that",
        key="codes.layer",
        remedy=f"Set another data.image_size, or name a stage: {', '.join(stages(backbone))}.",
    )
