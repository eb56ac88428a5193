"""Save and load checkpoints of a run on several processes, whose tensors may be sharded over them.

Promise: what `files.py` promises, with all processes at work: a folder is named when every shard is on the disk and in
the manifest, and one process that cannot write fails all. Shards are safetensors, by torch's distributed checkpoint
(its storage for Hugging Face's format, which has no pickled metadata); they are read by any number of processes, and by
`load_checkpoint` on one. A checkpoint of unsharded tensors is read as well.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.tensor
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from tlscale.distributed.fsdp import Fsdp2Engine, shard_tensor
from tlscale.distributed.processes import Processes
from tlscale.errors import CheckpointError
from tlscale.storage.files import flush
from tlscale.training.checkpoint.files import (
    SHARDS,
    Checkpoint,
    begin_checkpoint,
    cannot_save,
    complete_checkpoint,
    file_info,
    list_checkpoints,
    load_checkpoint,
    load_newest,
    load_part,
    save_checkpoint,
)
from tlscale.training.checkpoint.tensor_file import FileInfo, TensorPart, add_parts, shard_key

Groups = dict[str, dict[str, Tensor]]
Params = Mapping[str, nn.Parameter]  # the trained ones, by rule name


# -- save -----------------------------------------------------------------------------------------------------------


def save_on_all(root: Path, checkpoint: Checkpoint, processes: Processes) -> None:
    """Save as `save_checkpoint`; all processes call it, each with its shards and the same unsharded tensors.

    Raises:
        CheckpointError: on every process, if one cannot write; the checkpoints before are untouched.
    """
    shards, unsharded = _split(checkpoint)
    if not shards:
        processes.run_on_main(save_checkpoint, root, checkpoint)
        return
    aside = processes.run_on_main(begin_checkpoint, root, checkpoint)
    try:
        infos = processes.run_on_all(_write_shards, root, aside / SHARDS, checkpoint, shards, processes)
    except CheckpointError:
        processes.run_on_main(shutil.rmtree, aside, ignore_errors=True)
        raise
    files = {name: info for infos_of_one in processes.gather(infos) for name, info in infos_of_one.items()}
    processes.run_on_main(complete_checkpoint, root, aside, unsharded, files)


def _split(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], Checkpoint]:
    """Return what is sharded, by its name in the files of shards; and the checkpoint of all the rest."""
    shards = {
        shard_key(group, name): tensor.detach()
        for group, named in checkpoint.tensors.items()
        for name, tensor in named.items()
        if isinstance(tensor, DTensor)
    }
    unsharded = {
        group: {name: tensor for name, tensor in named.items() if not isinstance(tensor, DTensor)}
        for group, named in checkpoint.tensors.items()
    }
    return shards, replace(checkpoint, tensors=unsharded)


def _write_shards(
    root: Path, folder: Path, checkpoint: Checkpoint, shards: Mapping[str, Tensor], processes: Processes
) -> dict[str, FileInfo]:
    """Write this process's files below the checkpoint's folder; return their entries in the manifest."""
    try:
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        save(dict(shards), storage_writer=writer, process_group=processes.control)
        files = sorted(folder.glob(f"shard-{processes.rank + 1:05}-*.safetensors"))
        infos: dict[str, FileInfo] = {f"{SHARDS}/{path.name}": file_info(path) for path in files}
        if processes.is_main:
            flush(folder)
    except CheckpointException as error:  # of any process: torch tells all of them
        rank, (cause, _) = min(error.failures.items())
        raise cannot_save(root, checkpoint, cause) from error
    except OSError as error:
        raise cannot_save(root, checkpoint, error) from error
    return infos


# -- load -----------------------------------------------------------------------------------------------------------


def load_newest_on_all(
    root: Path, trained: Params, processes: Processes, run_id: str | None
) -> tuple[Checkpoint | None, list[str]]:
    """Load the newest checkpoint that all processes can use; arguments as `load_on_all`, the rest as `load_newest`."""
    folders = processes.run_on_main(list_checkpoints, root)  # one file system may show them at different times
    return load_newest(folders, partial(load_on_all, trained=trained, processes=processes, run_id=run_id))


def load_on_all(folder: Path, trained: Params, processes: Processes, run_id: str | None = None) -> Checkpoint:
    """Load a checkpoint on all processes: what they shard as shards on their devices, all else whole on the CPU.

    Any number of processes saved it, with any engine. The `trained` parameters, shards or not, tell the shapes of what
    is sharded.

    Raises:
        CheckpointError: on every process, where it does not agree with its manifest or is of another run.
    """
    engine = processes.engine
    if not isinstance(engine, Fsdp2Engine):
        return processes.run_on_all(load_checkpoint, folder, run_id)
    part = {"rank": processes.rank, "world_size": processes.world_size}
    checkpoint, parts = processes.run_on_all(load_part, folder, run_id, **part)
    if not parts:
        return _shard_like_owners(checkpoint, trained, engine.mesh)
    return replace(checkpoint, tensors=add_parts(checkpoint.tensors, parts, lambda part: _to_shard(part, engine.mesh)))


def _to_shard(part: TensorPart, mesh: DeviceMesh) -> Tensor:
    shard: Any = torch.distributed.tensor.zeros(
        part.shape, dtype=part.values.dtype, device_mesh=mesh, placements=[Shard(0)]
    )
    shard.to_local().copy_(part.values)
    return shard  # type: ignore[no-any-return]


def _shard_like_owners(checkpoint: Checkpoint, trained: Params, mesh: DeviceMesh) -> Checkpoint:
    """Shard what was saved unsharded; of the optimizer's state what has the shape of its parameter."""
    tensors: Groups = {
        group: {
            name: shard_tensor(tensor, mesh) if tensor.shape == _shape_of_owner(group, name, trained) else tensor
            for name, tensor in named.items()
        }
        for group, named in checkpoint.tensors.items()
    }
    return replace(checkpoint, tensors=tensors)


def _shape_of_owner(group: str, name: str, trained: Params) -> torch.Size | None:
    """Return the shape of the trained parameter that a tensor of a checkpoint is, or is about; None: of none."""
    if group == "optimizer":
        owners = [param for param in trained if name.startswith(f"{param}.")]
        return trained[max(owners, key=len)].shape if owners else None
    owner = trained.get(name.removeprefix("backbone."))
    return None if owner is None else owner.shape
