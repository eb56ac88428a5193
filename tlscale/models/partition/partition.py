"""Partition a network: a frozen prefix, the same in every epoch, whose values are worth caching, and the rest of it.

Promise: for any network that can be traced, `suffix(*prefix(images))` is `network(images)`, in training (dropout,
stochastic depth, batch statistics) and in evaluation, with the same gradients; checked on the spot before it is
returned. Where that is not possible, `NoPartition` gives the reason. There is no code for any family of networks.

The story: trace, mark what depends on the image and on frozen things only, measure it, find the minimum cut (the
fewest bytes to cache), build prefix and suffix, check them against the whole.

Shape letters: B images.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tlscale.errors import kind_and_line
from tlscale.models.partition.fingerprint import Fingerprints
from tlscale.models.partition.min_cut import Analysis, analyse, goals, minimum_cut, output, with_inputs
from tlscale.models.partition.self_check import TORCHS_OWN, check_partition
from tlscale.models.partition.tracing import RECOMPUTED, NoPartition, Recomputed, module_of

__all__ = ["PartitionValue", "NoPartition", "Partition", "find_partition"]

_NUM_TRIED = 4  # images that a partition is checked with, and more than twice as many


@dataclass(frozen=True)
class PartitionValue:
    """One tensor that is cached of each image.

    Attributes:
        name: path of the module that gives it, or of the one around the operation that does.
        shape: without the batch dimension.
        dtype: as the prefix gives it without autocast.
        channels_last: its memory order is (H, W, C).
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool

    @property
    def num_bytes(self) -> int:
        """Bytes of one image."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.name} ({'x'.join(map(str, self.shape))} {str(self.dtype).removeprefix('torch.')})"


@dataclass(frozen=True)
class Partition:
    """A network as prefix and suffix, for images of one size.

    Attributes:
        prefix: images (B, C, H, W) to a tuple of tensors, one for each of `values`, B rows each. Its modules are the
            network's own in the mode that the network gives them; `train()` and `eval()` of it do nothing. Call it
            under `no_grad`, with the network in either mode: what it runs is the same in both.
        suffix: `forward(*codes)`: what the network gives, with the network's own parameters and modules. Its `train()`
            and `eval()` are the network's. It may overwrite the codes, as the network overwrites what is between
            its layers (ReLU in place): give it tensors that are not needed again. To move it to a device or type moves
            only its part of the network: move the network, then find the partition again.
        values: what the prefix gives.
        digest: SHA-256 of the prefix as a function: its calls, code, settings and tensors. It does not depend on the
            head or any other trained part.
        prefix_flops: of one image, forward.
        suffix_flops: of one image, forward.
    """

    prefix: nn.Module
    suffix: nn.Module
    values: tuple[PartitionValue, ...]
    digest: str
    prefix_flops: int
    suffix_flops: int

    @property
    def num_bytes(self) -> int:
        """Bytes of one image."""
        return sum(value.num_bytes for value in self.values)

    def describe(self) -> str:
        """Return one line for the screen."""
        share = self.prefix_flops / max(self.prefix_flops + self.suffix_flops, 1)
        cached = ", ".join(str(value) for value in self.values)
        return f"caches {cached}: {self.num_bytes / 1024:.1f} KiB an image; {share:.0%} of the forward pass runs once"


def find_partition(network: nn.Module, images: Tensor) -> Partition:
    """Find the partition of a network where its frozen part ends.

    Args:
        network: any module from images to tensors, frozen parameters without `requires_grad`. Its `train()` must leave
            frozen norm layers in eval mode, as the classifier's does, else nothing behind them is frozen. It is left as
            it was.
        images: (B, C, H, W), two or more, real or noise, of the size, type and device that will be used.

    Raises:
        NoPartition: it cannot be traced, nothing is frozen or worth caching, or prefix and suffix are not the whole.
    """
    assert len(images) >= 2, "what belongs to one image shows only with two"
    images = images[:_NUM_TRIED].detach()
    if all(param.requires_grad for param in network.parameters()):
        raise NoPartition("nothing is frozen")
    try:
        generators = torch.random.fork_rng(devices=range(torch.cuda.device_count()))
        with _left_as_found(network), torch.no_grad(), generators:
            partition = _partition(network, images)
    except NoPartition:
        raise
    except Exception as error:  # whatever a network does that we did not think of, it can be trained as a whole
        raise NoPartition(f"the network cannot be partitioned: {kind_and_line(error)}") from error
    partition.suffix.training = network.training
    return partition


def _partition(network: nn.Module, images: Tensor) -> Partition:
    in_eval, in_training = (analyse(network.train(mode), images) for mode in (False, True))
    ends = minimum_cut(in_training, network)
    prints = Fingerprints(network)
    marks = _marks(in_training, prints)
    again = {mark: node for node, mark in _marks(in_eval, prints).items()}
    if any(marks[node] not in again for node in ends):
        raise NoPartition("the frozen part computes other values in training than in evaluation")
    prefix = _Prefix(_copy_between(network, in_training, ends, None))
    suffix = _Suffix(
        network,
        _recompute_as_before(_copy_between(network, in_training, None, ends)),
        _recompute_as_before(_copy_between(network, in_eval, None, [again[marks[node]] for node in ends])),
    )
    check_partition(network, images, prefix, suffix)
    suffix.eval()
    return Partition(
        prefix=prefix,
        suffix=suffix,
        values=tuple(_value(node, code) for node, code in zip(ends, prefix(images.clone()), strict=True)),
        digest=prints.of_all(marks[node][0] for node in ends),
        prefix_flops=_flops(prefix, images.clone()),
        suffix_flops=_flops(suffix, *(code.clone() for code in prefix(images.clone()))),
    )


@contextlib.contextmanager
def _left_as_found(network: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in network.modules()}
    numbers = [
        (module, name, value)
        for module in network.modules()
        for name, value in vars(module).items()
        if name not in TORCHS_OWN and isinstance(value, int | float | str)
    ]
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    names = set(vars(network))
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for module, mode in modes.items():
            module.training = mode
        for module, name, value in numbers:  # counters
            vars(module)[name] = value
        for name in set(vars(network)) - names:  # constants that the tracer hung there
            delattr(network, name)


# -- build --------------------------------------------------------------------------------------------------------


class _Prefix(nn.Module):
    """The frozen part. Its mode is the network's to set."""

    def __init__(self, run: fx.GraphModule) -> None:
        super().__init__()
        self.run = run

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, ...]:
        return cast("tuple[Tensor, ...]", self.run(images_BCHW))

    def train(self, mode: bool = True) -> _Prefix:
        return self


class _Suffix(nn.Module):
    """The trained part, as traced in each mode.

    Attributes:
        unreached: what the network trains and does not use, so that the optimiser and DDP see what they would see.
    """

    def __init__(self, network: nn.Module, in_training: fx.GraphModule, in_eval: fx.GraphModule) -> None:
        super().__init__()
        self.in_training = in_training
        self.in_eval = in_eval
        reached = {id(param) for param in self.parameters()}
        rest = [param for param in network.parameters() if param.requires_grad and id(param) not in reached]
        self.unreached = nn.ParameterList(rest)
        self._network = (network,)  # in a tuple, so that it is no child and its frozen part is not in the state
        self.training = network.training

    def forward(self, *codes: Tensor) -> Any:
        return self.in_training(*codes) if self._network[0].training else self.in_eval(*codes)

    def train(self, mode: bool = True) -> _Suffix:
        self._network[0].train(mode)
        self.training = mode
        return self


def _marks(analysis: Analysis, prints: Fingerprints) -> dict[fx.Node, tuple[str, int]]:
    """Mark steady nodes so that another trace knows them again: what each computes, and how many did so before it."""
    by_node = prints.of_nodes(node for node in analysis.graph.nodes if node in analysis.steady)
    seen: Counter[str] = Counter()
    marks = {}
    for node, found in by_node.items():
        marks[node] = found, seen[found]
        seen[found] += 1
    return marks


def _copy_between(
    network: nn.Module, analysis: Analysis, ends: Sequence[fx.Node] | None, begins: Sequence[fx.Node] | None
) -> fx.GraphModule:
    """Copy the part of the graph up to `ends` (or the output), from `begins` (or the images) on, as a module."""
    graph = fx.Graph()
    codes = {node: graph.placeholder(f"code_{number}") for number, node in enumerate(begins or ())}
    known = {} if begins is None else {node: info for node, info in analysis.info.items() if info.is_known}
    made: dict[fx.Node, Any] = dict(codes)
    wanted = goals(analysis, network) if ends is None else ends
    for node in with_inputs(wanted, stop=[*codes, *known]):
        if node in known:
            made[node] = known[node].plain
            if known[node].counts_images:
                num_images = graph.call_method("size", (next(iter(codes.values())), 0))
                made[node] = graph.call_function(operator.mul, (num_images, known[node].plain))
        elif node.op == "placeholder" and node not in made and begins is not None:
            raise NoPartition("the trained part uses the image itself in evaluation")
        elif node not in made and node.op != "output":
            made[node] = graph.node_copy(node, made.__getitem__)
    result = output(analysis.graph).args[0] if ends is None else tuple(ends)
    graph.output(fx.map_arg(result, made.__getitem__))
    graph.lint()
    return fx.GraphModule(network, graph)


def _recompute_as_before(part: fx.GraphModule) -> fx.GraphModule:
    """Let trained modules that the network called under gradient checkpointing be recomputed here, too."""
    for number, node in enumerate(part.graph.nodes):
        module = module_of(node, part)
        if module is not None and node.meta.get(RECOMPUTED) and any(p.requires_grad for p in module.parameters()):
            part.add_module(f"recomputed_{number}", Recomputed(module))
            node.target = f"recomputed_{number}"
    part.recompile()
    return part


# -- describe -------------------------------------------------------------------------------------------------------


def _value(node: fx.Node, code: Tensor) -> PartitionValue:
    around = [path for path, _ in node.meta.get("nn_module_stack", {}).values() if path]
    name = str(node.target) if node.op == "call_module" else ".".join([*around[-1:], node.name])
    is_last = code.ndim == 4 and not code.is_contiguous() and code.is_contiguous(memory_format=torch.channels_last)
    return PartitionValue(name, tuple(code.shape[1:]), code.dtype, is_last)


class _FlopCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts by torch's own formulas, without its counter's hooks on modules, which break some networks."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        self.total += int(formula(*args, **(kwargs or {}), out_val=result)) if formula is not None else 0
        return result


def _flops(module: nn.Module, *inputs: Tensor) -> int:
    with _FlopCounter() as counter:
        module(*inputs)
    return int(counter.total) // len(inputs[0])
