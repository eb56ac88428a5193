"""Save all that a run is in a checkpoint, and put it back.

Promise: after `restore` the run is where `snapshot` found it, on any number of processes.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from tlscale.distributed.processes import Processes
from tlscale.errors import CheckpointError
from tlscale.models.classifier import Classifier
from tlscale.recipe.schema import CheckpointSection
from tlscale.storage import faults
from tlscale.training.checkpoint.files import Checkpoint, point, prune
from tlscale.training.checkpoint.optimizer_state import pack_optimizer, unpack_optimizer
from tlscale.training.checkpoint.sharded import save_on_all
from tlscale.training.ema import Ema
from tlscale.training.loop_state import LoopState


def snapshot(
    loop: LoopState,
    network: Classifier,
    optimizer: torch.optim.Optimizer,
    ema: Ema | None,
    accelerator: Accelerator,
    *,
    spent_s: dict[str, float] | None = None,
    unchanging_keys: Collection[str] = (),
) -> Checkpoint:
    """Make a checkpoint of all that a run is, of bare objects: the scaler is the accelerator's, where it has one.

    `unchanging_keys` are names in the network's state dict of what the run cannot change. They are skipped: the weights
    that the run began with, whose identity is in `run.json`, have them.
    """
    tensors, plain = pack_optimizer(optimizer)
    weights = {name: tensor for name, tensor in network.state_dict().items() if name not in unchanging_keys}
    groups: dict[str, dict[str, Tensor]] = {"model": weights, "optimizer": tensors}
    if ema is not None:
        groups["ema"] = ema.averages
    scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
    state = {"clock": {**loop.to_plain(), "spent_s": spent_s or {}}, "optimizer": plain, "scaler": scaler}
    return Checkpoint(loop.step, groups, state, loop.run_id)


def restore(
    checkpoint: Checkpoint,
    network: Classifier,
    optimizer: torch.optim.Optimizer,
    ema: Ema | None,
    unchanging_keys: Collection[str] = (),
) -> None:
    """Put a checkpoint back into the bare objects of a run; what it remembers is `saved_loop_state`.

    The optimizer is that of the stage in which the checkpoint was saved; the network has the weights that the run began
    with, and so what `unchanging_keys` name.

    Raises:
        CheckpointError: it is of another network.
    """
    restore_weights(checkpoint, network, ema, unchanging_keys)
    unpack_optimizer(optimizer, checkpoint.tensors["optimizer"], checkpoint.state["optimizer"])
    faults.at("restored")


def saved_loop_state(checkpoint: Checkpoint) -> LoopState:
    """Return what the run remembered when a checkpoint was saved."""
    return LoopState.from_plain(checkpoint.state["clock"])


def restore_weights(
    checkpoint: Checkpoint, network: Classifier, ema: Ema | None, unchanging_keys: Collection[str] = ()
) -> None:
    """Put the weights, and their averages, of a checkpoint of any stage back; arguments and errors as `restore`."""
    weights = dict(checkpoint.tensors["model"])
    lacking = [name for name in network.state_dict() if name not in weights and name not in unchanging_keys]
    if lacking:
        raise CheckpointError(
            f"the checkpoint of step {checkpoint.step} lacks {len(lacking)} of the network's tensors: {lacking[0]} ..."
        )
    network.load_state_dict(weights, strict=not unchanging_keys)
    if ema is not None:
        ema.load(checkpoint.tensors["ema"])


def write_checkpoint(
    root: Path, checkpoint: Checkpoint, loop: LoopState, section: CheckpointSection, processes: Processes
) -> None:
    """Save as `save_on_all`, point BEST to the chosen step, and only then remove what need not be kept."""
    save_on_all(root, checkpoint, processes)
    processes.run_on_main(_tidy_up, root, loop, section)


def _tidy_up(root: Path, loop: LoopState, section: CheckpointSection) -> None:
    faults.at("checkpoint.best")
    if loop.chosen_step is not None:
        point(root, "BEST", loop.chosen_step)
    prune(root, keep=section.keep, keep_steps=loop.kept_steps(section), run_id=loop.run_id)


def point_to(root: Path, loop: LoopState) -> None:
    """Point LATEST and BEST, as `point` does, to what a run resumes from: whoever wrote them may have been killed."""
    point(root, "LATEST", loop.step)
    if loop.chosen_step is not None:
        point(root, "BEST", loop.chosen_step)
