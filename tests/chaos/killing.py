"""What the tests of kills share: the runs, how they are killed, and what they must end as."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import signal
import socket
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq

from tests.dist.many_checks import HALF_VIT
from tests.forks import Forks
from tests.small_runs import assert_same_runs, last_checkpoint, result, small_recipe

SEED = int(os.environ.get("TLSCALE_CHAOS_SEED") or random.SystemRandom().randrange(10**6))
KILLS: Counter[str] = Counter()  # by what was killed

_OFTEN = {"checkpoint": {"every": "2 steps", "keep": 2}, "evaluate": {"every": "3 steps"}}
RECIPES = {
    # Codes of all, then of half of the backbone, and in the end none.
    "staged": {
        **_OFTEN,
        "codes": {"keep": "always"},
        "stages": [
            {"freeze": ".*", "duration": "5 steps", "lr": 5e-3},
            {"freeze": HALF_VIT, "duration": "4 steps"},
            {"duration": "4 steps", "lr": 5e-4},
        ],
        "head": [{"linear": 16}, "gelu", {"dropout": 0.3}, "linear"],
        "optim": {"ema_decay": 0.9},
    },
    "workers": {
        **_OFTEN,
        "duration": "12 steps",
        "backbone": {"drop_path_rate": 0.2},
        "data": {"augment": ["flip", "crop", {"mixup": 0.4}], "workers": 2, "cache_mib": 0},
        "compute": {"micro_batch_size": 4},
    },
    # Nothing divides, and batch statistics differ by rank: for several processes.
    "several": {
        **_OFTEN,
        "duration": "13 steps",
        "backbone": {"name": "test_resnet"},
        "freeze": r"(conv1|bn1|layer1)\..*",
        "data": {"augment": ["flip", {"mixup": 0.4}], "workers": 0},
        "optim": {"clip_grad_norm": 1.0, "ema_decay": 0.9},
    },
    "probed": {"probe": {"kind": "ridge"}, "codes": {"layer": ["blocks.0", "penultimate"]}},
    # Codes of three plain splits, and of two views more of what is evaluated.
    "viewed": {
        "freeze": HALF_VIT,
        "codes": {"keep": "always"},
        "evaluate": {"every": "3 steps", "views": ["flip", "vertical_flip"]},
    },
    "probed views": {"probe": {"kind": "ridge"}, "evaluate": {"views": ["flip", "vertical_flip"]}},
}


def drawing(name: str) -> random.Random:
    """Draws of a trial, which do not depend on which other trials there are."""
    return random.Random(f"{SEED} {name}")


class Place:
    """A run's own folder, cache and log; `words` is the line that is started again and again."""

    def __init__(self, folder: Path, recipe: str | dict, data: Path) -> None:
        """`recipe` is one of `RECIPES`, or what it would have there."""
        folder.mkdir(parents=True)
        self.out, self.cache, self.log = folder / "run", folder / "cache", folder / "log"
        small_recipe(folder / "recipe.yaml", data, **(RECIPES[recipe] if isinstance(recipe, str) else recipe))
        self.words = ("run", folder / "recipe.yaml", "--out", self.out, "--resume")
        self.variables = {"TLSCALE_CACHE": str(self.cache)}

    def start(self, forks: Forks, *, rank: int | None = None, **more) -> int:
        log = self.log if rank is None else self.log.with_name(f"log{rank}")
        return forks.start(*self.words, log=log, **{**self.variables, **more})

    def said(self) -> str:
        """All output of all processes."""
        return "".join(log.read_text() for log in self._logs())

    def output(self) -> str:
        """The ends of it, for messages."""
        return "".join(f"--- {log}\n{log.read_text()[-3000:]}" for log in self._logs())

    def _logs(self) -> list[Path]:
        return [log for log in sorted(self.log.parent.glob("log*")) if log.suffix != ".count"]


def start_and_kill(forks: Forks, place: Place, kind: str, value) -> bool:
    """One start that is killed: at a fault point, before the n-th operation on a file, or after some seconds.

    Returns:
        Whether it was; the last two may come too late.
    """
    more: dict = {}
    if kind == "fault":
        more = {"TLSCALE_FAULT": value}
    elif kind == "file":
        more = {"die_at": value, "within": (place.out, place.cache)}
    pid = place.start(forks, **more)
    if kind == "time":
        time.sleep(value)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    status = forks.wait(pid)
    assert status == -signal.SIGKILL or (status == 0 and kind != "fault"), (kind, value, status, place.output())
    if status == 0:
        return False
    KILLS[f"one process, {kind}"] += 1
    return True


def processes_of(world_size: int) -> list[dict[str, str]]:
    """The variables that a launcher gives to each of its processes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]


def start_all(forks: Forks, place: Place, world_size: int, **more) -> list[int]:
    """Start the processes of a run as a launcher would; `more` as `Forks.start`, `by_rank` for one of them."""
    by_rank = more.pop("by_rank", {})
    return [
        place.start(forks, rank=rank, **{**variables, **more, **by_rank.get(rank, {})})
        for rank, variables in enumerate(processes_of(world_size))
    ]


def sha256_of_files(out: Path) -> dict[str, str]:
    """Of all that must be equal to the last bit: the exported model, the last checkpoint, the recipe, the pointers."""
    checkpoint = last_checkpoint(out)
    paths = [*(out / "model").iterdir(), *checkpoint.glob("*.safetensors"), out / "recipe.yaml"]
    paths += [path for pointer in ("LATEST", "BEST") if (path := out / "checkpoints" / pointer).exists()]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def clock_of(out: Path) -> dict:
    """What the last checkpoint remembers, without times and the id of the run."""
    clock = json.loads((last_checkpoint(out) / "state.json").read_text())["clock"]
    return {key: value for key, value in clock.items() if not key.endswith("_s") and key != "run_id"}


def assert_ended_as(whole: Path, out: Path) -> None:
    """Nothing tells this run from the one that was not killed, but times."""
    assert_same_runs(whole, out)
    assert sha256_of_files(whole) == sha256_of_files(out)
    assert clock_of(whole) == clock_of(out)
    # Old checkpoints may be left of what was killed before it removed them, but nothing half-written.
    tops = [sorted(path.name for path in folder.iterdir()) for folder in (whole, out)]
    assert tops[0] == tops[1]
    assert list((out / "checkpoints").glob(".*")) == []


def assert_same_answers(whole: Path, out: Path) -> None:
    """Predictions of the images, and what the result says of them, to the last bit."""
    assert pq.read_table(whole / "predictions.parquet").equals(pq.read_table(out / "predictions.parquet"))
    first, second = result(whole), result(out)
    assert first.keys() == second.keys()
    may_differ = {"codes", "name", "run_id", "seconds"} | {name for name in first if name.endswith("_s")}
    for name in first.keys() - may_differ:
        assert first[name] == second[name], name


def last_codes(place: Place, rank: int | None = None) -> str:
    """Name the codes, such as `train` or `test, center+flip`, that its last start computed last."""
    log = place.log if rank is None else place.log.with_name(f"log{rank}")
    found: str = re.findall(r"^codes of ([^:]+):", log.read_text(), re.MULTILINE)[-1]
    return found


def wait_for(condition, timeout_s=60):
    end = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.002)
    return found


def children_of(pid):
    """Process ids."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            found += [int(entry.name)] if parent == pid else []
    return found
