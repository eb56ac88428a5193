"""Word the messages of a training run that ends before its last step."""

from __future__ import annotations

from tlscale.distributed.signals import StopRequest
from tlscale.storage.run_folder import RunFolder
from tlscale.training.checkpoint.files import pointed_to
from tlscale.training.loop_state import LoopState
from tlscale.training.setup import RunSetup


def non_finite(bad_step: int, folder: RunFolder) -> str:
    """Tell that the loss or the weights are not finite, what is saved, and what to do."""
    newest = pointed_to(folder.checkpoints, "LATEST")
    return (
        f"the loss or the weights became NaN or infinite at step {bad_step}; up to step {bad_step - 1} all was finite. "
        f"{f'The last checkpoint is {newest}' if newest else 'There is no checkpoint yet'}; nothing was saved after. "
        "Lower optim.lr, lengthen schedule.warmup, set optim.clip_grad_norm=1.0, or use compute.precision=fp32; "
        "non_finite.action=skip skips single steps."
    )


def stopped(stop: StopRequest, loop: LoopState, setup: RunSetup, folder: RunFolder) -> str:
    """Tell that the run was stopped, and by what."""
    return (
        f"stopped by {stop.by or 'a signal to another process'} after step {loop.step} of {setup.total_steps}; all "
        f"is saved in '{folder.path}'. The same line with --resume goes on."
    )
