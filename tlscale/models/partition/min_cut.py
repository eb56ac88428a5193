"""Find the cheapest values to cache of the frozen part of a traced network.

Promise: `minimum_cut` returns the tensors of fewest bytes an image, one row an image each, from which light operations
compute all that the trained part reads: a minimum vertex cut, found as a maximum flow (Ford and Fulkerson 1956), each
value split into an arc whose capacity is its size. Sizes are measured, and no model is asked for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import networkx
import torch
from torch import Tensor, fx, nn

from tlscale.models.partition.tracing import NoPartition, call_name, is_heavy, is_steady, overwritten, trace

# -- mark and measure ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NodeInfo:
    """What a value is, found by running.

    Attributes:
        is_tensor: else it is a number, a size, a name or a tuple of these.
        num_bytes: of one image; None for what is not one row an image.
        is_known: it is the same for all images, or counts them: `plain` or `plain` times B.
    """

    is_tensor: bool = False
    num_bytes: int | None = None
    is_known: bool = False
    counts_images: bool = False
    plain: Any = None


@dataclass(frozen=True)
class Analysis:
    """A traced graph; the nodes that need to run but once an image, with what they give."""

    graph: fx.Graph
    steady: set[fx.Node]
    info: dict[fx.Node, NodeInfo]


def analyse(network: nn.Module, images_BCHW: Tensor) -> Analysis:
    """Trace the network in the mode that it is in, mark what is frozen of it, and measure that."""
    graph = trace(network)
    info = _measure(graph, mark(graph, network), network, images_BCHW)
    _read_results(graph, info, network)
    return Analysis(graph, mark(graph, network), info)


def mark(graph: fx.Graph, network: nn.Module) -> set[fx.Node]:
    """Mark the nodes that depend on the images, constants and what is frozen, and on nothing else."""
    steady: set[fx.Node] = set()
    for node in graph.nodes:
        onto = overwritten(node, network)
        keeps_state = onto is not None and onto.op == "get_attr"
        if is_steady(node, network) and not keeps_state and steady.issuperset(node.all_input_nodes):
            steady.add(node)
    return steady


class _SteadyRun(fx.Interpreter):
    """Runs the marked nodes alone and remembers what they gave, without keeping it."""

    def __init__(self, network: nn.Module, graph: fx.Graph, steady: set[fx.Node]) -> None:
        super().__init__(network, graph=graph)
        self.steady = steady
        self.seen: dict[fx.Node, Any] = {}

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return _thawed(args), _thawed(kwargs)

    def run_node(self, n: fx.Node) -> Any:
        if n not in self.steady:
            return None
        value = super().run_node(n)
        self.seen[n] = value.to("meta") if isinstance(value, Tensor) else value
        return value


def _thawed(value: Any) -> Any:
    """Replace the graph's own lists by plain ones, which some modules write to."""
    if isinstance(value, list):
        return [_thawed(item) for item in value]
    if type(value) is tuple:
        return tuple(_thawed(item) for item in value)
    return {key: _thawed(item) for key, item in value.items()} if isinstance(value, dict) else value


def _measure(graph: fx.Graph, steady: set[fx.Node], network: nn.Module, images: Tensor) -> dict[fx.Node, NodeInfo]:
    """Run the marked nodes with two numbers of images, neither of which a layer is likely to have as its width."""
    runs = []
    for batch in (images[:2], torch.cat([images[:2], images[1:2].flip(-1)])):
        run = _SteadyRun(network, graph, steady)
        run.run(batch.clone())
        runs.append(run.seen)
    return {node: _compare(node, runs[0][node], runs[1][node]) for node in steady}


def _compare(node: fx.Node, two: Any, three: Any) -> NodeInfo:
    """Find what a value is, from what it was for two and for three images."""
    if isinstance(two, Tensor) and isinstance(three, Tensor):
        row_each = two.ndim > 0 and two.shape[0] == 2 and three.shape[0] == 3 and two.shape[1:] == three.shape[1:]
        return NodeInfo(is_tensor=True, num_bytes=two[0].numel() * two.element_size() if row_each else None)
    if call_name(node) in ("item", "tolist") or not _is_plain(two):
        return NodeInfo()
    if two == three:
        return NodeInfo(is_known=True, plain=tuple(two) if isinstance(two, tuple) else two)
    if isinstance(two, int) and isinstance(three, int) and two * 3 == three * 2:
        return NodeInfo(is_known=True, counts_images=True, plain=two // 2)
    return NodeInfo()


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, int | str | bool | float)


def _read_results(graph: fx.Graph, info: dict[fx.Node, NodeInfo], network: nn.Module) -> None:
    """Let what comes behind an operation in place read its result, not the tensor that it overwrote."""
    order = {node: number for number, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        onto = overwritten(node, network)
        if onto is not None and onto in info and info[onto].is_tensor:  # for numbers, += makes a new one

            def is_behind(user: fx.Node, number: int = order[node]) -> bool:
                return order[user] > number

            onto.replace_all_uses_with(node, delete_user_cb=is_behind)


# -- minimum cut ------------------------------------------------------------------------------------------------------


def minimum_cut(analysis: Analysis, network: nn.Module) -> list[fx.Node]:
    """Find the values to cache, in the order of the graph; `NoPartition` where nothing is worth it."""
    # What the suffix has without any code: constants, sizes, and what comes of these alone.
    free: set[fx.Node] = set()
    for node in analysis.graph.nodes:
        if node not in analysis.steady or node.op == "placeholder":
            continue
        if analysis.info[node].is_known or free.issuperset(node.all_input_nodes):
            free.add(node)
    nodes = [node for node in analysis.graph.nodes if node in analysis.steady and node not in free]
    flow = _flow_network(nodes, analysis, network)
    try:
        _, (source_side, _) = networkx.minimum_cut(flow, "source", "sink")
    except networkx.NetworkXUnbounded:
        raise NoPartition(
            "what the trained part reads is not one row an image, or is overwritten in the frozen part"
        ) from None
    ends = [node for node in nodes if (node, "in") in source_side and (node, "out") not in source_side]
    saved = [node for node in with_inputs(ends) if node not in free and is_heavy(node, network)]
    if not saved:
        raise NoPartition("nothing that is frozen and costs time is between the image and the trained part")
    return ends


def _flow_network(nodes: Sequence[fx.Node], analysis: Analysis, network: nn.Module) -> networkx.DiGraph:
    """Build the flow network: arcs without a capacity hold heavy nodes at the images, trained ones at the output."""
    flow = networkx.DiGraph()
    flow.add_nodes_from(("source", "sink"))
    inner = set(nodes)
    spoilt = {overwritten(node, network) for node in nodes}
    needed = set(with_inputs(goals(analysis, network)))
    scale = (len(nodes) + 1) ** 2
    for number, node in enumerate(nodes):
        size = analysis.info[node].num_bytes
        # Of equal sizes the later: then less is left to do again in each step.
        capacity = {} if size is None or node in spoilt else {"capacity": size * scale + len(nodes) - number}
        flow.add_edge((node, "in"), (node, "out"), **capacity)
        if node.op == "placeholder" or is_heavy(node, network):
            flow.add_edge("source", (node, "in"))
        for user in node.users:
            if user not in analysis.steady and user in needed:
                flow.add_edge((node, "out"), "sink")
            elif user in inner:
                flow.add_edge((node, "out"), (user, "in"))
    return flow


def with_inputs(nodes: Iterable[fx.Node], stop: Iterable[fx.Node] = ()) -> list[fx.Node]:
    """Return the nodes and all that they are computed from, in the order of the graph; not beyond `stop`."""
    ends = set(stop)
    found: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += [] if node in ends else node.all_input_nodes
    every = next(iter(found)).graph.nodes if found else ()
    return [node for node in every if node in found]


def output(graph: fx.Graph) -> fx.Node:
    """Return the node that returns the result."""
    last: fx.Node = next(iter(reversed(graph.nodes)))
    return last


def goals(analysis: Analysis, network: nn.Module) -> list[fx.Node]:
    """Return the output, and the suffix's operations in place, which count even where nothing uses what they return."""
    in_place = [node for node in analysis.graph.nodes if node not in analysis.steady and overwritten(node, network)]
    return [output(analysis.graph), *in_place]
