"""Check files of models that others made, before a library reads them.

Promise: a pickle is not read where it would unpack to more than it is, and the arguments in the `config.json` of a
model folder reach timm only where they are plain values of names that describe a network.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import re
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from tlscale.errors import ModelError, RunFolderError, Wording

# Of the arguments that timm's functions take, those that do not describe a network: places, what to load and how, and
# what has it wrap or change what it builds.
_LOADING = frozenset(
    (
        *("args", "kwargs", "self", "model_name", "variant", "model_cls", "model_cfg", "cache_dir", "checkpoint_path"),
        *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args", "pretrained_strict"),
        *("pretrained_filter_fn", "pretrained_custom_load", "kwargs_filter", "features_only", "feature_cfg"),
        *("out_indices", "feature_cls", "scriptable", "exportable", "no_jit", "device", "dtype", "state_dict", "url"),
        *("fn",),
    )
)
_COMMON = frozenset(("num_classes", "in_chans", "global_pool", "drop_rate", "drop_path_rate", "img_size"))
_WORD = re.compile(r"[A-Za-z0-9_.+-]{0,64}")
_MOST = {"num_classes": 10_000_000, "img_size": 4096, "depth": 1000, "depths": 1000, "layers": 1000}
_MOST_NUMBER = 65_536
_MOST_ITEMS = 64
_FOR_OTHERS = (("model.onnx", "an ONNX file", "ONNX Runtime"), ("model.pt2", "a program of torch.export", "torch"))
_FINISH = Wording("(tlscale run ... --resume)", "(tlscale.run(..., resume=True))")
_PICKLES = (".pth", ".pt", ".bin", ".tar")


def is_pickle(path: Path) -> bool:
    """Return whether a file of weights is one that torch unpickles."""
    return path.suffix in _PICKLES


def check_unpacked_size(path: Path) -> None:
    """Check that a pickle of torch holds no more bytes than it takes on the disk; torch packs nothing.

    Raises:
        ModelError: a zip archive with compressed or overlapping parts, or a damaged one.
    """
    with path.open("rb") as file:
        if file.read(2) != b"PK":  # the older format, which is checked against its length as it is read
            return
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ModelError(f"'{path}' cannot be read: a damaged archive: {error}", remedy="Fetch it anew") from error
    packed = any(part.compress_type != zipfile.ZIP_STORED for part in parts)
    unpacked, size = sum(part.file_size for part in parts), path.stat().st_size
    if packed or unpacked > size:
        raise ModelError(
            f"'{path}' is {'compressed' if packed else 'made of overlapping parts'}: {size:,} bytes would unpack to "
            f"{unpacked:,}, and torch packs nothing. It is not read",
            remedy="If you know where it is from, unpack it and save it again with torch.save or as safetensors",
        )


def check_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Check that each tensor has its numbers in the file, and is no view that repeats a few of them.

    Raises:
        ModelError: sparse, without data, or larger than what is stored of it.
    """
    for name, tensor in tensors.items():
        dense = tensor.layout is torch.strided and not tensor.is_meta
        if not dense or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ModelError(
                f"'{path}' has the tensor '{name}' of shape {tuple(tensor.shape)} "
                f"{'with fewer numbers than that' if dense else 'without numbers of its own'}. It is not read"
            )


def check_model_folder(folder: Path) -> None:
    """Check what timm would build from a folder: the arguments in its `config.json`.

    Raises:
        ModelError: an argument that does not describe a network.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        return  # which timm reports
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"'{folder / 'config.json'}' cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"'{folder / 'config.json'}' holds no settings of a model")
    check_model_args(config.get("architecture"), config.get("model_args", {}), str(folder / "config.json"))


# As timm prefers them, but safetensors first.
_IN_FOLDERS = (
    *("model.safetensors", "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "*.safetensors"),
    *("pytorch_model.bin", "pytorch_model.pth", "model.pth", "open_clip_pytorch_model.bin", "*.pth", "*.pt", "*.bin"),
)


def weights_in(folder: Path) -> Path:
    """Find the file of weights of a model's folder; a pickle only where there are no safetensors.

    Raises:
        ModelError: there is none.
    """
    found = (path for pattern in _IN_FOLDERS for path in sorted(folder.glob(pattern)) if path.is_file())
    path = next(found, None)
    if path is None:
        raise ModelError(f"'{folder}' holds no weights: neither model.safetensors nor another file of that kind")
    return path


def _arguments_of(architecture: str) -> frozenset[str]:
    """Return the arguments that describe a network: of the functions and classes its module has or builds on."""
    module = sys.modules[timm.model_entrypoint(architecture).__module__]
    things = [thing for thing in vars(module).values() if inspect.isclass(thing) or inspect.isfunction(thing)]
    classes = [parent for thing in things if inspect.isclass(thing) for parent in thing.__mro__]
    names = set(_COMMON)
    for thing in (*things, *classes):
        if thing.__module__ == module.__name__ or thing.__module__.startswith("timm.models."):
            with contextlib.suppress(ValueError, TypeError):  # some classes have no signature
                names.update(inspect.signature(thing).parameters)
    return frozenset(names - _LOADING)


def check_model_args(architecture: Any, arguments: Any, where: str) -> None:  # noqa: ANN401 (of foreign JSON)
    """Check `model_args` of a model's settings.

    Raises:
        ModelError: a name that does not describe a network, or a value that is not plain.
    """
    if not isinstance(arguments, dict):
        raise ModelError(f"{where}: 'model_args' is {arguments!r:.80}, and not a mapping of names to values")
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        return  # which timm reports
    known = _arguments_of(architecture)
    for name, value in arguments.items():
        if name not in known:
            raise ModelError(
                f"{where}: 'model_args' has '{name}', which is not passed to timm: it is not among the arguments "
                f"that describe a network of the kind '{architecture}'",
                remedy="Take it out of 'model_args'",
            )
        if not _is_plain(value, _MOST.get(name, _MOST_NUMBER)):
            raise ModelError(
                f"{where}: 'model_args' has {name} = {value!r:.80}, which is not passed to timm: neither a number "
                f"of a plausible size, a word, nor a list of at most {_MOST_ITEMS} such"
            )


def _is_plain(value: Any, most: int, depth: int = 0) -> bool:  # noqa: ANN401
    match value:
        case None | bool():
            return True
        case int() | float():
            return math.isfinite(value) and abs(value) <= most
        case str():
            return _WORD.fullmatch(value) is not None
        case list():
            return depth < 2 and len(value) <= _MOST_ITEMS and all(_is_plain(item, most, depth + 1) for item in value)
    return False


def no_model(run: Path, config: Path) -> RunFolderError:
    """Make the error of a folder without a model that we load: an export for other programs, or no finished run."""
    for file, what, reader in _FOR_OTHERS:
        if (run / file).is_file():
            problem = f"'{run}' is an export, {what}, which {reader} reads: nothing here can be loaded as a run"
            return RunFolderError(problem, remedy="Name the run that it was made of, or an export to timm or hub")
    return RunFolderError(f"'{run}' holds no model: there is no '{config}'", remedy="Has the run ended? " + _FINISH)
