"""Write and read checkpoints: safetensors and JSON only, complete or not there.

Promise: a folder `step_<n>` was written aside, flushed to the disk, hashed in its manifest and renamed, in this
order, and only then are older ones removed. One that does not agree with its manifest, or is of another run, is never
loaded; the one before it is, loudly. There is no pickle anywhere, so reading a checkpoint runs no code. A save reads
each file back once, and a process that loads reads it once.

Tensors that are sharded over processes lie in a folder `shards` within, a file of each process, as torch's distributed
checkpoint writes safetensors; `load_checkpoint` puts them together, so that one process can resume what many saved.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
from torch import Tensor

from tlscale.data.content import file_stamp
from tlscale.errors import CheckpointError, flag
from tlscale.storage import faults
from tlscale.storage.files import flush, flush_and_hash, make_folder, remove_left_overs, write_text
from tlscale.training.checkpoint.tensor_file import (
    CheckpointFile,
    CorruptionError,
    FileInfo,
    TensorPart,
    add_parts,
    read_part,
)

FORMAT = 1
_MANIFEST = "manifest.json"
_STATE = "state.json"
SHARDS = "shards"
_NAME = re.compile(r"step_\d{8,18}", re.ASCII)
_FILE_NAME = re.compile(r"(shards/)?[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}", re.ASCII)  # nothing that leads elsewhere


@dataclass(frozen=True)
class Checkpoint:
    """Hold what a checkpoint has: named groups of tensors, and a state of plain JSON values."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]
    run_id: str | None = None  # of the run that it belongs to; None: to any


def save_checkpoint(root: Path, checkpoint: Checkpoint) -> Path:
    """Write `root/step_<n>` and point LATEST to it; one of this step that is there (a corrupt one) is replaced.

    Raises:
        CheckpointError: the disk is full or cannot be written; the checkpoints before are untouched.
    """
    return complete_checkpoint(root, begin_checkpoint(root, checkpoint), checkpoint)


def begin_checkpoint(root: Path, checkpoint: Checkpoint) -> Path:
    """Make an empty folder aside, and remove what killed writers left there; errors as `save_checkpoint`."""
    aside = root / f".{checkpoint_folder(root, checkpoint.step).name}.{os.getpid()}"
    with _saving(root, checkpoint, aside):
        make_folder(root)
        _remove_left_overs(root)
        aside.mkdir()
        faults.at("checkpoint.begin")
    return aside


def complete_checkpoint(
    root: Path, aside: Path, checkpoint: Checkpoint, shards: Mapping[str, FileInfo] | None = None
) -> Path:
    """Write the files of `checkpoint` into `aside`, give it its name, and point LATEST to it.

    `shards` are files that the processes wrote below `aside`, by path; `checkpoint` is without what is in them.

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
    _note_verified(target, checkpoint.run_id)  # its files were read back when they were hashed
    return target


@contextmanager
def _saving(root: Path, checkpoint: Checkpoint, aside: Path) -> Iterator[None]:
    """Turn what the disk does not take into an error, and leave nothing half written."""
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise cannot_save(root, checkpoint, error) from error


def cannot_save(root: Path, checkpoint: Checkpoint, error: BaseException) -> CheckpointError:
    """Make the error of a checkpoint that could not be written."""
    num_bytes = sum(t.numel() * t.element_size() for group in checkpoint.tensors.values() for t in group.values())
    return CheckpointError(
        f"cannot save the checkpoint of step {checkpoint.step} ({num_bytes / 2**20:.1f} MiB) in '{root}': "
        f"{_reason(error)}",
        remedy="The checkpoints before it are untouched; make room and resume with " + flag("resume") + ".",
    )


def checkpoint_folder(root: Path, step: int) -> Path:
    """Return where the checkpoint of `step` is, if there is one."""
    return root / f"step_{step:08d}"


def _reason(error: BaseException) -> str:
    full = getattr(error, "errno", None) == errno.ENOSPC or "os error 28" in str(error)
    return "the disk is full" if full else str(error)


def _write_files(folder: Path, checkpoint: Checkpoint, shards: Mapping[str, FileInfo]) -> None:
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
        manifest["files"][path.name] = file_info(path)
    faults.at("checkpoint.manifest")
    write_text(folder / _MANIFEST, json.dumps(manifest, indent=2) + "\n")
    flush(folder)


def file_info(path: Path) -> dict[str, Any]:
    """Force a file to the disk, read it back, and return its entry in a manifest."""
    return dict(zip(("bytes", "sha256"), flush_and_hash(path), strict=True))


def _remove_left_overs(root: Path) -> None:
    # The run folder's lock says that no writer is at work.
    for path in root.glob(".step_*"):
        shutil.rmtree(path, ignore_errors=True)
    for pointer in ("LATEST", "BEST"):
        remove_left_overs(root / pointer)


def list_checkpoints(root: Path) -> list[Path]:
    """List the folders of checkpoints, oldest first, valid or not; a name that is not ours is none."""
    folders = (path for path in root.glob("step_*") if _NAME.fullmatch(path.name) and path.is_dir())
    return sorted(folders, key=_step_of)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


# -- read -----------------------------------------------------------------------------------------------------------


def load_checkpoint(folder: Path, run_id: str | None = None) -> Checkpoint:
    """Load a checkpoint of the run `run_id` (None: of any), its tensors whole and on the CPU.

    Raises:
        CheckpointError: it does not agree with its manifest, or is of another run.
    """
    checkpoint, parts = load_part(folder, run_id, rank=0, world_size=1)
    return replace(checkpoint, tensors=add_parts(checkpoint.tensors, parts, lambda part: part.values))


def load_part(
    folder: Path, run_id: str | None, *, rank: int, world_size: int
) -> tuple[Checkpoint, dict[str, TensorPart]]:
    """Load what a checkpoint has unsharded, and this process's part of what is sharded, by its name there.

    Errors as `load_checkpoint`, in the files that this process has to read.
    """
    try:
        manifest = _read_manifest(folder, run_id)
        shards = {name: info for name, info in manifest["files"].items() if name.startswith(f"{SHARDS}/")}
        tensors: dict[str, Mapping[str, Tensor]] = {}
        state: Mapping[str, Any] = {}
        for name in (name for name in manifest["files"] if name not in shards):
            with CheckpointFile(folder, name, manifest["files"][name]) as file:
                file.verify()
                if name == _STATE:
                    state = file.plain()
                else:
                    tensors[Path(name).stem] = file.tensors()
        parts = read_part(folder, shards, rank, world_size)
    except CorruptionError as error:
        raise CheckpointError(f"the checkpoint '{folder}' cannot be used: {error}") from error
    _note_verified(folder, manifest.get("run_id"))
    return Checkpoint(_step_of(folder), tensors, state, manifest.get("run_id")), parts


def load_newest(folders: Sequence[Path], load: Callable[[Path], Checkpoint]) -> tuple[Checkpoint | None, list[str]]:
    """Load the newest checkpoint, of these folders (oldest first), for which `load` raises no `CheckpointError`.

    Returns:
        None where there are no folders, and what is wrong with newer ones.

    Raises:
        CheckpointError: there are checkpoints, and none can be used: a new start would lose the run in silence.
    """
    wrong: list[str] = []
    for folder in reversed(folders):
        try:
            return load(folder), wrong
        except CheckpointError as error:
            wrong.append(str(error))
    if wrong:
        lines = "\n  ".join(wrong)
        none_left = CheckpointError(
            f"no checkpoint in '{folders[0].parent}' can be used:\n  {lines}",
            remedy=flag("overwrite") + " starts afresh.",
        )
        none_left.reported_by_main = True  # all processes come here together
        raise none_left
    return None, []


def corruption_of(folder: Path, run_id: str | None = None) -> str | None:
    """Find why a checkpoint of the run `run_id` (None: of any) cannot be trusted; None where it is as its manifest."""
    try:
        manifest = _read_manifest(folder, run_id)
        for name, info in manifest["files"].items():
            with CheckpointFile(folder, name, info) as file:
                file.verify()
    except CorruptionError as error:
        return str(error)
    _note_verified(folder, manifest.get("run_id"))
    return None


def _read_manifest(folder: Path, run_id: str | None) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((folder / _MANIFEST).read_text())
        there = (path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors"))
        unknown = sorted({_STATE, *there} - manifest["files"].keys())
        of, written_as = manifest.get("run_id"), f"step_{manifest['step']:08d}"
        if manifest["format"] > FORMAT:
            raise CorruptionError(f"it has format {manifest['format']}, this tlscale reads up to {FORMAT}")
        if not all({"bytes", "sha256"} <= info.keys() for info in manifest["files"].values()):
            raise KeyError("sha256")
        if not all(map(_FILE_NAME.fullmatch, manifest["files"])):
            raise ValueError("names of files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptionError(f"its {_MANIFEST} cannot be read ({type(error).__name__})") from error
    if run_id is not None and of != run_id:
        raise CorruptionError(f"it is of another run ({of}, and this one is {run_id})")
    if unknown:
        raise CorruptionError(f"{', '.join(unknown)} is not in its {_MANIFEST}")
    if written_as != folder.name:
        raise CorruptionError(f"it was written as step {manifest['step']}")
    return manifest


# -- point and prune --------------------------------------------------------------------------------------------------


def point(root: Path, name: Literal["BEST", "LATEST"], step: int) -> None:
    """Point BEST or LATEST to the checkpoint of `step`.

    Raises:
        CheckpointError: the disk is full or cannot be written.
    """
    pointer = root / name
    try:
        remove_left_overs(pointer)
        write_text(pointer, f"{checkpoint_folder(root, step).name}\n")
    except OSError as error:
        raise CheckpointError(
            f"cannot write '{pointer}': {_reason(error)}", remedy="Make room, then " + flag("resume") + "."
        ) from error


def pointed_to(root: Path, pointer: str) -> Path | None:
    """Return the folder that LATEST or BEST names; None where there is none."""
    try:
        name = (root / pointer).read_text().strip()
    except (OSError, ValueError):
        return None
    # Only a name of ours: a pointer is data, and must not lead out of the folder.
    return next((path for path in list_checkpoints(root) if path.name == name), None)


def prune(root: Path, *, keep: int, keep_steps: Collection[int], run_id: str | None = None) -> None:
    """Remove all but the newest `keep` valid checkpoints and those of `keep_steps`.

    One that is corrupt, or of another run than `run_id`, does not count as one that is kept; where none is valid, none
    is removed. What this process has verified is read again only if a file has changed since.
    """
    folders = [folder for folder in reversed(list_checkpoints(root)) if _step_of(folder) not in keep_steps]
    if len(folders) <= keep:
        return  # the usual case of a first save; nothing needs to be read
    kept: list[Path] = []
    for folder in folders:
        if len(kept) < keep and (_is_verified(folder, run_id) or corruption_of(folder, run_id) is None):
            kept.append(folder)
    for folder in set(folders) - set(kept) if kept else ():
        faults.at("checkpoint.prune")
        shutil.rmtree(folder, ignore_errors=True)
        _verified.pop(folder, None)


# Folder -> its run, and the states of its files when this process had hashed them. A change through the file system
# shows in them; what only the medium changed is found when the checkpoint is loaded.
_verified: dict[Path, tuple[str | None, list[tuple[object, ...]]]] = {}


def _note_verified(folder: Path, run_id: str | None) -> None:
    _verified[folder] = run_id, _states_of(folder)


def _is_verified(folder: Path, run_id: str | None) -> bool:
    of, states = _verified.get(folder, (None, []))
    return bool(states) and run_id in (None, of) and states == _states_of(folder)


def _states_of(folder: Path) -> list[tuple[object, ...]]:
    return [(path, *file_stamp(path.stat())) for path in sorted(folder.rglob("*")) if path.is_file()]
