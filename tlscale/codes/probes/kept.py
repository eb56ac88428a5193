"""Keep what is fitted to each set of codes, so that a probe that was stopped fits none of them again.

Promise: what is found is of the very same numbers: codes, labels, kind and values. Strengths of one set are solved side
by side, or each from the one before, so a set that is not finished is fitted again; nearest neighbours, which
have nothing to solve, are not kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tlscale.codes.probes.select import FittedProbe, PathRow
from tlscale.storage.files import replacing

_RULES = 2  # raise it when a fit of the same numbers comes to end in another classifier
_BLOCK = 65536  # images that are hashed at once
_HEADS = ("head", "before_refit")


class KeptFits:
    """Hold one file for each set of codes that is finished.

    Keys are over all numbers, by `key`.

    Args:
        folder: where; made when it is needed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def key(
        self, kind: str, values: Sequence[float], refit: bool, arrays: Sequence[Tensor], more: Sequence[Any] = ()
    ) -> str:
        """Return what identifies a fit: 64 hex digits over its numbers, and over what is `more` than the usual."""
        return _sha256(json.dumps([_RULES, kind, list(values), refit, *more]), arrays)

    def find(self, digest: str) -> tuple[tuple[PathRow, ...], FittedProbe | None] | None:
        """Return the rows of a set, and the classifier if it was the best by then; None where it is not finished."""
        try:
            with safe_open(self._folder / f"{digest}.safetensors", "pt") as file:
                text, written = file.metadata()["probe"], file.metadata()["sha256"]
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
        except (OSError, SafetensorError, KeyError, TypeError):
            return None
        if written != _seal(text, tensors):
            return None
        about = json.loads(text)
        rows = tuple(PathRow(**row) for row in about["rows"])
        if about["probe"] is None:
            return rows, None
        heads = [_layer(tensors[f"{name}.weight"], tensors[f"{name}.bias"]) for name in _HEADS]
        facts = {**about["probe"], "chosen": PathRow(**about["probe"]["chosen"]), "path": rows}
        probe = FittedProbe(**facts, head=heads[0], before_refit=heads[1])
        return rows, probe if about["refitted"] else replace(probe, before_refit=heads[0])

    def keep(self, digest: str, rows: Sequence[PathRow], probe: FittedProbe | None) -> None:
        """Keep a set that is finished; only layers of linear classifiers are small enough."""
        tensors: dict[str, Tensor] = {}
        about: dict[str, Any] = {"rows": [asdict(row) for row in rows], "probe": None, "refitted": False}
        if probe is not None:
            heads = {name: getattr(probe, name) for name in _HEADS}
            if not all(isinstance(head, nn.Linear) for head in heads.values()):
                return
            facts = {key: getattr(probe, key) for key in ("kind", "num_images", "converged")}
            about["probe"] = {**facts, "chosen": asdict(probe.chosen)}
            about["refitted"] = probe.refitted
            tensors = {
                f"{name}.{part}": getattr(head, part).detach().cpu().contiguous().clone()
                for name, head in heads.items()
                for part in ("weight", "bias")
            }
        text = json.dumps(about)
        with suppress(OSError, SafetensorError):  # it only saves time
            self._folder.mkdir(parents=True, exist_ok=True)
            with replacing(self._folder / f"{digest}.safetensors") as aside:
                save_file(tensors, aside, {"probe": text, "sha256": _seal(text, tensors)})


def _seal(text: str, tensors: dict[str, Tensor]) -> str:
    names = sorted(tensors)
    return _sha256(json.dumps([text, names]), [tensors[name] for name in names])


def _sha256(text: str, arrays: Iterable[Tensor]) -> str:
    total = hashlib.sha256(text.encode())
    for array in arrays:
        total.update(f"{array.dtype} {tuple(array.shape)} ".encode())
        for block in torch.split(array.detach(), _BLOCK):
            total.update(block.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def _layer(weight_CD: Tensor, bias_C: Tensor) -> nn.Linear:
    layer = nn.Linear(weight_CD.shape[1], weight_CD.shape[0])
    layer.load_state_dict({"weight": weight_CD, "bias": bias_C})
    return layer.eval()
