"""Runs on an XLA device for real: torch_xla on this CPU, one process. `make test-xla` makes what they need."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.distributed as torch_dist
from accelerate.state import PartialState
from torch import nn

import tlscale.commands.evaluate
from tests.small_runs import (
    REPO,
    as_after,
    assert_same_bits,
    assert_same_runs,
    environment,
    exported,
    largest_difference,
    last_checkpoint,
    lines,
    logged,
    put_small_idx,
    result,
    small_recipe,
    start,
    wait_until,
)
from tlscale.data.loader import ImageStore, eval_batches
from tlscale.data.sources.open import open_data
from tlscale.data.transforms import InputPath
from tlscale.distributed.processes import start_processes
from tlscale.errors import EXIT_STOPPED, LaunchError
from tlscale.recipe.load import load_recipe
from tlscale.recipe.schema import ComputeSection
from tlscale.training.setup import set_up

metrics = pytest.importorskip("torch_xla.debug.metrics", reason="torch_xla is not here: `make test-xla` has it")
if os.environ.get("PJRT_DEVICE") != "CPU":
    pytest.skip("for PJRT_DEVICE=CPU: `make test-xla`", allow_module_level=True)
pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]

RESNET, VIT = {"name": "test_resnet"}, {"name": "test_vit"}
HALF = r"(conv1|bn1|layer[12])\..*"
MAIN = [
    *("track=[]", "batch_size=32", "duration=6 steps", "data.source=idx", "data.fallback=null"),
    *("checkpoint.every=3 steps", "checkpoint.keep=100", "log_every=1 steps"),
]
RUNS = {
    "half a resnet, on codes": {"freeze": HALF, "backbone": RESNET, "codes": {"keep": "always"}},
    "half a resnet, on augmented images": {
        "freeze": HALF,
        "backbone": RESNET,
        "data": {"augment": ["flip", "crop", {"mixup": 0.4}], "workers": 2},
    },
    "averages, dropout, short batches": {
        "backbone": {**VIT, "drop_path_rate": 0.2},
        "optim": {"ema_decay": 0.9},
        "head": [{"linear": 16}, "gelu", {"dropout": 0.3}, "linear"],
        "batch_size": 24,
    },
    "accumulation, clipped": {
        "backbone": RESNET,
        "compute": {"micro_batch_size": 8},
        "optim": {"clip_grad_norm": 0.5},
        "log_every": "3 steps",
    },
    "momentum, class weights": {
        "backbone": RESNET,
        "optim": {"name": "sgd", "lr": 0.05, "options": {"momentum": 0.9}},
        "loss": {"class_weights": "balanced"},
    },
    "bf16": {"backbone": VIT, "compute": {"precision": "bf16"}},
    "stages": {
        "backbone": RESNET,
        "stages": [
            {"freeze": ".*", "duration": "4 steps", "lr": 5e-3},
            {"freeze": HALF, "duration": "4 steps"},
            {"duration": "4 steps", "lr": 5e-4},
        ],
    },
}


class Devices:
    """Within: which devices the head was trained on, and what Accelerate said it was running."""

    def __enter__(self):
        self.seen = set()
        self._handle = torch.nn.modules.module.register_module_forward_hook(self._look)
        return self

    def _look(self, module, _, output):
        if isinstance(module, nn.Linear) and torch.is_grad_enabled() and output.requires_grad:
            kind = PartialState().distributed_type.value
            self.seen.add((kind, module.weight.device.type, output.device.type))

    def __exit__(self, *_):
        self._handle.remove()


def confusion_on_cpu(out):
    """Of the exported model on the run's test images, by torch on the plain CPU."""
    recipe, trained = load_recipe(out / "recipe.yaml"), tlscale.load(out)
    test = open_data(recipe.data, recipe.seed).test
    to_inputs = InputPath(trained.input_spec, torch.float32, torch.device("cpu"), False)
    confusion_CC = np.zeros((len(trained.classes),) * 2, int)
    with torch.no_grad():
        for batch in eval_batches(ImageStore(test, recipe.data, trained.input_spec), 0, 1, 64):
            answers_B = trained.model(*to_inputs(batch)).argmax(1)
            np.add.at(confusion_CC, (batch.labels_B.numpy(), answers_B.numpy()), 1)
    return confusion_CC.tolist()


@pytest.fixture(scope="module")
def main_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("main") / "run"
    data = put_small_idx(out.parent / "data", train=160, test=64)
    recipe = load_recipe(REPO / "recipes" / "resnet_fmnist.yaml", [*MAIN, f"data.path={data}"])
    with Devices() as devices:
        tlscale.run(recipe, out)
    return recipe, out, devices.seen


def test_the_main_recipe_trains_on_xla(main_run):
    _, out, seen = main_run
    assert seen == {("XLA", "xla", "xla")}
    record = json.loads((out / "run.json").read_text())
    assert record["device"].startswith("xla")
    assert record["world_size"] == 1
    losses = [line["loss"] for line in lines(out, "train")]
    assert len(losses) == 6
    assert losses[-1] < losses[0]


def test_the_main_recipe_resumed_ends_in_the_same_bits(main_run, tmp_path):
    recipe, out, _ = main_run
    as_after(3, out, tmp_path / "parts")
    tlscale.run(recipe, tmp_path / "parts", resume=True)
    assert_same_runs(out, tmp_path / "parts")


def test_the_main_recipe_is_evaluated_exactly_and_its_backbone_loads_in_timm(main_run):
    """Its head has layers that timm does not know; `tlscale.load` has them all, and so `confusion_on_cpu`."""
    _, out, _ = main_run
    figures = result(out)
    assert np.sum(figures["confusion"]) == figures["num_images"] == sum(map(sum, confusion_on_cpu(out)))
    assert figures["confusion"] == confusion_on_cpu(out)
    backbone = timm.create_model(f"local-dir:{out / 'model'}", pretrained=True, num_classes=0).eval()
    images_BCHW = torch.randn(2, 1, 48, 48, generator=torch.Generator().manual_seed(0))
    model = tlscale.load(out).model
    with torch.no_grad():
        features_BF = backbone(images_BCHW)
        assert torch.equal(features_BF, model.backbone(images_BCHW))
        assert torch.equal(model.head(features_BF), model(images_BCHW))


@pytest.mark.parametrize("name", RUNS)
def test_resumed_equals_not_interrupted(name, idx, tmp_path):
    changes = {"duration": "12 steps", "checkpoint": {"every": "3 steps", "keep": 100}, **RUNS[name]}
    changes = changes if "stages" not in changes else {k: v for k, v in changes.items() if k != "duration"}
    recipe = small_recipe(tmp_path / "recipe.yaml", idx, **changes)
    with Devices() as devices:
        tlscale.run(recipe, tmp_path / "whole")
    assert devices.seen == {("XLA", "xla", "xla")}
    assert result(tmp_path / "whole")["confusion"] == confusion_on_cpu(tmp_path / "whole")
    for step in (3, 9):
        as_after(step, tmp_path / "whole", tmp_path / f"from{step}")
        tlscale.run(recipe, tmp_path / f"from{step}", resume=True)
        assert_same_runs(tmp_path / "whole", tmp_path / f"from{step}")


def test_stopped_by_a_signal_and_resumed_by_another_process(idx, tmp_path):
    """Where nothing of the first process, such as the state of its random numbers, can help the second."""
    changes = {**RUNS["averages, dropout, short batches"], "duration": "30 steps"}
    tlscale.run(small_recipe(tmp_path / "recipe.yaml", idx, **changes), tmp_path / "whole")
    words = ("run", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "parts"), "--resume")
    process = start(*words, log=tmp_path / "log")
    try:
        wait_until(logged(tmp_path / "parts", 5), process, timeout_s=600)
        process.send_signal(signal.SIGTERM)
        assert process.wait(300) == EXIT_STOPPED, (tmp_path / "log").read_text()
    finally:
        process.kill()
    assert 5 <= int(last_checkpoint(tmp_path / "parts").name[5:]) < 30
    process = start(*words, log=tmp_path / "log")
    try:
        assert process.wait(600) == 0, (tmp_path / "log").read_text()
    finally:
        process.kill()
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")


# --- Static shapes, and nobody waits ----------------------------------------------------------------------------------


def spent(run):
    """What XLA did within: programs compiled and run, and times that the host waited for values."""
    names = ("CompileTime", "ExecuteTime", "TransferFromDeviceTime")
    before = [(metrics.metric_data(name) or (0,))[0] for name in names]
    run()
    return [(metrics.metric_data(name) or (0,))[0] - count for name, count in zip(names, before, strict=True)]


@pytest.mark.parametrize(
    "name", ["half a resnet, on codes", "averages, dropout, short batches", "accumulation, clipped", "bf16"]
)
def test_a_step_is_one_program_that_is_compiled_once_and_that_nobody_waits_for(name, idx, tmp_path):
    rarely = "100 epochs"
    changes = {**RUNS[name], "log_every": rarely, "evaluate": {"every": rarely}, "checkpoint": {"every": rarely}}

    def epochs(number, out):
        recipe = small_recipe(tmp_path / f"{out}.yaml", idx, **{**changes, "duration": f"{number} epochs"})
        found = spent(lambda: tlscale.run(recipe, tmp_path / out))
        print(f"{out}: {number} epochs, {result(tmp_path / out)['steps']} steps, (compiled, run, waited) {found}")
        return found

    epochs(1, "first")
    _, run_in_one, waited_in_one = epochs(1, "again")
    compiled, run_in_four, waited_in_four = epochs(4, "longer")
    assert compiled == 0  # new learning rates, seeds and steps are the same program
    assert run_in_four - run_in_one == result(tmp_path / "longer")["steps"] - result(tmp_path / "again")["steps"]
    assert waited_in_four == waited_in_one


# --- The frozen frontier ----------------------------------------------------------------------------------------------


def test_training_on_codes_ends_near_training_on_images(idx, tmp_path, monkeypatch):
    monkeypatch.setenv("TLSCALE_CACHE", str(tmp_path / "cache"))  # an earlier test has kept the same codes
    for keep in ("always", "never"):
        recipe = small_recipe(
            tmp_path / f"{keep}.yaml", idx, freeze=HALF, backbone=RESNET, codes={"keep": keep}, name="same"
        )
        tlscale.run(recipe, tmp_path / keep)
    assert result(tmp_path / "always")["codes"]["num_computed"] > 0
    assert result(tmp_path / "never")["codes"] is None
    assert largest_difference(exported(tmp_path / "always"), exported(tmp_path / "never")) <= 1e-5
    begun_with = set_up(recipe, world_size=1).classifier.backbone.state_dict()
    frozen = {name for name in begun_with if re.fullmatch(HALF, name)}
    assert any("running_mean" in name for name in frozen)
    ended_with = exported(tmp_path / "never")
    assert_same_bits(*({name: state[name] for name in frozen} for state in (begun_with, ended_with)))


# --- Around the loop --------------------------------------------------------------------------------------------------


def test_evaluate_gives_the_figures_of_the_run_again(main_run):
    _, out, _ = main_run
    again = tlscale.commands.evaluate.evaluate_run(out, as_json=True)
    for key in ("num_images", "top1", "confusion"):
        assert again[key] == result(out)[key], key


def test_the_launcher_runs_it(idx, tmp_path):
    small_recipe(tmp_path / "recipe.yaml", idx, duration="2 steps")
    command = [Path(sys.executable).parent / "accelerate", "launch", "tlscale/run.py", tmp_path / "recipe.yaml"]
    done = subprocess.run(
        [*command, "--out", tmp_path / "run"], cwd=REPO, env=environment(), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["device"].startswith("xla")


def test_torchs_group_is_there_beside_xla(monkeypatch):
    """What several processes would agree by; here it is a group of one."""
    from tlscale.distributed import xla

    with socket.socket() as free:
        free.bind(("localhost", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    xla.join()
    try:
        control = torch_dist.new_group(backend="gloo")
        votes, buffer = torch.tensor([3]), torch.full((2,), 5.0, device="xla")
        torch_dist.all_reduce(votes, group=control)
        torch_dist.broadcast(buffer, src=0)
        assert (torch_dist.get_world_size(), votes.tolist(), buffer.tolist()) == (1, [3], [5.0, 5.0])
    finally:
        torch_dist.destroy_process_group()


@pytest.mark.parametrize("changes", [{"precision": "fp16"}, {"compile": True}, {"gradient_checkpointing": True}])
def test_what_xla_cannot_do_is_refused(changes):
    with pytest.raises(LaunchError, match=next(iter(changes))):
        start_processes(ComputeSection(**changes))
