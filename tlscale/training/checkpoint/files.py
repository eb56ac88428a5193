"""Checkpoints: safetensors and JSON only, complete or not there.

Promise: a folder `step_<n>` was written aside, flushed to the disk, hashed in its manifest and renamed, in this
order, and only then are older ones removed. One that does not agree with its manifest, or is of another run, is never
loaded; the one before it is, loudly. There is no pickle anywhere, so reading a checkpoint runs no code.

Tensors that are spread over processes lie in a folder `shards` within, a file of each process, as torch's distributed
checkpoint writes safetensors; `load_checkpoint` puts them together, so that one process can go on with what many saved.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from tlscale import faults
from tlscale.errors import CheckpointError
from tlscale.storage.files import file_sha256, flush, remove_left_overs, write_text

FORMAT = 1
_MANIFEST = "manifest.json"
_STATE = "state.json"
SHARDS = "shards"
_NAME = re.compile(r"step_\d{8,18}", re.ASCII)


FileFacts = dict[str, Any]  # bytes, sha256


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: named groups of tensors, and a state of plain JSON values.

    Attributes:
        run_id: of the run that it is a checkpoint of; None: it goes with any.
    """

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]
    run_id: str | None = None


def save_checkpoint(root: Path, checkpoint: Checkpoint) -> Path:
    """Write `root/step_<n>` and point LATEST to it; one of this step that is there (a damaged one) is replaced.

    Raises:
        CheckpointError: the disk is full or cannot be written; the checkpoints before are untouched.
    """
    return complete_checkpoint(root, begin_checkpoint(root, checkpoint), checkpoint)


def begin_checkpoint(root: Path, checkpoint: Checkpoint) -> Path:
    """An empty folder aside, for the files of `checkpoint`; what killed writers left is removed.

    Raises:
        CheckpointError: as `save_checkpoint`.
    """
    aside = root / f".{checkpoint_folder(root, checkpoint.step).name}.{os.getpid()}"
    with _saving(root, checkpoint, aside):
        root.mkdir(parents=True, exist_ok=True)
        _remove_left_overs(root)
        aside.mkdir()
        faults.at("checkpoint.begin")
    return aside


def complete_checkpoint(
    root: Path, aside: Path, checkpoint: Checkpoint, shards: Mapping[str, FileFacts] | None = None
) -> Path:
    """Write the files of `checkpoint` into `aside`, give it its name, and point LATEST to it.

    Args:
        shards: files that other processes wrote below `aside`, by path.

    Raises:
        CheckpointError: as `save_checkpoint`; or a file of another process is not there.
    """
    target = checkpoint_folder(root, checkpoint.step)
    with _saving(root, checkpoint, aside):
        _write_files(aside, checkpoint, shards or {})
        faults.at("checkpoint.rename")
        if target.exists():
            shutil.rmtree(target)
        aside.rename(target)
        flush(root)
        faults.at("checkpoint.latest")
        write_text(root / "LATEST", target.name + "\n")
    return target


@contextmanager
def _saving(root: Path, checkpoint: Checkpoint, aside: Path) -> Iterator[None]:
    """Within: what the disk does not take is an error that says so, and leaves nothing behind."""
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise cannot_save(root, checkpoint, error) from error


def cannot_save(root: Path, checkpoint: Checkpoint, error: BaseException) -> CheckpointError:
    """The error of a checkpoint that could not be written."""
    num_bytes = sum(t.numel() * t.element_size() for group in checkpoint.tensors.values() for t in group.values())
    return CheckpointError(
        f"cannot save the checkpoint of step {checkpoint.step} ({num_bytes / 2**20:.1f} MiB) in '{root}': "
        f"{_reason(error)}."
        " The checkpoints before it are untouched; make room and go on with --resume."
    )


def checkpoint_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` is, if there is one."""
    return root / f"step_{step:08d}"


def _reason(error: BaseException) -> str:
    full = getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error)
    return "the disk is full" if full else str(error)


def _write_files(folder: Path, checkpoint: Checkpoint, shards: Mapping[str, FileFacts]) -> None:
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{missing[0]}, which another process wrote, is not there: no file system of all")
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "run_id": checkpoint.run_id,
        "step": checkpoint.step,
        "files": dict(shards),
    }
    for name, group in checkpoint.tensors.items():
        tensors = {key: value.detach().cpu().contiguous().clone() for key, value in group.items()}
        safetensors.torch.save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
        faults.at("checkpoint.file")
    (folder / _STATE).write_text(json.dumps(checkpoint.state))
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        flush(path)
        manifest["files"][path.name] = facts_of(path)
    faults.at("checkpoint.manifest")
    write_text(folder / _MANIFEST, json.dumps(manifest, indent=2) + "\n")
    flush(folder)


def facts_of(path: Path) -> FileFacts:
    """What a manifest says of a file."""
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _remove_left_overs(root: Path) -> None:
    """What writers that were killed left; the run folder's lock says that none is at work."""
    for path in root.glob(".step_*"):
        shutil.rmtree(path, ignore_errors=True)
    for pointer in ("LATEST", "BEST"):
        remove_left_overs(root / pointer)


def list_checkpoints(root: Path) -> list[Path]:
    """Folders of checkpoints, oldest first, valid or not; a name that is not ours is none."""
    folders = (path for path in root.glob("step_*") if _NAME.fullmatch(path.name) and path.is_dir())
    return sorted(folders, key=_step_of)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def fault_of(folder: Path, run_id: str | None = None) -> str | None:
    """Why a checkpoint cannot be trusted; None where every file is as its manifest says.

    Args:
        run_id: of the run that it must be of; None: of any.
    """
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        if manifest["format"] > FORMAT:
            return f"it has format {manifest['format']}, this tlscale reads up to {FORMAT}"
        if run_id is not None and manifest.get("run_id") != run_id:
            return f"it is of another run ({manifest.get('run_id')}, and this one is {run_id})"
        there = (path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors"))
        missing = {_STATE, *there} - manifest["files"].keys()
        if missing:
            return f"{', '.join(sorted(missing))} is not in its {_MANIFEST}"
        for name, facts in manifest["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != facts["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {facts['bytes']}"
            if file_sha256(path) != facts["sha256"]:
                return f"{name} has changed since it was written"
        if f"step_{manifest['step']:08d}" != folder.name:
            return f"it was written as step {manifest['step']}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {_MANIFEST} cannot be read ({type(error).__name__})"
    return None


def load_checkpoint(folder: Path, run_id: str | None = None) -> Checkpoint:
    """A checkpoint, its tensors on the CPU.

    Args:
        run_id: as `fault_of`.

    Raises:
        CheckpointError: it does not agree with its manifest, or is of another run.
    """
    refuse_fault(folder, run_id)
    checkpoint = read_whole_tensors(folder)
    tensors = {group: dict(named) for group, named in checkpoint.tensors.items()}
    for key, tensor in _put_together(folder / SHARDS).items() if is_sharded(folder) else ():
        group, name = group_and_name(key)
        tensors.setdefault(group, {})[name] = tensor
    return replace(checkpoint, tensors=tensors)


def refuse_fault(folder: Path, run_id: str | None = None) -> None:
    """Raises `CheckpointError` where a checkpoint has a fault."""
    fault = fault_of(folder, run_id)
    if fault is not None:
        raise CheckpointError(f"the checkpoint '{folder}' cannot be used: {fault}")


def is_sharded(folder: Path) -> bool:
    """Whether tensors of the checkpoint were spread over processes when it was saved."""
    return (folder / SHARDS).is_dir()


def read_whole_tensors(folder: Path) -> Checkpoint:
    """A checkpoint that was found valid, without what was spread over processes."""
    tensors = {path.stem: safetensors.torch.load_file(path) for path in folder.glob("*.safetensors")}
    return Checkpoint(_step_of(folder), tensors, json.loads((folder / _STATE).read_text()))


def _put_together(folder: Path) -> dict[str, Tensor]:
    """The tensors that several processes wrote their shares of, whole, by their names there."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    tensors: dict[str, Any] = {
        name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in tensors_in_shards(folder).items()
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    return tensors


def tensors_in_shards(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and type of the whole tensors whose shares are in the files of `folder`."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
    return {
        name: (facts.size, facts.properties.dtype)
        for name, facts in metadata.state_dict_metadata.items()
        if isinstance(facts, TensorStorageMetadata)  # this format has no others
    }


def share_key(group: str, name: str) -> str:
    """The name of a tensor in the files of shares, which hold those of all groups."""
    return f"{group}/{name}"


def group_and_name(key: str) -> tuple[str, str]:
    """The inverse of `share_key`."""
    group, _, name = key.partition("/")
    return group, name


def newest_valid(root: Path, run_id: str | None = None) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that agrees with its manifest, and what was found wrong with newer ones.

    Args:
        run_id: as `fault_of`.

    Raises:
        CheckpointError: there are checkpoints, and none is valid: starting afresh would lose the run in silence.
    """
    faults: list[str] = []
    for folder in reversed(list_checkpoints(root)):
        fault = fault_of(folder, run_id)
        if fault is None:
            return folder, faults
        faults.append(f"the checkpoint '{folder}' is passed over: {fault}")
    if faults:
        lines = "\n  ".join(faults)
        raise CheckpointError(f"no checkpoint in '{root}' can be used:\n  {lines}\n  --overwrite starts afresh.")
    return None, []


def mark_best(root: Path, step: int) -> None:
    """Point BEST to the checkpoint of `step`.

    Raises:
        CheckpointError: the disk is full or cannot be written.
    """
    _point(root / "BEST", step)


def mark_latest(root: Path, step: int) -> None:
    """Point LATEST to the checkpoint of `step`; errors as `mark_best`."""
    _point(root / "LATEST", step)


def _point(pointer: Path, step: int) -> None:
    try:
        remove_left_overs(pointer)
        write_text(pointer, f"{checkpoint_folder(pointer.parent, step).name}\n")
    except OSError as error:
        raise CheckpointError(f"cannot write '{pointer}': {_reason(error)}. Make room, then --resume.") from error


def pointed_to(root: Path, pointer: str) -> Path | None:
    """The folder that LATEST or BEST names; None where there is none."""
    try:
        name = (root / pointer).read_text().strip()
    except (OSError, ValueError):
        return None
    # Only a name of ours: a pointer is data, and must not lead out of the folder.
    return next((path for path in list_checkpoints(root) if path.name == name), None)


def prune(root: Path, *, keep: int, keep_steps: Collection[int], run_id: str | None = None) -> None:
    """Remove all but the newest `keep` valid checkpoints and those of `keep_steps`.

    One that is damaged, or of another run than `run_id`, does not count as one that is kept; where none is valid, none
    is removed.
    """
    folders = [folder for folder in reversed(list_checkpoints(root)) if _step_of(folder) not in keep_steps]
    if len(folders) <= keep:
        return  # the usual case of a first save; nothing needs to be read
    kept: list[Path] = []
    for folder in folders:
        if len(kept) < keep and fault_of(folder, run_id) is None:
            kept.append(folder)
    for folder in set(folders) - set(kept) if kept else ():
        faults.at("checkpoint.prune")
        shutil.rmtree(folder, ignore_errors=True)
