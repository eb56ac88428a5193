"""A run that is stopped anywhere and resumed ends as one that was not, bit for bit; and says what it did."""

import json
import os
import random
import shutil
import signal
import time

import pytest
import torch

import tlscale
from tests.chaos.killing import wait_for
from tests.small_runs import (
    When,
    assert_same_bits,
    assert_same_runs,
    exported,
    lines,
    logged,
    result,
    small_recipe,
    start,
)
from tlscale.distributed import signals
from tlscale.distributed.host import num_cores
from tlscale.errors import EXIT_BAD_INPUT, EXIT_STOPPED, CheckpointError, Stopped, TlscaleError

RESNET = {"name": "test_resnet"}
PLAIN = {"checkpoint": {"every": "5 steps"}}
MATRIX = {
    "plain": PLAIN,
    "averages, dropout, augmentation": {
        "optim": {"ema_decay": 0.95},
        "backbone": {"drop_rate": 0.1, "drop_path_rate": 0.2},
        "head": [{"linear": 16}, "gelu", {"dropout": 0.3}, "linear"],
        "data": {"augment": ["flip", "crop", {"mixup": 0.4}], "workers": 0},
    },
    "accumulation": {"compute": {"micro_batch_size": 4}, "backbone": {"drop_path_rate": 0.2}, "log_every": "3 steps"},
    "momentum": {"optim": {"name": "sgd", "lr": 0.05, "options": {"momentum": 0.9}}, "backbone": RESNET},
    "half frozen, workers": {
        "backbone": RESNET,
        "freeze": r"(conv1|bn1|layer[12])\..*",
        "data": {"augment": ["flip", "cutmix"], "workers": 2},
        "optim": {"clip_grad_norm": 1.0},
    },
    "bf16": {"compute": {"precision": "bf16"}, "loss": {"class_weights": "balanced"}},
}
STEPS = 20  # four epochs of five
SLOW_STEPS = 60  # long enough to be hit from another process
# In processes of their own, the first one a whole program, the others forks: name -> (changes, signals)
OUTSIDE = {
    "plain": (PLAIN, [signal.SIGTERM]),
    "averages": (MATRIX["averages, dropout, augmentation"], [signal.SIGTERM]),
    "workers": (MATRIX["half frozen, workers"], [signal.SIGTERM]),
    "killed": ({"checkpoint": {"every": "7 steps"}}, [signal.SIGKILL]),
    "ctrl-c": ({}, [signal.SIGINT]),
    "ctrl-c twice": ({"checkpoint": {"every": "10 epochs"}}, [signal.SIGINT, signal.SIGINT]),
}


def stop_at(out, step, number=signal.SIGTERM):
    """Within: this process gets a signal when the log has a line of `step`."""
    return When(logged(out, step), lambda: os.kill(os.getpid(), number))


@pytest.mark.parametrize("name", MATRIX)
def test_stopped_and_resumed_equals_not_stopped(name, idx, tmp_path):
    changes = {"duration": f"{STEPS} steps", **MATRIX[name]}
    recipe = small_recipe(tmp_path / "recipe.yaml", idx, **changes)
    tlscale.run(recipe, tmp_path / "whole")
    every = {"3 steps": 3}.get(changes.get("log_every"), 1)
    stops = [every * random.randint(1, 5 // every), every * random.randint(9 // every, 12 // every)]
    print(f"{stops=}")
    for step in stops:
        with pytest.raises(Stopped) as caught, stop_at(tmp_path / "parts", step) as when:
            tlscale.run(recipe, tmp_path / "parts", resume=True)
        assert when.acted
        assert caught.value.exit_code == EXIT_STOPPED
        assert "stopped by SIGTERM after step" in str(caught.value)
        assert "resume=True resumes it" in str(caught.value)
        assert not (tmp_path / "parts" / "result.json").exists()
    tlscale.run(recipe, tmp_path / "parts", resume=True)
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")


def test_a_file_stops_a_run_as_a_signal_does(idx, tmp_path):
    recipe = small_recipe(tmp_path / "recipe.yaml", idx, duration=f"{STEPS} steps")
    out = tmp_path / "run"
    with pytest.raises(Stopped, match="stopped by the file") as caught, When(logged(out, 5), (out / "STOP").touch):
        tlscale.run(recipe, out)
    assert not (out / "STOP").exists()
    said = json.loads((out / "STOPPED").read_text())
    assert said.pop("spent_s")["train"] > 0
    assert said["message"].replace("--resume", "resume=True") == str(caught.value)
    assert said["by"] == f"the file '{out / 'STOP'}'"
    (out / "STOP").touch()  # nobody was there to obey it
    tlscale.run(recipe, out, resume=True)
    assert not (out / "STOP").exists()
    assert not (out / "STOPPED").exists()
    tlscale.run(recipe, tmp_path / "whole")
    assert_same_runs(tmp_path / "whole", out)


def test_a_restart_by_torchrun_does_not_undo_a_stop(idx, tmp_path, monkeypatch):
    recipe = small_recipe(tmp_path / "recipe.yaml", idx, duration=f"{STEPS} steps")
    out = tmp_path / "run"
    with pytest.raises(Stopped), When(logged(out, 5), (out / "STOP").touch):
        tlscale.run(recipe, out)
    before = (out / "metrics.jsonl").read_bytes()
    with monkeypatch.context() as restarted:
        restarted.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        with pytest.raises(Stopped, match="only torchrun's restart"):
            tlscale.run(recipe, out, resume=True)
    assert (out / "STOPPED").exists()
    assert (out / "metrics.jsonl").read_bytes() == before
    tlscale.run(recipe, out, resume=True)
    assert result(out)["steps"] == STEPS


def test_a_file_stops_the_computation_of_codes(idx, tmp_path, monkeypatch):
    """Before anything is written: the folder holds the word that it stopped, and the same line begins the run."""
    # These few codes may be there before the file is looked for again.
    monkeypatch.setattr(signals, "_LOOK_EVERY_S", 0.0)
    recipe = small_recipe(tmp_path / "recipe.yaml", idx, freeze=".*", codes={"keep": "always"}, seed=77)
    out = tmp_path / "run"
    out.mkdir()

    def held():
        return (out / ".lock").exists() and not (out / "STOP").exists()

    # Touched again and again: one that is there before the start is removed.
    with pytest.raises(Stopped), When(lambda: held() and not (out / "STOP").touch() and False, lambda: None):
        tlscale.run(recipe, out)
    assert (out / "STOPPED").exists()
    assert not (out / "run.json").exists()
    (out / "STOP").unlink(missing_ok=True)
    tlscale.run(recipe, out)
    assert result(out)["steps"] == 10


def test_a_signal_during_evaluation_is_obeyed_in_it_and_the_resumed_run_makes_up_for_it(idx, tmp_path):
    # One image at a time makes the evaluation long: the line of step 5 is written before it, the signal comes in it.
    changes = {"evaluate": {"batch_size": 1, "every": "5 steps"}, "duration": f"{STEPS} steps"}
    recipe = small_recipe(tmp_path / "recipe.yaml", idx, **changes, **{"data": {"validation_fraction": 0.5}})
    with pytest.raises(Stopped, match="after step 5 of"), stop_at(tmp_path / "parts", 5):
        tlscale.run(recipe, tmp_path / "parts")
    assert lines(tmp_path / "parts", "evaluate") == []
    tlscale.run(recipe, tmp_path / "parts", resume=True)
    tlscale.run(recipe, tmp_path / "whole")
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")


def test_a_signal_during_a_checkpoint_leaves_a_whole_one(idx, tmp_path):
    out = tmp_path / "run"
    recipe = small_recipe(tmp_path / "recipe.yaml", idx, duration=f"{STEPS} steps", checkpoint={"every": "4 steps"})

    def writing():
        return any((out / "checkpoints").glob(".step_*"))

    with pytest.raises(Stopped) as caught, When(writing, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        tlscale.run(recipe, out)
    assert "after step 5 of" in str(caught.value) or "after step 6 of" in str(caught.value)
    assert not writing()
    tlscale.run(recipe, out, resume=True)
    tlscale.run(recipe, tmp_path / "whole")
    assert_same_runs(tmp_path / "whole", out)


def test_a_signal_at_the_last_step_leaves_the_evaluation_to_the_resumed_run(idx, tmp_path):
    recipe = small_recipe(tmp_path / "recipe.yaml", idx, duration="5 steps", evaluate={"batch_size": 1})
    with pytest.raises(Stopped, match="after step 5 of 5"), stop_at(tmp_path / "run", 5):
        tlscale.run(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "result.json").exists()
    tlscale.run(recipe, tmp_path / "run", resume=True)
    tlscale.run(recipe, tmp_path / "whole")
    assert_same_runs(tmp_path / "whole", tmp_path / "run")


@pytest.mark.skipif(num_cores() < 2, reason="a machine of one core has no other number of threads")
def test_a_resumed_run_computes_with_as_many_threads_as_it_began_with(idx, tmp_path, capsys):
    changes = {"duration": f"{STEPS} steps", "compute": {"threads": None}}
    recipe, before = small_recipe(tmp_path / "recipe.yaml", idx, **changes), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(Stopped), stop_at(tmp_path / "run", 3):
            tlscale.run(recipe, tmp_path / "run")
        torch.set_num_threads(1)
        tlscale.run(recipe, tmp_path / "run", resume=True)
        assert "2 CPU threads a process, as the run began" in capsys.readouterr().out
        assert torch.get_num_threads() == 1, "what comes after in this process has its own"
    finally:
        torch.set_num_threads(before)


# --- Signals from outside, to processes of their own ------------------------------------------------------------------


@pytest.fixture(scope="module")
def outside(forks, idx, tmp_path_factory):
    """Starts the runs of OUTSIDE, sends each its signals; name -> (folder, exit code, output)."""
    folder = tmp_path_factory.mktemp("outside")
    return {name: interrupted(forks, idx, folder / name.replace(" ", "_"), name) for name in OUTSIDE}


def interrupted(forks, idx, place, name):
    place.mkdir()
    changes, signals = OUTSIDE[name]
    small_recipe(place / "recipe.yaml", idx, **{"duration": f"{SLOW_STEPS} steps", **changes})
    words = ("run", str(place / "recipe.yaml"), "--out", str(place / "parts"), "--resume")
    program = start(*words, log=place / "log") if name == "plain" else None
    pid = program.pid if program is not None else forks.start(*words, log=place / "log")
    step = random.randint(8, 20)
    print(f"{name}: signal after step {step}")
    wait_for(logged(place / "parts", step), timeout_s=90)
    for number in signals:
        os.kill(pid, number)
        time.sleep(0.0005)
    exit_code = program.wait(60) if program is not None else forks.wait(pid, timeout_s=60)
    return place, exit_code, (place / "log").read_text()


def whole_and_resumed(place, idx, name):
    recipe = small_recipe(place / "recipe.yaml", idx, **{"duration": f"{SLOW_STEPS} steps", **OUTSIDE[name][0]})
    if not (place / "whole").exists():
        tlscale.run(recipe, place / "whole")
    tlscale.run(recipe, place / "parts", resume=True)
    return place / "whole", place / "parts"


@pytest.mark.parametrize("name", ["plain", "averages", "workers", "ctrl-c"])
def test_a_signal_from_outside(outside, idx, name):
    place, exit_code, output = outside[name]
    assert exit_code == EXIT_STOPPED, output
    by = "SIGINT" if name == "ctrl-c" else "SIGTERM"
    last = next(line for line in output.splitlines() if line.startswith("tlscale: "))
    assert f"stopped by {by} after step" in last
    assert "The same line with --resume resumes it." in last
    assert "Traceback" not in output
    step = int(last.split("after step ")[1].split()[0])
    assert step < SLOW_STEPS
    assert (place / "parts" / "checkpoints" / "LATEST").read_text().strip() == f"step_{step:08}"
    assert_same_runs(*whole_and_resumed(place, idx, name))


def test_a_kill_loses_only_what_came_after_the_last_checkpoint(outside, idx, capsys):
    place, exit_code, _ = outside["killed"]
    assert exit_code == -signal.SIGKILL
    seen = max(record["step"] for record in lines(place / "parts"))
    whole, parts = whole_and_resumed(place, idx, "killed")
    output = " ".join(capsys.readouterr().out.split())
    step = int(output.split("resumed from")[1].split("at step ")[1].split()[0])
    assert seen - 7 <= step <= seen + 1
    assert_same_runs(whole, parts)


def test_a_second_ctrl_c_ends_at_once_and_loses_nothing_before(outside, idx):
    place, exit_code, output = outside["ctrl-c twice"]
    # The second may come when the first was obeyed already.
    assert exit_code in (1, EXIT_STOPPED, -signal.SIGINT), output
    assert_same_runs(*whole_and_resumed(place, idx, "ctrl-c twice"))


# --- What may change, and what may not --------------------------------------------------------------------------------


@pytest.fixture
def stopped(idx, tmp_path):
    """A run of its own data that was stopped: (recipe's changes, its data, its folder)."""
    data = shutil.copytree(idx, tmp_path / "data")
    changes = {"duration": "10 steps", "checkpoint": {"every": "2 steps", "keep": 3}}
    out = tmp_path / "run"
    with pytest.raises(Stopped), stop_at(out, 5):
        tlscale.run(small_recipe(tmp_path / "recipe.yaml", data, **changes), out)
    return changes, data, out


def test_another_recipe_is_refused_with_the_difference(stopped, tmp_path):
    changes, data, out = stopped
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    other = {**changes, "optim": {"lr": 0.5}, "head": [{"linear": 8}, "linear"], "seed": 3, "log_every": "2 steps"}
    with pytest.raises(CheckpointError) as caught:
        tlscale.run(small_recipe(tmp_path / "other.yaml", data, **other), out, resume=True)
    message = str(caught.value)
    assert "optim.lr: 0.002 -> 0.5" in message
    assert "seed: 0 -> 3" in message
    assert "head: ['linear'] -> [{'linear': 8}, 'linear']" in message
    assert "log_every" not in message
    assert caught.value.exit_code == EXIT_BAD_INPUT
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_what_changes_nothing_may_change(stopped, tmp_path):
    changes, data, out = stopped
    allowed = {
        **changes,
        "checkpoint": {"every": "3 steps", "keep": 1, "keep_best": 2},
        "evaluate": {"batch_size": 3},
        "track": ["tensorboard"],
        "data": {"workers": 1},
        "compute": {"num_processes": 1},
    }
    tlscale.run(small_recipe(tmp_path / "other.yaml", data, **allowed), out, resume=True)
    tlscale.run(small_recipe(tmp_path / "recipe.yaml", data, **changes), tmp_path / "whole")
    assert_same_bits(exported(tmp_path / "whole"), exported(out))
    assert lines(tmp_path / "whole", "train") == lines(out, "train")


def test_other_data_are_refused(stopped, tmp_path):
    changes, data, out = stopped
    path = data / "train-images-idx3-ubyte"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="its data are not those that it was started with"):
        tlscale.run(small_recipe(tmp_path / "recipe.yaml", data, **changes), out, resume=True)


def test_another_test_split_is_announced_and_recorded(stopped, tmp_path, capsys):
    """Copies are the same training images; the test images are not those of the beginning."""
    changes, data, out = stopped
    copy = shutil.copytree(data, tmp_path / "copy", copy_function=shutil.copyfile)
    then = json.loads((out / "run.json").read_text())["data"]
    path = copy / "test-images-idx3-ubyte"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    data.rename(tmp_path / "away")
    copy.rename(data)
    capsys.readouterr()
    tlscale.run(small_recipe(tmp_path / "recipe.yaml", data, **changes), out, resume=True)
    assert "WARNING: the test split is not the one that" in " ".join(capsys.readouterr().out.split())
    now = json.loads((out / "run.json").read_text())["data"]
    assert now["used_sha256"] == then["used_sha256"] == result(out)["used_sha256"]
    assert now["scored_sha256"] == result(out)["scored_sha256"] != then["scored_sha256"]
    assert now["earlier_scored_sha256"] == [then["scored_sha256"]]


@pytest.mark.parametrize("same", [True, False])
def test_a_run_of_an_older_version_is_compared_as_it_was(stopped, tmp_path, capsys, same):
    changes, data, out = stopped
    record = json.loads((out / "run.json").read_text())
    for key in ("used_sha256", "used_by", "scored_sha256", "scored_by"):
        del record["data"][key]
    record["data"]["fingerprint"] = record["data"]["fingerprint"] if same else "0" * 64
    (out / "run.json").write_text(json.dumps(record))
    capsys.readouterr()
    recipe = small_recipe(tmp_path / "recipe.yaml", data, **changes)
    if same:
        tlscale.run(recipe, out, resume=True)
    else:
        with pytest.raises(CheckpointError, match="its data are not those that it was started with"):
            tlscale.run(recipe, out, resume=True)
    assert "its data were compared by the older identity" in " ".join(capsys.readouterr().out.split())


def test_a_damaged_newest_checkpoint_is_passed_over_loudly(stopped, tmp_path, capsys):
    changes, data, out = stopped
    newest = out / "checkpoints" / (out / "checkpoints" / "LATEST").read_text().strip()
    content = bytearray((newest / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "model.safetensors").write_bytes(content)
    capsys.readouterr()
    tlscale.run(small_recipe(tmp_path / "recipe.yaml", data, **changes), out, resume=True)
    output = " ".join(capsys.readouterr().out.split())
    assert "WARNING: the checkpoint" in output
    assert "cannot be used: model.safetensors has changed since it was written" in output
    tlscale.run(small_recipe(tmp_path / "recipe.yaml", data, **changes), tmp_path / "whole")
    assert_same_runs(tmp_path / "whole", out)


def test_a_checkpoint_of_another_run_is_passed_over_loudly(stopped, tmp_path, capsys):
    """Of the same recipe even, which only the id tells apart."""
    changes, data, out = stopped
    recipe = small_recipe(tmp_path / "recipe.yaml", data, **changes)
    tlscale.run(recipe, tmp_path / "whole")
    theirs = tmp_path / "whole" / "checkpoints"
    newest = theirs / (theirs / "LATEST").read_text().strip()
    shutil.copytree(newest, out / "checkpoints" / newest.name)
    capsys.readouterr()
    tlscale.run(recipe, out, resume=True)
    output = " ".join(capsys.readouterr().out.split())
    assert f"{newest.name}' cannot be used: it is of another run (" in output
    assert "resumed from" in output
    assert_same_runs(tmp_path / "whole", out)
    ids = {json.loads((folder / "run.json").read_text())["id"] for folder in (tmp_path / "whole", out)}
    assert len(ids) == 2


def test_all_checkpoints_damaged_is_an_error_and_no_fresh_start(stopped, tmp_path):
    changes, data, out = stopped
    log = (out / "metrics.jsonl").read_bytes()
    for path in (out / "checkpoints").glob("step_*/state.json"):
        path.unlink()
    with pytest.raises(CheckpointError, match="no checkpoint .* can be used"):
        tlscale.run(small_recipe(tmp_path / "recipe.yaml", data, **changes), out, resume=True)
    assert (out / "metrics.jsonl").read_bytes() == log


def test_a_torn_record_of_the_run_is_no_run_to_overwrite(stopped, tmp_path):
    changes, data, out = stopped
    (out / "run.json").write_text((out / "run.json").read_text()[:40])
    with pytest.raises(TlscaleError, match="not a run of tlscale"):
        tlscale.run(small_recipe(tmp_path / "recipe.yaml", data, **changes), out, resume=True)


def test_killed_at_birth_starts_afresh(idx, tmp_path):
    """Between run.json and recipe.yaml: nothing was trained, and the same line must go on."""
    recipe = small_recipe(tmp_path / "recipe.yaml", idx, duration="3 steps")
    out = tmp_path / "run"
    out.mkdir()
    (out / "run.json").write_text(json.dumps({"tlscale": "0.1.0"}))
    tlscale.run(recipe, out, resume=True)
    assert result(out)["steps"] == 3


def test_killed_between_the_last_checkpoint_and_the_result(idx, tmp_path):
    recipe = small_recipe(tmp_path / "recipe.yaml", idx, **PLAIN)
    tlscale.run(recipe, tmp_path / "whole")
    out = shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(out / "model")
    (out / "result.json").unlink()
    tlscale.run(recipe, out, resume=True)
    assert_same_runs(tmp_path / "whole", out)
