"""Record how a run was computed, start by start: on how many processes, in what passes, on codes or on images.

Promise: what changes only rounding, and what makes another training of the same recipe, is in `run.json` with the step
from which on it holds; nobody has to guess it from logs. A choice of tlscale's own is kept when the run is resumed.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from torch.nn.modules.instancenorm import _InstanceNorm

from tlscale.storage.files import naming_disk_errors, write_json
from tlscale.storage.run_folder import RunFolder
from tlscale.tracking.console import Console
from tlscale.training.loop_state import LoopState
from tlscale.training.setup import RunSetup
from tlscale.training.stages import apply_freezing

_WORDS = {
    "num_processes": "number of processes",
    "micro_batch_size": "images of a process in one pass",
    "engine": "engine",
    "gradient_checkpointing": "gradient checkpointing",
}


@dataclass(frozen=True)
class Computed:
    """Describe how the steps from one start on are computed; `run.json` holds a list of them under `computed`."""

    from_step: int  # of those done
    num_processes: int
    micro_batch_size: int
    engine: str | None  # None: of an older version, which did not say
    gradient_checkpointing: bool | None = None  # likewise

    def differs(self, other: Computed) -> list[str]:
        """Return the names of what is not the same."""
        return [
            name
            for name in _WORDS
            if getattr(self, name) != getattr(other, name) and None not in (getattr(self, name), getattr(other, name))
        ]


def depends_on_passes(setup: RunSetup) -> list[str]:
    """Find what makes another training of other passes over the same batch: `batch norm`, `dropout`.

    Batch norm takes its statistics over the images of a pass; dropout draws its masks by process and pass. Call it
    before the network is wrapped: the stages are entered for it.
    """
    found = set()
    for stage in setup.stages:
        apply_freezing(setup.classifier, stage)
        for module in setup.classifier.modules():
            has_statistics = getattr(module, "running_var", None) is not None
            if module.training and has_statistics and not isinstance(module, _InstanceNorm):
                found.add("batch norm")
            if module.training and _drops(module):
                found.add("dropout")
    apply_freezing(setup.classifier, setup.stages[0])
    return sorted(found)


def _drops(module: nn.Module) -> bool:
    rates = [getattr(module, name, 0.0) or 0.0 for name in ("p", "prob", "drop_prob", "rate")]
    return "Drop" in type(module).__name__ and any(isinstance(rate, int | float) and rate > 0 for rate in rates)


def note_start(
    folder: RunFolder,
    run_info: dict[str, Any],
    start: Computed,
    loop: LoopState,
    depending: list[str],
    console: Console,
) -> dict[str, Any]:
    """Write down how the run is computed from here on; announce what is not as before.

    Steps that no checkpoint has are made again, so that what was noted of them is taken back. `depending` is from
    `depends_on_passes`. Return what `run.json` holds.
    """
    starts = [known for known in _starts(run_info) if known.from_step < start.from_step]
    differing = start.differs(starts[-1]) if starts else []
    changes = [change for change in run_info.get("changes", []) if change["step"] < start.from_step]
    for name in differing:
        other = depending if name in ("num_processes", "micro_batch_size") else []
        effect = f"another training ({', '.join(other)})" if other else "rounding"
        before, after = getattr(starts[-1], name), getattr(start, name)
        changes.append({"step": start.from_step, "what": name, "before": before, "after": after, "effect": effect})
        console.say(_announced(changes[-1], other), style="yellow" if other else None)
    if differing or not starts:
        starts.append(start)
    new = {**run_info, "computed": [asdict(one) for one in starts], "changes": changes, "keeps_codes": loop.keeps_codes}
    return _write_if_new(folder, run_info, new)


def note_decisions(folder: RunFolder, loop: LoopState) -> None:
    """Write down what was decided for a stage that has begun."""
    run_info = json.loads(folder.run_json.read_text())
    _write_if_new(folder, run_info, {**run_info, "keeps_codes": loop.keeps_codes})


def _write_if_new(folder: RunFolder, run_info: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Write `run.json` where something has changed; return what it holds."""
    if new != run_info:
        with naming_disk_errors(folder.run_json):
            write_json(folder.run_json, new)
    return new


def _announced(change: dict[str, Any], depending: list[str]) -> str:
    what = f"{_WORDS[change['what']]}: {change['before']} -> {change['after']}, from step {change['step']:,} on"
    if not depending:
        return f"{what}: the same training up to rounding"
    return f"WARNING: {what}: with {' and '.join(depending)} this is another training than the run began as"


def _starts(run_info: dict[str, Any]) -> list[Computed]:
    if "computed" in run_info:
        return [Computed(**start) for start in run_info["computed"]]
    batch = re.search(r"x (\d+)$", run_info.get("batch") or "")  # of an older version
    return [Computed(0, int(run_info["world_size"]), int(batch[1]), None)] if batch else []
