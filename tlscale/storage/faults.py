"""Kill a process at fault points, places that tests choose to see that nothing is lost there.

Promise: without the variable TLSCALE_FAULT, which only tests set, a point does nothing but look for it.
"""

from __future__ import annotations

import os
import re
import signal
from collections import Counter

from tlscale.errors import LaunchError

VARIABLE = "TLSCALE_FAULT"
STOP_VARIABLE = "TLSCALE_FAULT_STOP"
POINTS = {
    "claimed": "the run folder is held, and is as it was",
    "clear": "a run that is to be replaced has lost its recipe.yaml, and nothing else yet",
    "record": "run.json is there, recipe.yaml is not",
    "file.rename": "a small file is written aside, and its name is still that of the old one",
    "restored": "a checkpoint is read back into the objects of a run",
    "metrics.cut": "the log without what is done again is written aside",
    "metrics.line": "a line of the log is written, but not flushed",
    "codes.block": "codes of a block of images are computed",
    "codes.place": "the files of a shard are written, and do not have its name yet",
    "codes.shard": "the files of a shard have its name, what makes it count is not written",
    "worker": "a batch is loaded (in the worker process, where there is one)",
    "step": "a step is done, and nothing of it is written",
    "evaluate": "in an evaluation, before a batch",
    "evaluated": "the line of an evaluation is written, the step that was found best is not saved",
    "checkpoint.begin": "the folder aside is made",
    "checkpoint.file": "a file of tensors is written",
    "checkpoint.manifest": "all files but the manifest are written",
    "checkpoint.rename": "the folder aside is complete",
    "checkpoint.latest": "the checkpoint has its name, LATEST points to the one before",
    "checkpoint.best": "LATEST points to it, BEST may not",
    "checkpoint.prune": "before a checkpoint that need not be kept is removed",
    "stage": "a stage is over, the next one has its optimizer",
    "export": "config.json of the exported model is written aside, its weights are not",
    "predictions": "the model is exported, predictions.parquet is written aside and has no name yet",
    "result": "the model is exported, result.json is not written",
}
_SPELLING = re.compile(r"(?P<name>[a-z.]+)(@(?P<count>[1-9]\d*))?(:(?P<rank>\d+))?", re.ASCII)
_COUNTED = re.compile(r"(@(?P<count>[1-9]\d*))?(:(?P<rank>\d+))?", re.ASCII)
_passed: Counter[str] = Counter()


def at(name: str) -> None:
    """End this process with SIGKILL where TLSCALE_FAULT asks for it.

    It is written `<name>[@<n>][:<rank>]`: at that point, when a process comes there for the n-th time (by default 1),
    on that rank (by default 0). A process that torchrun starts again is spared, else it would never get further.

    Raises:
        LaunchError: the variable names no point of `POINTS`, so that a test would test nothing.
    """
    wanted = os.environ.get(VARIABLE)
    if wanted:
        _meet(name, wanted)


def ask_to_stop(doing: str) -> None:
    """Send this process SIGTERM where TLSCALE_FAULT_STOP asks for it, which only tests set.

    It is written `<doing>[@<n>][:<rank>]`: when long work asks for the n-th time whether it is to stop.
    """
    wanted = os.environ.get(STOP_VARIABLE)
    if not wanted or not wanted.startswith(doing):
        return
    spelt = _COUNTED.fullmatch(wanted.removeprefix(doing))
    if spelt is None or os.environ.get("RANK", "0") != (spelt["rank"] or "0"):
        return
    _passed[doing] += 1
    if _passed[doing] == int(spelt["count"] or 1):
        os.kill(os.getpid(), signal.SIGTERM)


def _meet(name: str, wanted: str) -> None:
    assert name in POINTS, f"the fault point {name} is not in the list"
    spelt = _SPELLING.fullmatch(wanted)
    if spelt is None or spelt["name"] not in POINTS:
        raise LaunchError(f"{VARIABLE}={wanted} is not <name>[@<n>][:<rank>] of a fault point: {', '.join(POINTS)}")
    if name != spelt["name"] or os.environ.get("RANK", "0") != (spelt["rank"] or "0"):
        return
    _passed[name] += 1
    if _passed[name] == int(spelt["count"] or 1) and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        os.kill(os.getpid(), signal.SIGKILL)
