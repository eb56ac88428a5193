"""Runs that take a second: real images in small data sets, timm's tiny networks, and what such a run left behind."""

import functools
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import yaml
from PIL import Image

from tests.recipes.wrong_data import put_idx
from tlscale.data.decode import decode_image
from tlscale.data.sources.fashion_mnist import CLASSES, read_sample
from tlscale.models.unknown import UNKNOWN_FILE
from tlscale.recipe.load import load_recipe
from tlscale.recipe.schema import Recipe
from tlscale.tracking.metrics_log import read_metrics

REPO = Path(__file__).parent.parent
TIMES = ("time_s", "images_per_s")


@functools.cache
def sample_images(role: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` images of the shipped sample, (N, 28, 28) uint8, and their labels (N,)."""
    split = read_sample().splits[role]
    rows = range(0, len(split.label_ids_N), len(split.label_ids_N) // count)[:count]  # they are sorted by class
    images = [decode_image(split.store.read(row), in_chans=1, max_pixels=10**6, where=str(row))[..., 0] for row in rows]
    return np.stack(images), split.label_ids_N[list(rows)]


def put_small_idx(folder: Path, train: int = 96, test: int = 37) -> Path:
    """A data set of real images as plain IDX files."""
    folder.mkdir(parents=True, exist_ok=True)
    for role, count in (("train", train), ("test", test)):
        images_NHW, labels_N = sample_images(role, count)
        put_idx(folder, f"{role}-images-idx3-ubyte", images_NHW)
        put_idx(folder, f"{role}-labels-idx1-ubyte", labels_N)
    return folder


def put_small_idx_with_one_white(folder: Path, row: int = 71) -> Path:
    """The same, one training image all white; augmentation leaves it so."""
    path = put_small_idx(folder) / "train-images-idx3-ubyte"
    content = bytearray(path.read_bytes())
    assert struct.unpack(">III", content[4:16]) == (96, 28, 28)
    content[16 + row * 784 : 16 + (row + 1) * 784] = b"\xff" * 784
    path.write_bytes(content)
    return folder


def put_small_folder(folder: Path, train: int = 60, test: int = 20) -> Path:
    """A data set of real images as PNG files, a folder per class."""
    for role, count in (("train", train), ("test", test)):
        images_NHW, labels_N = sample_images(role, count)
        for row, (image_HW, label) in enumerate(zip(images_NHW, labels_N, strict=True)):
            name = CLASSES[label].replace("/", "-")
            (folder / role / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image_HW).save(folder / role / name / f"{row:04}.png")
    return folder


def put_teacher(path: Path, name: str = "test_resnet", in_chans: int = 3) -> Path:
    """Weights of a small network, by seed, with batch statistics of real images."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = timm.create_model(name, num_classes=0, in_chans=in_chans).train()
        images_NHW, _ = sample_images("train", 96)
        pixels = torch.from_numpy(images_NHW).float()[:, None].expand(-1, in_chans, -1, -1) / 128 - 1
        for _ in range(5):
            network(torch.nn.functional.interpolate(pixels, size=48))
    safetensors.torch.save_file(network.state_dict(), path)
    return path


def _merged(base: dict, changes: dict) -> dict:
    merged = dict(base)
    for key, value in changes.items():
        merged[key] = _merged(merged[key], value) if isinstance(value, dict) and key in merged else value
    return merged


def small_recipe(path: Path, place: Path, **changes) -> Recipe:
    """Writes a recipe to `path` and loads it: test_vit (no batch statistics), 5 steps an epoch, a log line a step."""
    base = {
        "name": "small",
        "data": {"source": "idx", "path": str(place), "image_size": 32, "validation_fraction": 0.2},
        "backbone": {"name": "test_vit", "weights": "none", "in_chans": 1},
        "duration": "2 epochs",
        "batch_size": 16,
        "optim": {"lr": 2e-3},
        "log_every": "1 steps",
        "compute": {"threads": 1},
    }
    # What has no effect beside these is an error.
    idle = ("duration", "batch_size", "optim", "log_every") if "probe" in changes else ()
    if "stages" in changes:
        idle = ("duration", *(["optim"] if all("lr" in stage for stage in changes["stages"]) else []))
    base = {key: value for key, value in base.items() if key not in idle}
    path.write_text(yaml.safe_dump(_merged(base, changes), sort_keys=False))
    return load_recipe(path)


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(path)


def exported(out: Path) -> dict[str, torch.Tensor]:
    """The tensors of an exported network, its head included; not what tells unknown images."""
    files = [file for file in sorted((out / "model").glob("*.safetensors")) if file.name != UNKNOWN_FILE]
    return {name: tensor for file in files for name, tensor in tensors(file).items()}


def assert_same_bits(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if first[name].dtype != second[name].dtype] == []
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def largest_difference(first: dict, second: dict) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name].double() - second[name].double()).abs().max()) for name in first)


def lines(out: Path, kind: str | None = None) -> list[dict]:
    """The lines of metrics.jsonl without times."""
    records = [record for record in read_metrics(out / "metrics.jsonl") if kind in (None, record["kind"])]
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


def last_checkpoint(out: Path) -> Path:
    return out / "checkpoints" / (out / "checkpoints" / "LATEST").read_text().strip()


def result(out: Path) -> dict:
    return json.loads((out / "result.json").read_text())


def as_after(step: int, whole: Path, out: Path) -> Path:
    """A copy of a complete run as it was after the checkpoint of `step`."""
    shutil.copytree(whole, out)
    shutil.rmtree(out / "model")
    (out / "result.json").unlink()
    (out / "predictions.parquet").unlink(missing_ok=True)
    for folder in (out / "checkpoints").glob("step_*"):
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)
    return out


def assert_same_evaluation(first: Path, second: Path) -> None:
    """Every count of the 37 test images, and what follows from counts."""
    for key in ("num_images", "confusion", "per_class", "top1", "top5"):
        assert result(first)[key] == result(second)[key], key
    assert result(first)["num_images"] == 37


def assert_same_runs(first: Path, second: Path) -> None:
    """Bit for bit: the exported model, the last checkpoint and the log."""
    assert_same_bits(exported(first), exported(second))
    ends = last_checkpoint(first), last_checkpoint(second)
    assert ends[0].name == ends[1].name
    for file in sorted(path.name for path in ends[0].glob("*.safetensors")):
        assert_same_bits(tensors(ends[0] / file), tensors(ends[1] / file))
    assert lines(first) == lines(second)
    same = ("top1", "loss", "ece", "best", "last", "confusion", "steps", "images_seen")
    assert {key: result(first)[key] for key in same} == {key: result(second)[key] for key in same}


class When:
    """A context in which `act` is called once, from a thread, as soon as `condition` holds."""

    def __init__(self, condition, act) -> None:
        self._condition, self._act, self._over = condition, act, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.acted = False

    def _watch(self) -> None:
        while not self._over.is_set():
            if self._condition():
                self.acted = True
                self._act()
                return
            time.sleep(0.0005)

    def __enter__(self) -> "When":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        self._thread.join()


def logged(out: Path, step: int, kind: str = "train"):
    """A condition: the log has a line of this kind and step."""
    wanted = f'"kind": "{kind}", "step": {step},'

    def condition() -> bool:
        try:
            return wanted in (out / "metrics.jsonl").read_text()
        except FileNotFoundError:
            return False

    return condition


def wait_until(condition, process: subprocess.Popen, timeout_s: float = 90) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, f"ended early with {process.returncode}"
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.002)


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), **changes}


def start(*words: str, log: Path, **changes: str) -> subprocess.Popen:
    """`tlscale words...` as a process of its own, its output in the file `log`."""
    with log.open("w") as file:
        command = [sys.executable, "-m", "tlscale", *words]
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment(**changes), cwd=REPO)


def run_once(folder: Path, data: Path, name: str, changes: dict) -> Path:
    """Run a recipe on a folder of images where that was not done before; its run folder."""
    import tlscale

    out = folder / name.replace(" ", "_")
    if not out.exists():
        changes = {**changes, "data": {"source": "folder", **changes.get("data", {})}}
        tlscale.run(small_recipe(folder / f"{out.name}.yaml", data, **changes), out)
    return out


def runs_once(kinds: dict[str, dict]):
    """A fixture: a function that runs a kind once, on the fixture `data`, and returns its folder."""

    @pytest.fixture(scope="module")
    def trained(data, tmp_path_factory):
        folder = tmp_path_factory.mktemp("runs")
        return lambda name: run_once(folder, data, name, kinds[name])

    return trained
