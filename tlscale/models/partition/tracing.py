"""Trace a network to a graph of calls, and find out of each call what is known without running it.

Promise: tracing leaves the network as it was but for constants, which `find_partition` removes when it is done; what
would be traced into something else than the network computes is refused (`NoPartition`), never guessed.

A module of which everything is frozen, or everything is trained, is one node of the graph: its own code runs, in its
own mode, with its hooks. Only modules that are frozen in part are traced through, as prefix and suffix part there.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
import random
import re
from collections.abc import Callable, Iterator
from functools import cache, partial
from types import CodeType
from typing import Any

import torch
import torch.utils.checkpoint
from timm.models import get_notrace_functions, get_notrace_modules
from torch import fx, nn

from tlscale.errors import kind_and_line

RECOMPUTED = "recomputed"  # in the meta of a node: it was called under gradient checkpointing

# What timm lists as not traceable: functions, and kinds of modules.
_OPAQUE_FUNCTIONS: tuple[Callable[..., Any], ...] = tuple(get_notrace_functions())  # type: ignore[no-untyped-call]
_OPAQUE_MODULES: tuple[type[nn.Module], ...] = tuple(get_notrace_modules())  # type: ignore[no-untyped-call]

_HEAVY = re.compile(r"conv.*|linear|bilinear|_*i?matmul_*|b?mm|.*addb?mm.*|einsum|tensordot|.*attention.*|.*fft.*")
_RANDOM = re.compile(
    r"rand.*|.*bernoulli.*|.*dropout.*|drop_(path|block).*|normal_?|multinomial|poisson|.*(rrelu|gumbel|fractional).*"
    r"|(uniform|exponential|geometric|cauchy|log_normal)_"
)
_IN_PLACE_OPERATORS = (
    *("iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv"),
    *("imod", "ipow", "iand", "ior", "ixor"),
)


class NoPartition(Exception):  # noqa: N818 (nothing has failed: the whole network is trained as ever)
    """The network is not partitioned.

    Attributes:
        reason: one sentence for the user.
        kind: of the reason, where somebody needs to tell it from others.
    """

    def __init__(self, reason: str, kind: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.kind = kind


class _Proxy(fx.Proxy):
    """Stands for a value while tracing. Its `+=` stays one, which torch's own would turn into `+`: another type under
    autocast, and other memory."""


def _record_operator(name: str) -> None:
    def record(self: _Proxy, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    setattr(_Proxy, f"__{name}__", record)


for _name in _IN_PLACE_OPERATORS:
    _record_operator(_name)


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        super().__init__(autowrap_functions=_OPAQUE_FUNCTIONS, param_shapes_constant=True)
        self.in_checkpoint = False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if _is_whole(m, keep_sequence=self.in_checkpoint):
            return True
        _refuse_hooks(m, module_qualified_name)
        return False

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        """Look buffers up in each call, as parameters are; else what comes of them would stay as it is today."""
        if isinstance(attr_val, torch.Tensor) and not isinstance(attr_val, nn.Parameter):
            for name, buffer in self.root.named_buffers():
                if buffer is attr_val:
                    if name not in parameter_proxy_cache:
                        parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
                    return parameter_proxy_cache[name]
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(*args, **kwargs)
        node.meta[RECOMPUTED] = self.in_checkpoint
        return node


def _is_whole(module: nn.Module, *, keep_sequence: bool) -> bool:
    """Return whether a call of the module is one node."""
    is_known = isinstance(module, _OPAQUE_MODULES) or fx.Tracer().is_leaf_module(module, "")
    if is_known or not any(module.children()):
        return True
    trained = {param.requires_grad for param in module.parameters()}
    if trained == {True} and not keep_sequence:
        # A trained sequence may begin with pooling, behind which there is less to cache.
        return type(module).forward is not nn.Sequential.forward or _has_hooks(module)
    return len(trained) == 1


def _has_hooks(module: nn.Module) -> bool:
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def _refuse_hooks(module: nn.Module, name: str) -> None:
    if _has_hooks(module):
        raise NoPartition(f"'{name or type(module).__name__}', which is frozen in part, has hooks that would not run")


def trace(network: nn.Module) -> fx.Graph:
    """Trace the calls of the network in the mode that it is in.

    Raises:
        NoPartition: its code decides by the values of tensors, or draws random numbers of its own.
    """
    _refuse_hooks(network, "")
    tracer = _Tracer()
    before = torch.get_rng_state(), random.getstate()
    try:
        with _checkpoints_noted(tracer):
            graph = tracer.trace(network)
    except NoPartition:
        raise
    except Exception as error:  # every network breaks a tracer in its own way
        raise NoPartition(f"the network cannot be traced: {kind_and_line(error)}") from error
    if random.getstate() != before[1] or not torch.equal(torch.get_rng_state(), before[0]):
        raise NoPartition("the network draws random numbers outside of tensor operations, which a trace would fix")
    if [node.op for node in graph.nodes].count("placeholder") != 1:
        raise NoPartition(f"{type(network).__name__} takes more than images")
    # Checks of shapes hold for all images of a size, and tie the graph to values that nobody needs.
    for node in reversed(graph.nodes):
        if node.op == "call_function" and call_name(node) in ("_assert", "_assert_async"):
            graph.erase_node(node)
    return graph


@contextlib.contextmanager
def _checkpoints_noted(tracer: _Tracer) -> Iterator[None]:
    """Trace through gradient checkpointing as if it were off, and mark what is in it."""

    def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        outer, tracer.in_checkpoint = tracer.in_checkpoint, True
        try:
            names = ("use_reentrant", "preserve_rng_state", "determinism_check", "context_fn", "debug", "early_stop")
            return function(*args, **{key: value for key, value in kwargs.items() if key not in names})
        finally:
            tracer.in_checkpoint = outer

    original = torch.utils.checkpoint.checkpoint
    torch.utils.checkpoint.checkpoint = run  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.utils.checkpoint.checkpoint = original


# -- what a node does ---------------------------------------------------------------------------------------------


def call_name(node: fx.Node) -> str:
    """Return the name of the function or method without its module."""
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", node.target))


def module_of(node: fx.Node, network: nn.Module) -> nn.Module | None:
    return network.get_submodule(str(node.target)) if node.op == "call_module" else None


def attribute_of(node: fx.Node, network: nn.Module) -> Any:
    """Return what a `get_attr` node reads."""
    owner, _, name = str(node.target).rpartition(".")
    return getattr(network.get_submodule(owner), name)


def is_steady(node: fx.Node, network: nn.Module) -> bool:
    """Return whether equal inputs give equal results in every step: nothing trained or random, no moving buffer."""
    module = module_of(node, network)
    if module is not None:
        is_trained = any(param.requires_grad for param in module.parameters())
        return not is_trained and not any(_changes_with_time(part) for part in module.modules())
    if node.op == "get_attr":
        value = attribute_of(node, network)
        return not (isinstance(value, torch.Tensor) and value.requires_grad)
    return node.op == "placeholder" or (node.op in ("call_function", "call_method") and not _is_random(node))


def _changes_with_time(part: nn.Module) -> bool:
    kind: Any = type(part)
    rates = [getattr(part, name) for name in ("p", "prob", "drop_prob") if hasattr(part, name)]
    is_switched_off = "Drop" in kind.__name__ and bool(rates) and not any(rates)
    in_training = part.training and not is_switched_off and reads_training(kind)
    return in_training or "Fractional" in kind.__name__


@cache
def reads_training(kind: type[Any]) -> bool:
    """Return whether the code of the class reads `training`; where it does not, both modes are one."""
    own = (base for base in kind.__mro__ if base not in (nn.Module, object))
    functions = (
        inspect.unwrap(value)
        for base in own
        for name, value in vars(base).items()
        if inspect.isfunction(value) and name not in ("__init__", "train", "eval")
    )
    if issubclass(kind, torch.jit.ScriptModule):
        return True  # its code cannot be read
    return any("training" in names for function in functions for names in _names(function.__code__))


def _names(code: CodeType) -> Iterator[tuple[str, ...]]:
    yield code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _is_random(node: fx.Node) -> bool:
    arguments = arguments_of(node)
    name = call_name(node)
    if name == "scaled_dot_product_attention":
        return arguments.get("dropout_p", node.args[4] if len(node.args) > 4 else 0.0) != 0.0
    training = arguments.get("training", arguments.get("train", arguments.get("use_input_stats")))
    if _RANDOM.fullmatch(name):
        return training is not False
    return training is not None and training is not False  # batch statistics


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """Return arguments by name, with defaults, as far as the function has a signature."""
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):  # a method, or a function written in C
        return dict(node.kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def is_heavy(node: fx.Node, network: nn.Module) -> bool:
    """Return whether a node costs more than one pass over its input: anything with a matrix or filters in it."""
    module = module_of(node, network)
    if module is not None:
        return any(param.ndim >= 2 for param in module.parameters())
    return node.op in ("call_function", "call_method") and _HEAVY.fullmatch(call_name(node)) is not None


def overwritten(node: fx.Node, network: nn.Module) -> fx.Node | None:
    """Return the input that the node writes its result to, if it works in place."""
    module, name = module_of(node, network), call_name(node)
    if module is not None:
        in_place = getattr(module, "inplace", False) is True
    elif node.op == "call_method":
        in_place = name.endswith("_") and not name.endswith("__")
    elif node.op == "call_function":
        is_operator = getattr(node.target, "__module__", "") == "_operator"
        in_place = (is_operator and name in _IN_PLACE_OPERATORS) or (
            not is_operator and (name.endswith("_") or arguments_of(node).get("inplace") is True)
        )
    else:
        in_place = False
    first = node.args[0] if node.args else node.kwargs.get("input")
    return first if in_place and isinstance(first, fx.Node) else None


# -- gradient checkpointing ---------------------------------------------------------------------------------------


class Recomputed(nn.Module):
    """A module that runs again in the backward pass instead of keeping what is inside."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.module(*args, **kwargs)
        return torch.utils.checkpoint.checkpoint(partial(self.module, **kwargs), *args, use_reentrant=False)
