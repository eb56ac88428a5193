"""What only a GPU can show, largest risk first; each takes some seconds there.

Without one (TLSCALE_GPU_TESTS=cpu) the same jobs run on the CPU, but for those that say why not.
"""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import tlscale
from tests.small_runs import (
    REPO,
    as_after,
    assert_same_bits,
    exported,
    largest_difference,
    last_checkpoint,
    lines,
    put_small_idx,
    result,
    small_recipe,
)
from tlscale.distributed.device import CopyToCpu
from tlscale.errors import TlscaleError

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(100 if HAS_GPU else 280)]
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="a CPU has none of it")
RESNET = {"backbone": {"name": "resnet18", "weights": "none", "in_chans": 1}, "optim": {"lr": 1e-3}}


@pytest.fixture(scope="module")
def idx(tmp_path_factory):
    return put_small_idx(tmp_path_factory.mktemp("idx"))


@pytest.fixture
def job(tmp_path, idx):
    """Runs a small recipe with changes; returns its folder."""
    number = iter(range(100))

    def run(out=None, **changes):
        path = tmp_path / f"{next(number)}"
        recipe = small_recipe(path.with_suffix(".yaml"), idx, **changes)
        tlscale.run(recipe, out or path, resume=out is not None)
        return out or path

    return run


def losses(out) -> np.ndarray:
    return np.array([line["loss"] for line in lines(out, "train")])


def assert_same_losses(first, second, rtol: float = 1e-3) -> None:
    """The first two steps; with batches of 16 small images rounding grows tenfold with each step after."""
    first, second = losses(first), losses(second)
    assert np.allclose(first[:2], second[:2], rtol=rtol)
    assert first.mean() == pytest.approx(second.mean(), rel=0.1)


def command(*args: object, env=None, **options) -> subprocess.Popen:
    """Starts tlscale's command line as a process of its own."""
    own = {**os.environ, "PYTHONPATH": f"{REPO}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", **(env or {})}
    return subprocess.Popen([sys.executable, "-m", "tlscale.cli", *map(str, args)], env=own, cwd=REPO, **options)


# -- the largest risk -------------------------------------------------------------------------------------------------


def test_the_main_recipe(tmp_path):
    short = ["track=[]", "data.fallback=sample"]
    if not HAS_GPU:
        short += ["duration=20 steps", "data.train_limit=600", "data.image_size=32"]
    recipe = tlscale.load_recipe(REPO / "recipes" / "resnet_fmnist.yaml", short)
    figures = tlscale.run(recipe, tmp_path / "run")
    assert figures["top1"] > (0.85 if HAS_GPU else 0.3)
    model = tlscale.load(tmp_path / "run")
    assert len(model.classes) == 10


def test_fp32_has_the_losses_of_the_cpu(job, tmp_path, idx):
    small_recipe(tmp_path / "cpu.yaml", idx, **RESNET)
    on_cpu = command("run", tmp_path / "cpu.yaml", "--out", tmp_path / "cpu", env={"ACCELERATE_USE_CPU": "true"})
    here = job(**RESNET)
    assert on_cpu.wait(90) == 0
    assert_same_losses(here, tmp_path / "cpu")
    assert json.loads((here / "run.json").read_text())["device"].startswith(DEVICE.type)


def test_bf16(job):
    half = job(**RESNET, compute={"precision": "bf16", "channels_last": True})
    full = job(**RESNET)
    assert_same_losses(half, full, rtol=0.03)
    assert all(tensor.dtype != torch.bfloat16 for tensor in exported(half).values())


@needs_gpu
def test_fp16_skips_a_step_that_overflows_and_resumes_in_mid_epoch(job, tmp_path, monkeypatch):
    begins = torch.amp.GradScaler.__init__
    defaults = tuple(2.0**34 if value == 2.0**16 else value for value in begins.__defaults__)
    monkeypatch.setattr(begins, "__defaults__", defaults)  # so large that the first steps overflow
    changes = RESNET | {"compute": {"precision": "fp16", "deterministic": True}}
    changes |= {"checkpoint": {"every": "3 steps", "keep": 9}}
    whole = job(**changes)
    scale = json.loads((last_checkpoint(whole) / "state.json").read_text())["scaler"]["scale"]
    assert scale < 2.0**34, "no step overflowed"
    assert np.isfinite(losses(whole)).all()
    resumed = job(out=as_after(3, whole, tmp_path / "resumed"), **changes)
    assert_same_bits(exported(whole), exported(resumed))


def test_sigterm_and_resume_give_the_same_bits(tmp_path, idx):
    precision = "bf16" if HAS_GPU else "fp32"
    changes = RESNET | {"duration": "24 epochs" if HAS_GPU else "6 epochs"}
    changes |= {"compute": {"deterministic": True, "precision": precision}}
    small_recipe(tmp_path / "r.yaml", idx, **changes)
    whole = command("run", tmp_path / "r.yaml", "--out", tmp_path / "whole")
    stopped = command("run", tmp_path / "r.yaml", "--out", tmp_path / "stopped")
    log = tmp_path / "stopped" / "metrics.jsonl"
    while not (log.exists() and '"step":' in log.read_text()) and stopped.poll() is None:
        time.sleep(0.05)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(60) == 75
    assert command("run", tmp_path / "r.yaml", "--out", tmp_path / "stopped", "--resume").wait(90) == 0
    assert whole.wait(60) == 0
    assert_same_bits(exported(tmp_path / "whole"), exported(tmp_path / "stopped"))


# -- memory -----------------------------------------------------------------------------------------------------------


def test_a_copy_to_the_cpu_waits_for_what_was_computed():
    values = torch.ones(512, 512, device=DEVICE)
    for _ in range(50):
        values = values @ torch.eye(512, device=DEVICE)
    copy = CopyToCpu([values, torch.arange(3)])
    values = values * 0  # comes after the copy
    copied, numbers = copy.wait()
    assert (copied == 1).all()
    assert not copied.is_pinned()
    assert numbers.tolist() == [0, 1, 2]


def test_gradient_checkpointing_with_frozen_parts_changes_nothing(job):
    changes = RESNET | {"freeze": r"(conv1|bn1|layer1)\..*", "codes": {"keep": "never"}}
    plain = job(**changes, compute={"deterministic": True})
    saving = job(**changes, compute={"deterministic": True, "gradient_checkpointing": True})
    assert largest_difference(exported(plain), exported(saving)) < 1e-4


# -- speed ------------------------------------------------------------------------------------------------------------


def test_channels_last(job):
    assert_same_losses(job(**RESNET, compute={"channels_last": True}), job(**RESNET))


def test_compile(job):
    compiled = job(**RESNET, duration="3 steps", compute={"compile": True})
    assert_same_losses(compiled, job(**RESNET, duration="3 steps"), rtol=5e-3)


# -- codes ------------------------------------------------------------------------------------------------------------


def test_a_frozen_partition_equals_the_whole_network(job, monkeypatch, tmp_path):
    monkeypatch.setenv("TLSCALE_CACHE", str(tmp_path / "cache"))
    changes = RESNET | {"freeze": r"(conv1|bn1|layer[123])\..*"}
    cached = job(**changes, codes={"keep": "always"})
    whole = job(**changes, codes={"keep": "never"})
    # A block has 256 images, a batch 16: convolutions may sum in another order.
    assert largest_difference(exported(cached), exported(whole)) < 5e-3
    assert_same_losses(cached, whole)


@needs_gpu
def test_codes_of_a_gpu_are_not_those_of_a_cpu(job, tmp_path, idx, monkeypatch):
    monkeypatch.setenv("TLSCALE_CACHE", str(tmp_path / "cache"))
    changes = RESNET | {"freeze": ".*", "codes": {"keep": "always"}}
    small_recipe(tmp_path / "cpu.yaml", idx, **changes)
    assert (
        command("run", tmp_path / "cpu.yaml", "--out", tmp_path / "cpu", env={"ACCELERATE_USE_CPU": "true"}).wait(90)
        == 0
    )
    assert result(job(**changes))["seconds"]["codes"] > 0
    records = [json.loads(path.read_text()) for path in (tmp_path / "cache").rglob("entry.json")]
    assert len({json.dumps(record.get("key"), sort_keys=True) for record in records}) == 2


# -- evaluation -------------------------------------------------------------------------------------------------------


def test_an_average_of_weights(job):
    out = job(**RESNET, ema={"decay": 0.9})
    assert largest_difference(exported(out), exported(job(**RESNET))) > 0


def test_evaluation_equals_that_of_the_cpu(job):
    out = job(**RESNET)
    done = command("evaluate", out, "--json", env={"ACCELERATE_USE_CPU": "true"}, stdout=subprocess.PIPE, text=True)
    figures = json.loads(done.communicate(timeout=90)[0])
    assert figures["loss"] == pytest.approx(result(out)["loss"], rel=1e-3)


# -- what goes wrong --------------------------------------------------------------------------------------------------

STUCK = """
import timm, torch, tlscale, sys, time
from timm.models import register_model

@register_model
def stuck_resnet(pretrained=False, **kwargs):
    model = timm.create_model("test_resnet", **kwargs)
    calls = iter(range(10**9))
    def sleep(*_):
        if model.training and next(calls) > 3:
            torch.cuda._sleep(10**15) if torch.cuda.is_available() else time.sleep(1e6)
    model.register_forward_pre_hook(sleep)
    return model

from tlscale.cli import main
sys.argv = ["tlscale", "run", *sys.argv[1:]]
main()
"""


def test_a_stuck_step_is_ended_by_the_watchdog(tmp_path, idx):
    changes = {"backbone": {"name": "stuck_resnet"}, "compute": {"hang_timeout_s": 5}}
    (tmp_path / "stuck.py").write_text(STUCK)
    small_recipe(tmp_path / "r.yaml", idx, **{**changes, "backbone": {**RESNET["backbone"], **changes["backbone"]}})
    env = {**os.environ, "PYTHONPATH": f"{REPO}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, tmp_path / "stuck.py", tmp_path / "r.yaml", "--out", tmp_path / "run"],
        env=env,
        cwd=REPO,
        stderr=subprocess.PIPE,
        text=True,
        timeout=90,
    )
    assert done.returncode not in (0, 75)
    assert "Timeout" in done.stderr
    assert time.monotonic() - began < 80


@needs_gpu
def test_out_of_memory_loses_nothing_and_resumes_with_less(job, tmp_path, idx):
    changes = RESNET | {"batch_size": 64, "data": {"image_size": 224}, "checkpoint": {"every": "1 steps"}}
    path = tmp_path / "run"
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, 1.0e9 / total))
    recipe = small_recipe(tmp_path / "r.yaml", idx, **changes)
    try:
        with pytest.raises(TlscaleError) as caught:
            tlscale.run(recipe, path)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    for key in ("micro_batch_size", "gradient_checkpointing", "batch_size"):
        assert key in str(caught.value)
    less = small_recipe(tmp_path / "r.yaml", idx, **changes, compute={"micro_batch_size": 8})
    tlscale.run(less, path, resume=True)
    assert result(path)["steps"] > 0


# -- engines ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_one_process_under_torchrun(tmp_path, idx, engine):
    small_recipe(tmp_path / "r.yaml", idx, compute={"engine": engine})
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "1",
        "--standalone",
        REPO / "tlscale/run.py",
    ]
    env = {**os.environ, "PYTHONPATH": f"{REPO}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    env |= {} if HAS_GPU else {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*launch, tmp_path / "r.yaml", "--out", tmp_path / "run"], env=env, capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["computed"][0]["engine"] == engine
