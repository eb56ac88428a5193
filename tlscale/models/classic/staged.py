"""Build a network from a chain of stages, with the interface of timm's models: the frame of the classic networks.

Promise: the interface that timm and its users expect of a model is here once, and means what it means there:
`forward_features`, `forward_head`, `forward_intermediates`, `prune_intermediate_layers`, `reset_classifier`,
`feature_info`, `group_matcher` and `set_grad_checkpointing`.

The layers that a paper puts between its convolutions and its classifier are the neck, and belong to the features:
without classifier (`num_classes=0`) a network gives the last of them, (B, head_hidden_size). With `global_pool=''`
they are skipped, and it gives the map of its last stage, (B, num_features, h, w).

Shapes: B images, C channels, H and W pixels, h and w pixels of a map, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from timm.layers import SelectAdaptivePool2d
from timm.models import checkpoint
from torch import Tensor, nn

from tlscale.errors import ModelError


class Stage(NamedTuple):
    """Layers up to one of the maps that a network offers as features."""

    layers: dict[str, nn.Module]
    num_chs: int
    reduction: int  # pixels of the image a pixel of the map, along one axis


class StagedNet(nn.Module):
    """Stages one after the other, pooling, the layers of `_neck` if any, dropout and a linear classifier `fc`.

    Args:
        stages: from the image on.
        in_chans: channels of the images.
        hidden: width of the neck; 0 for none.
        num_classes: width of the classifier; 0 for none.
        global_pool: how the last map is pooled (avg, max, avgmax, catavgmax) to `grid` x `grid` pixels; '' for not at
            all, which leaves no place for a neck and a classifier.
        drop_rate: dropout before the classifier, and where else the paper has it.

    Raises:
        ModelError: a classifier without pooling.
    """

    grid = 1  # pixels of the pooled map that the neck sees, along one axis

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        in_chans: int,
        hidden: int = 0,
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.in_chans, self.hidden, self.drop_rate = in_chans, hidden, drop_rate
        self.grad_checkpointing = False
        self.feature_info: list[dict[str, Any]] = []
        self._stages = [tuple(stage.layers) for stage in stages]
        for stage in stages:
            for name, layer in stage.layers.items():
                self.add_module(name, layer)
            self.feature_info.append(
                {"num_chs": stage.num_chs, "reduction": stage.reduction, "module": list(stage.layers)[-1]}
            )
        self.num_features = stages[-1].num_chs
        self._pool_to(global_pool, self.grid if hidden else 1)
        has_neck = hidden > 0 and global_pool != ""
        neck = self._neck(self.num_features * self.grid**2 * _widening(global_pool)) if has_neck else {}
        self._neck_names = tuple(neck)
        for name, layer in neck.items():
            self.add_module(name, layer)
        self.drop = nn.Dropout(drop_rate)
        self.apply(self._init_weights)
        self.reset_classifier(num_classes)

    def _neck(self, width: int) -> dict[str, nn.Module]:
        """Build the layers from the pooled and flattened map, (B, `width`), to (B, `hidden`), if there is `hidden`."""
        raise NotImplementedError

    def _pool_to(self, global_pool: str, grid: int) -> None:
        self.global_pool = SelectAdaptivePool2d(grid, pool_type=global_pool, flatten=bool(global_pool))

    @staticmethod
    def _init_weights(layer: nn.Module) -> None:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    @property
    def head_hidden_size(self) -> int:
        """D of what the classifier sees."""
        return self.hidden if self._neck_names else self.num_features * _widening(self.global_pool.pool_type)

    def get_classifier(self) -> nn.Module:
        """Return the classifier: linear, or the identity when there is none."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put in a new classifier of this width (0: none), and another kind of pooling where one is named.

        A neck that was dropped with `global_pool=''` does not come back: the classifier then sees the pooled map.

        Raises:
            ModelError: a classifier without pooling, or pooling of another width under a neck.
        """
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        if num_classes > 0 and not pool_type:
            raise ModelError(
                f"{type(self).__name__}: a classifier of {num_classes} classes needs pooling",
                remedy="Give global_pool='avg', or num_classes=0",
            )
        if pool_type != self.global_pool.pool_type:
            self._change_pool(pool_type)
        self.num_classes = num_classes
        weight = next(self.parameters())
        self.fc = (
            nn.Linear(self.head_hidden_size, num_classes, device=weight.device, dtype=weight.dtype)
            if num_classes > 0
            else nn.Identity()
        ).train(self.training)

    def _change_pool(self, global_pool: str) -> None:
        before = self.global_pool.pool_type
        if not global_pool:
            self._drop_neck()
        if self._neck_names and _widening(global_pool) != _widening(before):
            raise ModelError(
                f"{type(self).__name__}: {self._neck_names[0]} was built for global_pool={before!r}, which has "
                f"another width than {global_pool!r}",
                remedy=f"Build the model with global_pool={global_pool!r}",
            )
        self._pool_to(global_pool, self.grid if self._neck_names else 1)
        self.global_pool.train(self.training)

    def _drop_neck(self) -> None:
        for name in self._neck_names:
            delattr(self, name)
        self._neck_names = ()

    def forward_features(self, x: Tensor) -> Tensor:
        """Compute the last map (B, num_features, h, w) from images (B, C, H, W)."""
        for names in self._stages:
            x = self._run(names, x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute logits (B, num_classes), or what the classifier sees (B, head_hidden_size), from the last map."""
        x = self.drop(self._run(self._neck_names, self.global_pool(x)))
        return x if pre_logits else cast(Tensor, self.fc(x))

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits (B, num_classes), or features (B, head_hidden_size) without classifier, from images."""
        return self.forward_head(self.forward_features(x))

    def _run(self, names: Sequence[str], x: Tensor) -> Tensor:
        recompute = self.grad_checkpointing and self.training
        for name in names:
            layer = getattr(self, name)
            x = checkpoint(layer, x) if recompute else layer(x)
        return x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Compute the maps at the ends of stages, and the last map.

        Args:
            x: (B, C, H, W).
            indices: stages, in the order of `feature_info`; a number for that many of the last, None for all.
            norm: of timm, for a norm layer after the last stage; there is none here.
            stop_early: go no further than the last map that is wanted.
            output_fmt: NCHW, which is all there is.
            intermediates_only: without the last map.

        Raises:
            ModelError: another `output_fmt`.
        """
        if output_fmt != "NCHW":
            raise ModelError(f"{type(self).__name__}: maps come as output_fmt='NCHW', not {output_fmt!r}")
        taken, last = _taken_stages(len(self._stages), indices)
        maps = []
        for index, names in enumerate(self._stages[: last + 1] if stop_early else self._stages):
            x = self._run(names, x)
            if index in taken:
                maps.append(x)
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Take off what the maps of `indices` (as in `forward_intermediates`) do not need.

        The neck and the classifier go with `prune_head`, and whenever a stage goes, since they were made for the last.
        `prune_norm` is timm's, for a norm layer after the last stage; there is none here.
        """
        taken, last = _taken_stages(len(self._stages), indices)
        for names in self._stages[last + 1 :]:
            for name in names:
                delattr(self, name)
        is_shorter = last + 1 < len(self._stages)
        self._stages = self._stages[: last + 1]
        self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or is_shorter:
            self.reset_classifier(0, "")
        return taken

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Group parameters from the image on: a stage each if `coarse`, else a layer each; the classifier last."""
        groups = list(self._stages) if coarse else [(name,) for names in self._stages for name in names]
        groups += [(name,) for name in self._neck_names]
        return {names[-1]: rf"^(?:{'|'.join(names)})\." for names in groups}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Store only activations between layers, and recompute those within them in the backward pass."""
        self.grad_checkpointing = enable


def _taken_stages(num_stages: int, indices: int | list[int] | None) -> tuple[list[int], int]:
    """Return the stages that `indices` means, and the last of them, as timm's models read it.

    timm's own function for this is private. A number means that many of the last stages; None means all.

    Raises:
        ModelError: there is no such stage.
    """
    wanted = list(range(-num_stages, 0)) if indices is None else indices
    wanted = list(range(-wanted, 0)) if isinstance(wanted, int) else wanted
    if not wanted or not all(-num_stages <= index < num_stages for index in wanted):
        raise ModelError(f"indices: {indices!r} names no stages of a network that has {num_stages}")
    taken = [index % num_stages for index in wanted]
    return taken, max(taken)


def _widening(global_pool: str) -> int:
    """Return how many numbers such pooling gives a channel."""
    return 2 if global_pool.endswith("catavgmax") else 1
