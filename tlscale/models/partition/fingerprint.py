"""Fingerprints: what a part of a traced network computes, as one SHA-256.

Promise: equal fingerprints are equal functions of the images, bit for bit on the same device in the same memory order:
the calls and their constants, the code and settings of modules, all tensors that they use, the versions of torch and
timm. Neither the names of nodes nor what comes behind a node matter, so the same prefix under another head has the same
fingerprint. Hooks on modules do not count.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from typing import Any

import timm
import torch
from torch import Tensor, fx, nn

from tlscale.models.partition.self_check import TORCHS_OWN
from tlscale.models.partition.tracing import attribute_of, module_of
from tlscale.storage.files import text_sha256

_FORMAT = 1
# Digests do not follow our modules when they move: these names are those under which codes were first cached.
_FIRST_NAMES = {
    "tlscale.models.classic.networks": "tlscale.model.classic",
    "tlscale.models.classic.staged": "tlscale.model.staged",
}
# Settings that change nothing of what a frozen module computes, or that note where its weights came from.
_NO_MATTER = ("training", "grad_checkpointing", "pretrained_cfg", "default_cfg", "feature_info")
_PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.memory_format, slice, range)


class Fingerprints:
    """Fingerprints of nodes and modules of one network; each tensor is read once.

    Args:
        network: its frozen tensors must not change while this object is in use.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._modules: dict[int, str] = {}

    def of_nodes(self, nodes: Iterable[fx.Node]) -> dict[fx.Node, str]:
        """Compute fingerprints by node; `nodes` in the order of their graph, closed under their inputs."""
        found: dict[fx.Node, str] = {}
        for node in nodes:
            found[node] = _sha(node.op, self._target(node), _plain((node.args, node.kwargs), found))
        return found

    def of_all(self, prints: Iterable[str]) -> str:
        """Compute one fingerprint of a sequence of them, with the versions of the libraries."""
        # "frontier" is an older word for the partition; another word here would recompute all codes.
        return _sha(f"frontier {_FORMAT}", f"torch {torch.__version__}", f"timm {timm.__version__}", *prints)

    def _target(self, node: fx.Node) -> str:
        module = module_of(node, self._network)
        if module is not None:
            return self._module(module)
        if node.op == "get_attr":
            return _plain(attribute_of(node, self._network), {})
        if node.op == "placeholder":
            return "images"
        return node.target if isinstance(node.target, str) else digest_name(node.target)

    def _module(self, module: nn.Module) -> str:
        if id(module) not in self._modules:
            kind: Any = type(module)
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            kept = vars(module).items()
            settings = {key: value for key, value in kept if key not in TORCHS_OWN and key not in _NO_MATTER}
            self._modules[id(module)] = _sha(
                digest_name(kind),
                _source(kind),
                _plain(settings, {}),
                _plain(dict(own), {}),
                *(f"{name}={self._module(child)}" for name, child in module.named_children()),
            )
        return self._modules[id(module)]


def _plain(value: Any, prints: Mapping[fx.Node, str]) -> str:
    """Write a value as a text that differs where the value does, as far as it can matter to a result."""
    if isinstance(value, fx.Node):
        return f"<{prints[value]}>"
    if isinstance(value, Tensor):
        return _tensor(value)
    if isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_plain(value[key], prints)}" for key in sorted(value, key=str)) + "}"
    if isinstance(value, tuple | list):
        return "(" + ",".join(_plain(item, prints) for item in value) + ")"
    if isinstance(value, set | frozenset):
        return "{" + ",".join(sorted(_plain(item, prints) for item in value)) + "}"
    if isinstance(value, partial):
        return f"{digest_name(value.func)}{_plain((value.args, value.keywords), prints)}"
    return digest_name(value) if callable(value) else digest_name(type(value))


def _tensor(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().reshape(-1)
    digest = hashlib.sha256(data.view(torch.uint8).numpy().data).hexdigest()
    return f"{tensor.dtype}{tuple(tensor.shape)}{digest}"


def digest_name(value: Callable[..., Any] | object) -> str:
    """Return the name of a class or function in digests, the same wherever our modules have moved to."""
    owner = getattr(value, "__module__", None) or type(value).__module__
    return f"{_FIRST_NAMES.get(owner, owner)}.{getattr(value, '__qualname__', type(value).__qualname__)}"


@cache
def _source(kind: type[Any]) -> str:
    """Return the code of the class if it is available; that of torch and timm follows from their versions as well."""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""


def _sha(*parts: str) -> str:
    return text_sha256("\0".join(parts))
