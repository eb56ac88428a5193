"""W&B's service and TensorBoard's folder go away in the middle of a run: it ends as if it had tracked nothing."""

import os
import shutil
import signal
import socket
import threading
from pathlib import Path

import pytest

from tests.chaos.killing import children_of, wait_for
from tests.small_runs import assert_same_runs, logged, small_recipe, start, wait_until

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]
STEPS = {"duration": "150 steps", "checkpoint": {"every": "50 steps"}}


@pytest.fixture(scope="module")
def whole(idx, tmp_path_factory):
    """The run without trackers."""
    folder = tmp_path_factory.mktemp("whole")
    small_recipe(folder / "recipe.yaml", idx, **STEPS)
    run = start("run", str(folder / "recipe.yaml"), "--out", str(folder / "run"), log=folder / "log")
    assert run.wait(120) == 0, (folder / "log").read_text()
    return folder / "run"


@pytest.fixture
def tracked(idx, tmp_path):
    """Starts the run with trackers, up to step 20: (process, folder, log)."""
    started = []

    def begin(track, **environment):
        small_recipe(tmp_path / "recipe.yaml", idx, **STEPS, track=track)
        words = ("run", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run"), "--resume")
        started.append(start(*words, log=tmp_path / "log", **environment))
        wait_until(logged(tmp_path / "run", 20), started[0], timeout_s=180)
        os.kill(started[0].pid, signal.SIGSTOP)  # it must not end before something is taken away
        return started[0], tmp_path / "run", tmp_path / "log"

    yield begin
    for process in started:
        process.kill()
        process.wait(30)


def name_of(pid):
    return Path(f"/proc/{pid}/comm").read_text()


def assert_ends_as(whole, process, out, log):
    os.kill(process.pid, signal.SIGCONT)
    assert process.wait(200) == 0, log.read_text()[-3000:]
    for name in ("wandb", "tensorboard"):
        shutil.rmtree(out / name, ignore_errors=True)
    assert_same_runs(whole, out)
    assert "Traceback" not in log.read_text()


def test_wandb_is_killed_in_the_middle(whole, tracked):
    process, out, log = tracked(["wandb"])
    (core,) = [pid for pid in children_of(process.pid) if "wandb" in name_of(pid)]
    os.kill(core, signal.SIGKILL)
    wait_for(lambda: core not in children_of(process.pid) or "Z" in Path(f"/proc/{core}/stat").read_text())
    assert_ends_as(whole, process, out, log)
    said = " ".join(log.read_text().split())
    assert said.count("W&B failed") == 1
    assert "metrics.jsonl has everything" in said


def test_the_folder_of_tensorboard_is_removed_in_the_middle(whole, tracked):
    process, out, log = tracked(["tensorboard"])
    shutil.rmtree(out / "tensorboard")
    (out / "tensorboard").write_text("in the way")
    os.kill(process.pid, signal.SIGCONT)
    assert process.wait(200) == 0, log.read_text()[-3000:]
    (out / "tensorboard").unlink()
    assert_same_runs(whole, out)
    # TensorBoard's own thread may print its traceback; the run has no error, and says why it goes on without.
    assert "tensorboard failed while logging and is switched off" in " ".join(log.read_text().split())


@pytest.fixture
def black_hole():
    """A server that takes every connection and never answers: (its address, connections)."""
    taken = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def take():
            while True:
                try:
                    taken.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=take, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", taken
        for connection in taken:
            connection.close()


def test_a_network_that_swallows_everything(whole, tracked, black_hole):
    address, taken = black_hole
    environment = {"WANDB_BASE_URL": address, "WANDB_API_KEY": "0" * 40, "WANDB_INIT_TIMEOUT": "5"}
    process, out, log = tracked(["wandb"], **environment)
    assert taken, "W&B has tried"
    assert_ends_as(whole, process, out, log)
    assert "the start online failed" in " ".join(log.read_text().split())
