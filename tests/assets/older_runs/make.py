"""Make what lies beside this file: `PYTHONPATH=REPO python make.py /tmp/older`, with the tlscale of commit 9e77f35.

Not run again with a later one: the files are what that commit left. 13 runs, on 48 small pictures:

- finished: `trained` (codes of a frozen part), `views` (augmented, two views of each image), `probe`, `probe_no_test`
  (fitted again on training and held-out images, with and without a test split), `knn`, `full` (images, all trained);
- stopped with a checkpoint, to be resumed: `ema` (images, augmentation, averages, batch norm), `on_codes`, `staged`,
  `distilled` (of the logits of `trained`), `weighted` (class weights with label smoothing), `decayed` (layer_decay of a
  ConvNeXt), `sharded` (FSDP2, two processes). `ends.json` has the results that they came to when they were resumed.

The codes of all of them are in `cache`: of layers, of a frontier, of views, of a teacher.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

NETWORK = {"name": "older_resnet", "weights": "weights.safetensors", "in_chans": 1}
BASE = {
    "data": {"source": "folder", "path": "photos", "image_size": 32, "validation_fraction": 0.25},
    "backbone": NETWORK,
    "compute": {"threads": 1},
}
KEEP = {"log_every": "1 steps", "checkpoint": {"keep": 1}}
TRAINED = {"duration": "8 steps", "batch_size": 8, "optim": {"lr": 5e-3}, **KEEP}
FROZEN = {"freeze": r"(conv1|bn1|layer1|layer2)\..*", "codes": {"keep": "always"}}
PROBE = {"probe": {"kind": "logistic"}, "codes": {"layer": ["layer3", "penultimate"], "pool": ["avg", "max"]}}
SMALL = r"(?!(head\.norm|stages\.3\.blocks\.0\.(norm|gamma|ls))).*"
FINISHED = {
    "trained": {**TRAINED, **FROZEN},
    "views": {
        **TRAINED,
        "freeze": FROZEN["freeze"],
        "data": {"augment": ["flip", {"crop": 0.5}]},
        "codes": {"keep": "always", "views": 2},
    },
    "full": {**TRAINED, "loss": {"label_smoothing": 0.1}},
    "probe": PROBE,
    "probe_no_test": {**PROBE, "data": {"path": "photos/train"}},
    "knn": {"probe": {"kind": "knn"}},
}
STOPPED = {
    "ema": {
        **TRAINED,
        "data": {"augment": ["flip", {"mixup": 0.4}]},
        "optim": {"lr": 5e-3, "ema_decay": 0.9},
        "evaluate": {"every": "2 steps"},
    },
    "on_codes": {**TRAINED, **FROZEN},
    "staged": {
        "batch_size": 8,
        **KEEP,
        "stages": [{"freeze": ".*", "duration": "3 steps"}, {"duration": "5 steps", "lr": 5e-4}],
    },
    "distilled": {**TRAINED, "distill": {"run": "runs/trained", "codes": 0, "logits": 0.5}},
    "weighted": {**TRAINED, "loss": {"class_weights": "balanced", "label_smoothing": 0.1}},
    "decayed": {
        **TRAINED,
        "backbone": {"name": "test_convnext", "weights": "none", "in_chans": 1},
        "freeze": SMALL,
        "optim": {"lr": 5e-3, "layer_decay": 0.7},
        "codes": {"keep": "never"},
    },
    "sharded": {**TRAINED, "drop_last": True, "compute": {"engine": "fsdp2"}},
}
STOP_AFTER = 5


def merged(base: dict, changes: dict) -> dict:
    both = dict(base)
    for key, value in changes.items():
        both[key] = merged(both[key], value) if isinstance(value, dict) and key in both else value
    if "name" in changes.get("backbone", {}):
        both["backbone"] = changes["backbone"]
    return both


def put_photos(folder: Path) -> None:
    """Three classes of grey pictures of 16 px: a slope, a ring and a chess board, with noise."""
    noise = np.random.default_rng(0)
    rows, columns = np.mgrid[0:16, 0:16]
    patterns = {
        "board": (rows // 4 + columns // 4) % 2 * 120,
        "ring": (np.abs(np.hypot(rows - 8, columns - 8) - 5) < 1.5) * 120,
        "slope": rows * 8,
    }
    for role, counts in (("train", (14, 12, 10)), ("test", (4, 4, 4))):
        for (name, pattern), count in zip(patterns.items(), counts, strict=True):
            (folder / role / name).mkdir(parents=True)
            for number in range(count):
                pixels_HW = np.clip(pattern + noise.integers(0, 130, (16, 16)) // 8 * 8, 0, 255).astype(np.uint8)
                Image.fromarray(pixels_HW).save(folder / role / name / f"{number:02}.png", optimize=True)


def put_weights(path: Path) -> None:
    import safetensors.torch
    import timm
    import torch

    torch.manual_seed(0)
    network = timm.create_model("older_resnet", num_classes=0, in_chans=1).train()
    for _ in range(3):
        network(torch.randn(16, 1, 32, 32))
    safetensors.torch.save_file(network.state_dict(), path)


def run(name: str, changes: dict, *, stop_after: int | None) -> None:
    """`runs/<name>`; stopped by a signal after so many steps."""
    import tlscale
    from tlscale import faults
    from tlscale.errors import Stopped

    recipe = Path("recipes") / f"{name}.yaml"
    if os.environ.get("RANK", "0") == "0":
        recipe.write_text(yaml.safe_dump(merged({"name": name, **BASE}, changes), sort_keys=False))
    plain_at, steps = faults.at, 0

    def at(point: str) -> None:
        nonlocal steps
        plain_at(point)
        steps += point == "step"
        if steps == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    faults.at = at
    try:
        tlscale.run(tlscale.load_recipe(recipe), Path("runs") / name)
        assert stop_after is None, name
    except Stopped as stopped:
        print(stopped)
    finally:
        faults.at = plain_at


def end_of(name: str) -> dict:
    """What a stopped run comes to, on a copy, on one process."""
    import tlscale

    shutil.copytree(Path("runs") / name, Path("ended") / name)
    overrides = ["compute.engine=auto"] if name == "sharded" else []
    return tlscale.run(tlscale.load_recipe(f"recipes/{name}.yaml", overrides), Path("ended") / name, resume=True)


def make(folder: Path) -> None:
    from tests.older_runs import put_times

    for part in ("recipes", "runs"):
        (folder / part).mkdir(parents=True)
    os.chdir(folder)
    put_photos(Path("photos"))
    put_times(Path("photos"))
    put_weights(Path("weights.safetensors"))
    for name, changes in FINISHED.items():
        run(name, changes, stop_after=None)
    for name, changes in STOPPED.items():
        if name != "sharded":
            run(name, changes, stop_after=STOP_AFTER)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torchrun = Path(sys.executable).with_name("torchrun")
    words = ["--standalone", "--nproc-per-node", "2", __file__, "sharded"]
    subprocess.run([torchrun, *words], check=False)  # which calls a stop a failure
    assert Path("runs/sharded/STOPPED").exists()
    figures = ("top1", "loss", "steps", "num_images", "split", "confusion")
    shutil.copytree("cache", "cache_before")  # what the resumed copies use is not what they left
    ends = {name: {key: value for key, value in end_of(name).items() if key in figures} for name in STOPPED}
    Path("ends.json").write_text(json.dumps(ends, indent=1) + "\n")
    for left in ("ended", "cache"):
        shutil.rmtree(left)
    Path("cache_before").rename("cache")
    for lock in list(Path().rglob("*.lock")):
        lock.unlink()


if __name__ == "__main__":
    import tests.older_runs  # noqa: F401 (makes older_resnet known to timm)

    if sys.argv[1] == "sharded":
        run("sharded", STOPPED["sharded"], stop_after=STOP_AFTER)
    else:
        os.environ["TLSCALE_CACHE"] = str(Path(sys.argv[1]).absolute() / "cache")
        make(Path(sys.argv[1]))
