"""What a run sets for the whole process is put back when it ends, however it ends."""

import logging
import os
import random
import signal
import sys
import warnings

import numpy as np
import pytest
import timm.layers
import torch
from timm.layers import config as timm_config

import tests.small_models  # noqa: F401 (registers per_image_resnet with timm)
import tlscale
from tests.small_runs import put_small_idx, put_small_idx_with_one_white, small_recipe

# Libraries set these once in a process, on their first use.
_ONCE = ("KMP_", "TORCHINDUCTOR_CACHE_DIR", "WANDB_SERVICE")


def settings():
    """Every setting of the process that a run, or a library for it, could leave changed."""
    torch_state = sys.modules.get("accelerate.state")
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    loggers = {"": logging.getLogger(), **logging.root.manager.loggerDict}
    return {
        "environment": {key: value for key, value in os.environ.items() if not key.startswith(_ONCE)},
        "folder": os.getcwd(),
        "threads": torch.get_num_threads(),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
        ),
        "precision": (torch.get_float32_matmul_precision(), torch.get_default_dtype(), matmul.allow_tf32),
        "cudnn": (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "timm": (
            timm.layers.use_reentrant_ckpt(),
            timm.layers.use_fused_attn(),
            timm_config.is_scriptable(),
            timm_config.is_exportable(),
            timm_config.is_no_jit(),
        ),
        "draws": (random.random(), float(np.random.rand()), float(torch.rand(()))),
        "warnings": [tuple(map(str, each)) for each in warnings.filters],
        "handlers": {name: list(one.handlers) for name, one in loggers.items() if isinstance(one, logging.Logger)},
        "levels": {name: one.level for name, one in loggers.items() if isinstance(one, logging.Logger) and one.level},
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "accelerate": dict(torch_state.PartialState._shared_state) if torch_state else {},
        "hooks": (sys.excepthook, sys.unraisablehook, sys.stdout, sys.stderr),
        "limits": (sys.getrecursionlimit(), sys.getswitchinterval()),
    }


def snapshot():
    """The settings, without moving the generators."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    found = settings()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    return found


def recipe(tmp_path, place, **changes):
    compute = {"threads": 2, "deterministic": True, "gradient_checkpointing": True}
    changes = {"duration": "2 steps", "compute": compute, "track": ["tensorboard"], **changes}
    return small_recipe(tmp_path / "r.yaml", place, **changes)


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """What libraries do on their first use has been done."""
    folder = tmp_path_factory.mktemp("warm")
    tlscale.run(recipe(folder, put_small_idx(folder / "data", train=24, test=8)), folder / "out")


def done(tmp_path):
    tlscale.run(recipe(tmp_path, put_small_idx(tmp_path / "data", train=24, test=8)), tmp_path / "out")


def probed(tmp_path):
    place = put_small_idx(tmp_path / "data", train=24, test=8)
    changes = {"probe": {"kind": "ridge"}, "compute": {"threads": 2, "deterministic": True}}
    tlscale.run(small_recipe(tmp_path / "r.yaml", place, **changes), tmp_path / "out")


def failed(tmp_path):
    place = put_small_idx_with_one_white(tmp_path / "data")
    backbone = {"name": "per_image_resnet", "weights": "none", "in_chans": 1}
    with pytest.raises(tlscale.TlscaleError, match="NaN|finite"):
        tlscale.run(recipe(tmp_path, place, backbone=backbone, duration="2 epochs"), tmp_path / "out")


def refused(tmp_path):
    with pytest.raises(tlscale.TlscaleError, match="processes"):
        tlscale.run(recipe(tmp_path, tmp_path, compute={"threads": 2, "num_processes": 3}), tmp_path / "out")


def stopped(tmp_path):
    made = recipe(tmp_path, put_small_idx(tmp_path / "data", train=24, test=8), duration="2000 steps")
    timer = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGTERM))
    signal.setitimer(signal.ITIMER_REAL, 1.0)
    try:
        with pytest.raises(tlscale.TlscaleError, match="stop"):
            tlscale.run(made, tmp_path / "out")
    finally:
        signal.signal(signal.SIGALRM, timer)


@pytest.mark.parametrize("end", [done, probed, failed, refused, stopped])
def test_a_run_leaves_the_settings_of_the_process_as_they_were(warm, end, tmp_path):
    torch.set_num_threads(1)
    before = snapshot()
    end(tmp_path)
    after = snapshot()
    assert {key: (before[key], after[key]) for key in before if before[key] != after[key]} == {}


def test_the_next_run_has_its_own_settings(warm, tmp_path):
    """Without a word in its recipe it has what the process had, not what the run before it wanted."""
    torch.set_num_threads(1)
    done(tmp_path)
    seen = []
    place = put_small_idx(tmp_path / "data", train=24, test=8)
    made = small_recipe(tmp_path / "r.yaml", place, duration="2 steps", compute={"threads": None})
    torch.nn.modules.module.register_module_forward_pre_hook(
        lambda *_: seen.append((torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()))
    )
    try:
        tlscale.run(made, tmp_path / "second")
    finally:
        torch.nn.modules.module._global_forward_pre_hooks.clear()
    assert set(seen) == {(1, False)}
