"""Checkpoints of a run whose tensors are spread over its processes: each writes and reads its own share.

Promise: what `checkpoint.py` promises, with all processes at work: a folder is named when every share is on the disk
and in the manifest, and one process that cannot write fails all. Shares are safetensors, by torch's distributed
checkpoint (its storage for Hugging Face's format, which has no pickled metadata); they are read by any number of
processes, and by `load_checkpoint` on one. A checkpoint of whole tensors is read as well.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.tensor
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from tlscale.distributed.fsdp import shard_tensor
from tlscale.distributed.processes import Processes
from tlscale.errors import CheckpointError
from tlscale.storage.files import flush
from tlscale.training.checkpoint.files import (
    SHARDS,
    Checkpoint,
    FileFacts,
    begin_checkpoint,
    cannot_save,
    complete_checkpoint,
    facts_of,
    group_and_name,
    is_sharded,
    load_checkpoint,
    read_whole_tensors,
    refuse_fault,
    share_key,
    tensors_in_shards,
)

Groups = dict[str, dict[str, Tensor]]


# -- save -----------------------------------------------------------------------------------------------------------


def save_sharded(root: Path, checkpoint: Checkpoint, processes: Processes) -> None:
    """As `save_checkpoint`; all processes call it, each with its shares and the same whole tensors.

    Raises:
        CheckpointError: on every process, if one cannot write; the checkpoints before are untouched.
    """
    shares, whole = _parted(checkpoint)
    aside = processes.run_on_main(begin_checkpoint, root, checkpoint)
    try:
        facts = processes.run_on_all(_write_shares, root, aside / SHARDS, checkpoint, shares, processes)
    except CheckpointError:
        processes.run_on_main(shutil.rmtree, aside, ignore_errors=True)
        raise
    shards = {name: file for files in processes.gather(facts) for name, file in files.items()}
    processes.run_on_main(complete_checkpoint, root, aside, whole, shards)


def _parted(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], Checkpoint]:
    """What is spread, by its name in the files of shares; and the checkpoint of all the rest."""
    shares = {
        share_key(group, name): tensor.detach()
        for group, named in checkpoint.tensors.items()
        for name, tensor in named.items()
        if isinstance(tensor, DTensor)
    }
    whole = {
        group: {name: tensor for name, tensor in named.items() if not isinstance(tensor, DTensor)}
        for group, named in checkpoint.tensors.items()
    }
    return shares, replace(checkpoint, tensors=whole)


def _write_shares(
    root: Path, folder: Path, checkpoint: Checkpoint, shares: Mapping[str, Tensor], processes: Processes
) -> dict[str, FileFacts]:
    """This process's files below the checkpoint's folder, with what the manifest says of them."""
    try:
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        save(dict(shares), storage_writer=writer, process_group=processes.control)
        files = sorted(folder.glob(f"shard-{processes.rank + 1:05}-*.safetensors"))
        facts = {f"{SHARDS}/{path.name}": facts_of(path) for path in files}
        if processes.is_main:
            flush(folder)
    except CheckpointException as error:  # of any process: torch tells all of them
        rank, (cause, _) = min(error.failures.items())
        raise cannot_save(root, checkpoint, cause) from error
    except OSError as error:
        raise cannot_save(root, checkpoint, error) from error
    return facts


# -- load -----------------------------------------------------------------------------------------------------------


def load_sharded(
    folder: Path, shapes: Mapping[str, torch.Size], processes: Processes, run_id: str | None = None
) -> Checkpoint:
    """A checkpoint, what is trained spread over the processes on their devices, all else whole on the CPU.

    Args:
        folder: of a checkpoint that any number of processes saved, with any engine.
        shapes: of the trained parameters by rule name.
        run_id: of the run that it must be of; None: of any.

    Raises:
        CheckpointError: it does not agree with its manifest, or is of another run.
    """
    assert processes.mesh is not None
    if not is_sharded(folder):
        return _spread_out(processes.run_on_all(load_checkpoint, folder, run_id), shapes, processes.mesh)
    processes.run_on_main(refuse_fault, folder, run_id)  # before any other code reads a byte of it
    checkpoint = processes.run_on_all(read_whole_tensors, folder)
    tensors: Groups = {group: dict(named) for group, named in checkpoint.tensors.items()}
    for key, share in _read_shares(folder / SHARDS, processes, processes.mesh).items():
        group, name = group_and_name(key)
        tensors.setdefault(group, {})[name] = share
    return replace(checkpoint, tensors=tensors)


def _read_shares(folder: Path, processes: Processes, mesh: DeviceMesh) -> dict[str, Tensor]:
    shares: dict[str, Any] = {
        name: torch.distributed.tensor.zeros(shape, dtype=dtype, device_mesh=mesh, placements=[Shard(0)])
        for name, (shape, dtype) in tensors_in_shards(folder).items()
    }
    load(shares, storage_reader=HuggingFaceStorageReader(str(folder)), process_group=processes.control)
    return shares


def _spread_out(checkpoint: Checkpoint, shapes: Mapping[str, torch.Size], mesh: DeviceMesh) -> Checkpoint:
    """What was saved whole; of the optimizer's state what has the shape of its parameter."""
    tensors: Groups = {}
    for group, named in checkpoint.tensors.items():
        tensors[group] = {
            name: shard_tensor(tensor, mesh) if tensor.shape == _shape_of_owner(group, name, shapes) else tensor
            for name, tensor in named.items()
        }
    return replace(checkpoint, tensors=tensors)


def _shape_of_owner(group: str, name: str, shapes: Mapping[str, torch.Size]) -> torch.Size | None:
    """Of the trained parameter that a tensor of a checkpoint is, or is about; None where there is none."""
    if group == "optimizer":
        owners = [param for param in shapes if name.startswith(f"{param}.")]
        return shapes[max(owners, key=len)] if owners else None
    return shapes.get(name.removeprefix("backbone."))
