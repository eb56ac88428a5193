"""Check that prefix and suffix of a network are the network: all three are run side by side before they are used.

Promise: what `check_partition` lets pass gave, on batches of two sizes and in both modes, the very numbers of the whole
network; its prefix is a function of each image alone, and the network is the same from call to call. What shows only
after many calls, or in batches of a size that was not tried, is found where a module keeps a number, a text or a buffer
for it.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tlscale.distributed.host import device_for
from tlscale.models.partition.tracing import NoPartition

_CHECK_SEED = 20_240

# Reasons for which networks were partitioned wrongly once; `corrections` finds them in run folders by these words.
OF_BATCH_SIZE = "what the frozen part gives for an image depends on the size of the batch"
OF_CALLS = "the network is not the same from call to call"

TORCHS_OWN = frozenset(vars(nn.Module()))
"""Attributes that every module has."""


def check_partition(network: nn.Module, images: Tensor, prefix: nn.Module, suffix: nn.Module) -> None:
    """Run prefix, suffix and the whole side by side, on batches of two sizes.

    Raises:
        NoPartition: they differ, or the prefix is no function of each image alone, or the network is not the same when
            it is called again.
    """
    # A size that is no multiple, and larger: rounded up or cut off, a batch size may look like a constant.
    more = torch.cat([images, 1 - images, 2 * images[:1]])
    _check_rows(images, more, prefix)
    for mode, name in ((False, "evaluation"), (True, "training")):
        suffix.train(mode)
        _check_calls(network, images)
        for batch in (images, more):
            _check_one(network, batch, prefix, suffix, name)


def _check_one(network: nn.Module, images: Tensor, prefix: nn.Module, suffix: nn.Module, mode: str) -> None:
    before = [buffer.clone() for buffer in suffix.buffers()]
    whole = _seeded(network, images.clone()), [buffer.clone() for buffer in suffix.buffers()]
    for buffer, value in zip(suffix.buffers(), before, strict=True):
        buffer.copy_(value)
    found = _seeded(suffix, *(code.clone() for code in prefix(images.clone()))), list(suffix.buffers())
    exact = images.device.type == "cpu"
    if not all(_agree(one, other, exact=exact) for one, other in zip(whole, found, strict=True)):
        raise NoPartition(f"prefix and suffix do not give what the whole network gives in {mode}")


def _check_calls(network: nn.Module, images: Tensor) -> None:
    """Check that the network, called twice, gives the same, and keeps nothing of the calls but in buffers."""
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    once = _seeded(network, images.clone())
    first = _plain_state(network)
    for buffer, value in buffers:
        buffer.copy_(value)
    again = _seeded(network, images.clone())
    now = _plain_state(network)
    changed = next((name for name in now if first.get(name) != now[name]), None)
    if changed is not None:
        raise NoPartition(f"{OF_CALLS}: it changes its '{changed}'", OF_CALLS)
    if not _agree(once, again, exact=images.device.type == "cpu"):
        raise NoPartition(f"{OF_CALLS}: it gives other values for the same images", OF_CALLS)


def _check_rows(images: Tensor, more: Tensor, prefix: nn.Module) -> None:
    """Check that codes depend on no random number or earlier call, and on no other image of the batch."""
    buffers = [buffer.clone() for buffer in prefix.buffers()]
    codes = _seeded(prefix, images.clone())
    if not all(torch.equal(*pair) for pair in zip(prefix.buffers(), buffers, strict=True)):
        raise NoPartition(f"{OF_CALLS}: its frozen part changes a buffer", OF_CALLS)
    if not _agree(codes, _seeded(prefix, images.clone(), seed=_CHECK_SEED + 1), exact=True):
        raise NoPartition("the frozen part gives other values for the same images")
    among_others = torch.cat([1 - images[:1], images[1:]]).flip(0)
    moved = [code.flip(0)[1:] for code in _seeded(prefix, among_others)]
    if not _agree([code[1:] for code in codes], moved, exact=False):
        raise NoPartition("what the frozen part gives for an image depends on the other images of the batch")
    if not _agree(codes, [code[: len(images)] for code in _seeded(prefix, more.clone())], exact=False):
        raise NoPartition(OF_BATCH_SIZE, OF_BATCH_SIZE)


def _seeded(module: nn.Module, *inputs: Tensor, seed: int = _CHECK_SEED) -> list[Tensor]:
    torch.manual_seed(seed)
    device_for(inputs[0].device).seed(seed)
    return _tensors(module(*inputs))


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, tuple | list):
        return [tensor for item in output for tensor in _tensors(item)]
    return [output] if isinstance(output, Tensor) else []


def _agree(ones: Sequence[Tensor], others: Sequence[Tensor], *, exact: bool) -> bool:
    pairs = list(zip(ones, others, strict=True))
    if any(one.shape != other.shape or one.dtype != other.dtype for one, other in pairs):
        return False
    if exact or not all(one.is_floating_point() for one, _ in pairs):
        return all(torch.equal(one.nan_to_num(), other.nan_to_num()) for one, other in pairs)
    return all(_is_near(one, other) for one, other in pairs)


def _is_near(one: Tensor, other: Tensor) -> bool:
    """Allow for another order of summation; on an accelerator also for products in reduced precision (TF32)."""
    kind = torch.finfo(one.dtype)
    difference = float((one - other).abs().max() / one.abs().max().clamp(min=kind.tiny))
    return difference <= max(1e-5 if one.device.type == "cpu" else 5e-3, 8 * kind.eps)


def _plain_state(network: nn.Module) -> dict[str, str]:
    """Return, as text by name, values that the modules keep besides tensors and settings of torch's own."""
    return {
        f"{path}.{name}".lstrip("."): repr(value)
        for path, module in network.named_modules()
        for name, value in vars(module).items()
        if name not in TORCHS_OWN and _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list | set | dict | deque):
        return all(map(_is_plain, value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, int | float | str | itertools.count)
