"""Name the values that a part of a network gives, as the keys of codes do: layers with a pooling, or a partition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from tlscale.models.backbone import function_digest
from tlscale.models.features import PENULTIMATE
from tlscale.models.partition.partition import Partition
from tlscale.recipe.schema import CodesSection

_WHOLE_BACKBONE = "backbone"  # the name of the classifier's child, where that is the whole prefix


@dataclass(frozen=True)
class Part:
    """Identify values that one part of a network gives, and that are always needed together."""

    weights: str
    """Digest of the part as a function."""
    layers: tuple[str, ...]
    pools: tuple[str, ...]


def wanted_layers(section: CodesSection) -> list[tuple[str, str]]:
    """Pair each layer with each pooling; the penultimate codes have one pooling, the network's own."""
    pairs = [(layer, pool) for layer in section.layer or [PENULTIMATE] for pool in section.pool]
    return list(dict.fromkeys((layer, "avg") if layer == PENULTIMATE else (layer, pool) for layer, pool in pairs))


def layer_name(pair: tuple[str, str]) -> str:
    """Name a layer and its pooling; `penultimate` has one pooling only."""
    layer, pool = pair
    return layer if layer == PENULTIMATE else f"{layer} {pool}"


def layer_parts(backbone: nn.Module, wanted: Sequence[tuple[str, str]]) -> list[Part]:
    """Make a part of each pair of layer and pooling, so that each is looked up on its own."""
    weights = function_digest(backbone)
    return [Part(weights, (layer_name(pair),), (pair[1],)) for pair in wanted]


def partition_parts(partition: Partition, backbone: nn.Module, precision: str) -> list[Part]:
    """Make one part of the values of a partition.

    Where the prefix is the whole backbone these are its penultimate codes, which a probe may have computed already. In
    half precision a probe's are cached in float32, so there the two differ.
    """
    plain = [value.name for value in partition.values]
    names = tuple(f"{name} ({at})" if name in plain[:at] else name for at, name in enumerate(plain))
    if names == (_WHOLE_BACKBONE,) and precision in ("fp32", "fp64"):
        return layer_parts(backbone, [(PENULTIMATE, "avg")])
    return [Part(partition.digest, names, ("as is",) * len(names))]
