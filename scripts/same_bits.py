"""Run the same small recipes with two versions of tlscale, and compare what they end in, bit by bit.

    python scripts/same_bits.py OLD NEW [--only NAME,NAME]

OLD and NEW are commits of this repository or folders that hold a checkout. For each, one process runs 13 recipes of a
few steps on 48 small pictures (`tests/assets/older_runs/photos`), the last of them stopped half way and resumed.
Equal must be: weights, the optimizer's tensors and the averages of the last checkpoint, the exported model, the
predictions, the figures in `result.json`, and what `metrics.jsonl` logged, all but seconds and rates. A key that only
one version writes is listed; it is a difference where it holds a tensor, or a figure that NEW has no more. Both
versions run on this machine, one after the other, on one thread: other kinds of CPU round differently.

Exit codes: 0 all equal, 1 something differs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from safetensors import safe_open

REPO = Path(__file__).resolve().parents[1]
PHOTOS = REPO / "tests" / "assets" / "older_runs" / "photos"

RESNET = {"name": "test_resnet", "weights": "none", "in_chans": 1}
BASE = {
    "data": {"source": "folder", "path": "photos", "image_size": 32, "validation_fraction": 0.25},
    "backbone": RESNET,
    "compute": {"threads": 1},
}
TRAINED = {"duration": "8 steps", "batch_size": 8, "optim": {"lr": 5e-3}, "log_every": "1 steps"}
FROZEN = {"freeze": r"(conv1|bn1|layer[12])\..*"}
RECIPES: dict[str, dict[str, Any]] = {
    "plain": {**TRAINED, "loss": {"label_smoothing": 0.1}},
    "frozen": {**TRAINED, **FROZEN, "codes": {"keep": "never"}},
    "cached": {**TRAINED, **FROZEN, "codes": {"keep": "always"}},
    "views": {
        **TRAINED,
        **FROZEN,
        "data": {"augment": ["flip", {"crop": 0.5}]},
        "codes": {"keep": "always", "views": 2},
    },
    "stages": {
        "batch_size": 8,
        "log_every": "1 steps",
        "stages": [{"freeze": ".*", "duration": "3 steps"}, {"duration": "5 steps", "lr": 5e-4}],
    },
    "probe": {"probe": {"kind": "logistic"}, "codes": {"layer": ["layer3", "penultimate"], "pool": ["avg", "max"]}},
    "knn": {"probe": {"kind": "knn"}},
    "distilled": {**TRAINED, "distill": {"run": "runs/plain", "codes": 0, "logits": 0.5}},
    "ema_mixup": {
        **TRAINED,
        "data": {"augment": ["flip", {"mixup": 0.4}]},
        "optim": {"lr": 5e-3, "ema_decay": 0.9},
        "evaluate": {"every": "2 steps"},
    },
    "accumulated": {
        **TRAINED,
        "drop_last": True,
        "compute": {"micro_batch_size": 2},
        "optim": {"lr": 5e-3, "clip_grad_norm": 0.5},
    },
    "layer_decay": {
        **TRAINED,
        "backbone": {"name": "test_vit", "weights": "none", "in_chans": 1},
        "optim": {"lr": 5e-3, "layer_decay": 0.7},
    },
    "classic": {
        **TRAINED,
        "backbone": {"name": "lenet5", "weights": "none", "in_chans": 1},
        "head": [{"linear": 16}, "relu", {"dropout": 0.2}, "linear"],
    },
    "resumed": {**TRAINED, "data": {"augment": ["flip"]}, "checkpoint": {"every": "1 steps", "keep": 1}},
}

# What each version runs: its public interface, the command line and the fault points, which outlive any layout.
DRIVER = """
import json, os, signal, sys
from pathlib import Path

import tlscale
from tlscale.cli import main
from tlscale.errors import Stopped

try:
    from tlscale.storage import faults
except ImportError:  # where it was until 29 November 2026
    from tlscale import faults

assert Path(tlscale.__file__).is_relative_to(sys.argv[1]), tlscale.__file__
for name in json.loads(sys.argv[2]):
    if name != "resumed":
        tlscale.run(tlscale.load_recipe(f"{name}.yaml", []), Path("runs") / name)
        continue
    plain_at, steps = faults.at, []

    def at(point):
        plain_at(point)
        if point == "step":
            steps.append(point)
            if len(steps) == 5:
                os.kill(os.getpid(), signal.SIGTERM)

    faults.at = at
    try:
        tlscale.run(tlscale.load_recipe(f"{name}.yaml", []), Path("runs") / name)
        raise SystemExit("the run was not stopped")
    except Stopped:
        faults.at = plain_at
    try:
        main(["run", f"{name}.yaml", "--out", f"runs/{name}", "--resume"])
    except SystemExit as end:
        assert not end.code, end.code
"""

# Keys whose values are seconds, rates, versions or places, wherever they stand; and how scores were computed, which
# older versions did not write: the scores are compared.
VOLATILE = re.compile(r".*(_s|_per_s|seconds|version|versions|commit|date|started|path)|computed_scores")


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of `base` with nested `changes`; a backbone is replaced whole."""
    both = dict(base)
    for key, value in changes.items():
        nested = isinstance(value, dict) and key in both and key != "backbone"
        both[key] = merged(both[key], value) if nested else value
    return both


@contextlib.contextmanager
def checkout(version: str) -> Iterator[Path]:
    """Yield a folder that holds `version`: itself where it is a folder, else a temporary worktree of that commit."""
    if Path(version).is_dir():
        yield Path(version).resolve()
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve() / "checkout"
        git = ["git", "-C", str(REPO), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(folder), version], check=True)
        try:
            yield folder
        finally:
            subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def run_all(version: str, names: list[str], work: Path) -> None:
    """Run the recipes `names` with `version` in the folder `work`, which gets `runs/NAME`."""
    work.mkdir(parents=True)
    (work / "photos").symlink_to(PHOTOS)
    for name in names:
        (work / f"{name}.yaml").write_text(json.dumps(merged({"name": name, **BASE}, RECIPES[name])))  # JSON is YAML
    with checkout(version) as source:
        environment = {
            **os.environ,
            "PYTHONPATH": str(source),
            "PYTHONDONTWRITEBYTECODE": "1",
            "TLSCALE_CACHE": str(work / "cache"),
            "OMP_NUM_THREADS": "1",
            "WANDB_MODE": "disabled",
        }
        command = [sys.executable, "-c", DRIVER, str(source), json.dumps(names)]
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{version}: a run failed\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value of nested JSON with the path to it, all but volatile keys."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not VOLATILE.fullmatch(str(key)):
                yield from leaves(inner, f"{name}.{key}")
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from leaves(inner, f"{name}[{number}]")
    else:
        yield name, value


def contents(run: Path) -> dict[str, Any]:
    """Return everything of a run folder that must be equal, by a name for it."""
    found: dict[str, Any] = {}
    tensors = [("model", run / "model")]
    if (latest := run / "checkpoints" / "LATEST").exists():
        tensors.append(("checkpoint", run / "checkpoints" / latest.read_text().strip()))
    for where, folder in tensors:
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "np") as file:
                found |= {f"{where}/{path.stem}: {name}": file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    table = pq.read_table(run / "predictions.parquet")
    found |= {f"predictions: {name}": table.column(name).to_pylist() for name in table.column_names}
    found |= {f"result.json: {name}": value for name, value in leaves(json.loads((run / "result.json").read_text()))}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found |= {f"metrics.jsonl: {name}": value for name, value in leaves(lines)}
    return found


def equal(one: Any, other: Any) -> bool:
    """Compare to the last bit; NaN equals NaN."""
    if isinstance(one, np.ndarray):
        same_kind = isinstance(other, np.ndarray) and one.dtype == other.dtype and one.shape == other.shape
        return same_kind and one.tobytes() == other.tobytes()
    return bool(one == other or (one != one and other != other))


def compare(old: Path, new: Path) -> list[str]:
    """Return what differs between two run folders, a line each; what NEW tells besides, only as a note."""
    one, other = contents(old), contents(new)
    assert any(isinstance(value, np.ndarray) for value in one.values()), f"{old} holds no weights"
    lines = [f"differs: {name}" for name in one if name in other and not equal(one[name], other[name])]
    for name in sorted(one.keys() ^ other.keys()):
        value, side = (one[name], "OLD") if name in one else (other[name], "NEW")
        is_figure = isinstance(value, float | int) and not isinstance(value, bool)
        is_lost = isinstance(value, np.ndarray) or (is_figure and side == "OLD")
        lines.append(f"{'differs' if is_lost else 'note'}: {name} only in {side}")
    return lines


def main() -> int:
    """Run both versions, print a line for each run, and return 1 where any differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", metavar="OLD")
    parser.add_argument("new", metavar="NEW")
    parser.add_argument("--only", help="recipes, by commas; a distilled run needs plain as well")
    args = parser.parse_args()
    names = args.only.split(",") if args.only else list(RECIPES)
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        works = {side: Path(temporary) / side for side in ("old", "new")}
        for side, work in works.items():
            run_all(getattr(args, side), names, work)
        for name in names:
            lines = compare(works["old"] / "runs" / name, works["new"] / "runs" / name)
            differs = [line for line in lines if line.startswith("differs")]
            failed += bool(differs)
            print(f"{name:14} {'DIFFERS' if differs else 'equal'}")
            for line in sorted(lines)[:20]:
                print(f"    {line}")
    print(f"{len(names) - failed} of {len(names)} equal")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
