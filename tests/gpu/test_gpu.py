"""What only a GPU can show, largest risk first; each takes some seconds there.

Without one (TLSCALE_GPU_TESTS=cpu) the same jobs run on the CPU, but for those that say why not.
"""

import functools
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import timm
import torch
import torch.distributed as torch_dist
from torch.distributed.device_mesh import init_device_mesh

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
from tlscale.distributed.fsdp import gather_into, meta_copy, shard
from tlscale.errors import TlscaleError
from tlscale.models.freeze import is_norm

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(100 if HAS_GPU else 280)]
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="a CPU has none of it")
RESNET = {"backbone": {"name": "resnet18", "weights": "none", "in_chans": 1}, "optim": {"lr": 1e-3}}
# For comparisons: AdamW moves a parameter by its whole rate where rounding alone decides the sign of its gradient.
BY_SGD = RESNET | {"optim": {"name": "sgd", "lr": 0.01}}


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


@pytest.fixture
def no_tf32(monkeypatch):
    """Convolutions in all bits of float32: by torch's default a GPU rounds their inputs to 10 bits (TF32)."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def losses(out) -> np.ndarray:
    return np.array([line["loss"] for line in lines(out, "train")])


def checkpoints_of(out) -> dict[str, list[str]]:
    """The files of each checkpoint."""
    return {folder.name: sorted(os.listdir(folder)) for folder in (out / "checkpoints").iterdir() if folder.is_dir()}


def assert_same_losses(first, second, rtol: float = 1e-3, steps: int = 2) -> None:
    """The first steps; with batches of 16 small images rounding grows tenfold with each step after."""
    first, second = losses(first), losses(second)
    assert np.allclose(first[:steps], second[:steps], rtol=rtol)
    assert first.mean() == pytest.approx(second.mean(), rel=0.1)


def command(*args: object, env=None, **options) -> subprocess.Popen:
    """Starts tlscale's command line as a process of its own."""
    own = {**os.environ, "PYTHONPATH": f"{REPO}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", **(env or {})}
    return subprocess.Popen([sys.executable, "-m", "tlscale", *map(str, args)], env=own, cwd=REPO, **options)


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


@pytest.mark.usefixtures("no_tf32")
def test_fp32_has_the_losses_of_the_cpu(job, tmp_path, idx):
    small_recipe(tmp_path / "cpu.yaml", idx, **BY_SGD)
    on_cpu = command("run", tmp_path / "cpu.yaml", "--out", tmp_path / "cpu", env={"ACCELERATE_USE_CPU": "true"})
    here = job(**BY_SGD)
    assert on_cpu.wait(90) == 0
    assert_same_losses(here, tmp_path / "cpu")
    assert json.loads((here / "run.json").read_text())["device"].startswith(DEVICE.type)


def test_bf16(job):
    half = job(**BY_SGD, compute={"precision": "bf16", "channels_last": True})
    full = job(**BY_SGD)
    assert_same_losses(half, full, rtol=0.01, steps=1)
    assert all(tensor.dtype != torch.bfloat16 for tensor in exported(half).values())


@needs_gpu
def test_fp16_skips_a_step_that_overflows_and_resumes_in_mid_epoch(job, tmp_path, monkeypatch):
    begins = torch.amp.GradScaler.__init__
    large = 2.0**26  # the gradient of a logit, 1 in 16 or so, is too large for fp16 then, and again in the next steps
    defaults = tuple(large if value == 2.0**16 else value for value in begins.__defaults__)
    monkeypatch.setattr(begins, "__defaults__", defaults)
    changes = RESNET | {"compute": {"precision": "fp16", "deterministic": True}, "duration": "6 epochs"}
    changes |= {"checkpoint": {"every": "3 steps", "keep": 99}}
    whole = job(**changes)
    scale = json.loads((last_checkpoint(whole) / "state.json").read_text())["scaler"]["scale"]
    assert scale < large, "no step overflowed"
    assert np.isfinite(losses(whole)).all()
    assert losses(whole)[-5:].mean() < losses(whole)[:5].mean(), "all steps overflowed"
    resumed = job(out=as_after(18, whole, tmp_path / "resumed"), **changes)
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
    changes = BY_SGD | {"freeze": r"(conv1|bn1|layer1)\..*", "codes": {"keep": "never"}}
    plain = job(**changes, compute={"deterministic": True})
    saving = job(**changes, compute={"deterministic": True, "gradient_checkpointing": True})
    assert largest_difference(exported(plain), exported(saving)) < 1e-4


# -- speed ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_tf32")
def test_channels_last(job):
    assert_same_losses(job(**BY_SGD, compute={"channels_last": True}), job(**BY_SGD))


# -- codes ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_tf32")
def test_a_frozen_partition_equals_the_whole_network(job, monkeypatch, tmp_path):
    monkeypatch.setenv("TLSCALE_CACHE", str(tmp_path / "cache"))
    changes = BY_SGD | {"freeze": r"(conv1|bn1|layer[123])\..*"}
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
    on_cpu = command("run", tmp_path / "cpu.yaml", "--out", tmp_path / "cpu", env={"ACCELERATE_USE_CPU": "true"})
    assert on_cpu.wait(90) == 0
    computed = [result(out)["codes"]["num_computed"] for out in (tmp_path / "cpu", job(**changes), job(**changes))]
    assert computed[0] == computed[1] > 0
    assert computed[2] == 0, "a GPU does not take its own"


# -- evaluation -------------------------------------------------------------------------------------------------------


def test_an_average_of_weights(job):
    averaged = job(**(RESNET | {"optim": {"lr": 1e-3, "ema_decay": 0.9}}))
    assert largest_difference(exported(averaged), exported(job(**RESNET))) > 0


@pytest.mark.usefixtures("no_tf32")
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
    # Longer than a GPU takes for its first step, in which libraries are loaded and algorithms tried.
    changes = {"backbone": {"name": "stuck_resnet"}, "compute": {"hang_timeout_s": 10}}
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
    assert len(losses(tmp_path / "run")) > 0, "it was ended before the step that hangs"
    assert time.monotonic() - began < 80


@needs_gpu
def test_out_of_memory_loses_nothing_and_resumes_with_less(job, tmp_path, idx):
    changes = RESNET | {"batch_size": 64, "data": {"image_size": 224}, "duration": "2 epochs"}
    changes |= {"checkpoint": {"every": "1 steps", "keep": 9}}
    path = as_after(2, job(**changes), tmp_path / "run")
    before = checkpoints_of(path)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, 1.0e9 / total))
    try:
        with pytest.raises(TlscaleError) as caught:
            job(out=path, **changes)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    for key in ("micro_batch_size", "gradient_checkpointing", "batch_size"):
        assert key in str(caught.value)
    assert checkpoints_of(path) == before
    job(out=path, **changes, compute={"micro_batch_size": 8, "gradient_checkpointing": True})
    starts = json.loads((path / "run.json").read_text())["computed"]
    assert [(start["from_step"], start["micro_batch_size"]) for start in starts] == [(0, 64), (2, 8)]
    assert result(path)["steps"] > 2


# -- engines ----------------------------------------------------------------------------------------------------------


def test_one_process_under_torchrun(tmp_path, idx):
    """On a GPU over NCCL; `compute.engine` other than `auto` is refused with one process."""
    small_recipe(tmp_path / "r.yaml", idx)
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "1", "--standalone", REPO / "tlscale/run.py"]
    env = {**os.environ, "PYTHONPATH": f"{REPO}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    env |= {} if HAS_GPU else {"ACCELERATE_USE_CPU": "true"}
    arguments = [sys.executable, *launch, tmp_path / "r.yaml", "--out", tmp_path / "run"]
    done = subprocess.run(arguments, env=env, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr[-2000:]
    assert np.isfinite(losses(tmp_path / "run")).all()


@pytest.mark.usefixtures("no_tf32")
def test_shards_of_fsdp2_on_one_process_train_as_the_whole_does(tmp_path):
    network = timm.create_model("test_vit", num_classes=3).to(DEVICE).train()
    whole = timm.create_model("test_vit", num_classes=3).to(DEVICE).train()
    whole.load_state_dict(network.state_dict())
    empty = meta_copy(network)
    backend = "nccl" if HAS_GPU else "gloo"
    torch_dist.init_process_group(backend, init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        norms = [param for layer in network.modules() if is_norm(layer) for param in layer.parameters(recurse=False)]
        assert shard(network, network, init_device_mesh(DEVICE.type, (1,)), "fp32", norms) > 1
        for model in (network, whole):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for seed in range(3):
                images = torch.rand(8, 3, 160, 160, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
                torch.nn.functional.cross_entropy(model(images), torch.arange(8, device=DEVICE) % 3).backward()
                optimizer.step()
                optimizer.zero_grad()
        gathered = gather_into(empty, network, keep=True)
    finally:
        torch_dist.destroy_process_group()
    own = {name: param.detach().cpu() for name, param in gathered.named_parameters()}
    assert largest_difference(own, {name: param.detach().cpu() for name, param in whole.named_parameters()}) < 1e-5


# -- what takes longest -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_tf32")
def test_compile(job, monkeypatch):
    if not HAS_GPU:  # all of it but the C++ compiler, which alone takes minutes
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    changes = BY_SGD | {"backbone": {**RESNET["backbone"], "name": "test_resnet"}, "duration": "3 steps"}
    # One image at a time: evaluated in batches of several sizes, it would be compiled for each.
    changes |= {"evaluate": {"batch_size": 1}}
    compiled = job(**changes, compute={"compile": True})
    torch._dynamo.reset()
    assert_same_losses(compiled, job(**changes), rtol=5e-3)
