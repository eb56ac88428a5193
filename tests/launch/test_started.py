"""Launch files that are started as they are, with two processes on the CPU, and end in a model."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.small_runs import REPO, environment, last_checkpoint, logged, result, small_recipe

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(600)]
PYTHON = Path(sys.executable)
ON_CPU = {"ACCELERATE_USE_CPU": "true", "PYTHON": str(PYTHON), "PATH": f"{PYTHON.parent}:{os.environ['PATH']}"}


class Started:
    """A command in a session of its own, its output in a file; leaving the context ends all its processes."""

    def __init__(self, *words, log: Path, **changes: str) -> None:
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                list(map(str, words)),
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment(**ON_CPU | changes),
                cwd=REPO,
                start_new_session=True,
            )

    def __enter__(self) -> "Started":
        return self

    def __exit__(self, *_) -> None:
        if self.process.poll() is None:
            # The launcher, if there still is one, ends the workers, which are in sessions of their own.
            os.killpg(self.process.pid, signal.SIGTERM)
            self.process.wait(60)

    def exit_code(self, timeout_s: float = 200) -> int:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"hangs: {self.log.read_text()[-3000:]}")


def wait_for(condition, *started: Started, timeout_s: float = 200) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        for one in started:
            assert one.process.poll() is None, one.log.read_text()[-3000:]
        assert time.monotonic() < end, [one.log.read_text()[-3000:] for one in started]
        time.sleep(0.01)


def free_port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def world_size(out: Path) -> int:
    return json.loads((out / "run.json").read_text())["world_size"]


def test_local(idx, tmp_path):
    small_recipe(tmp_path / "recipe.yaml", idx)
    out = tmp_path / "run"
    words = ("bash", "launch/local.sh", tmp_path / "recipe.yaml", "seed=5")
    with Started(*words, log=tmp_path / "log", RUN_DIR=str(out), PROCESSES="2") as run:
        assert run.exit_code() == 0, run.log.read_text()[-3000:]
    assert world_size(out) == 2
    assert result(out)["steps"] == 10
    assert "seed: 5\n" in (out / "recipe.yaml").read_text()


def test_two_hosts(idx, tmp_path):
    """The two lines of its header, both here."""
    small_recipe(tmp_path / "recipe.yaml", idx)
    out = tmp_path / "run"
    given = {"RUN_DIR": str(out), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "PROCESSES_PER_HOST": "1"}
    words = ("bash", "launch/two_hosts.sh", tmp_path / "recipe.yaml")
    with (
        Started(*words, log=tmp_path / "log0", MACHINE_RANK="0", **given) as first,
        Started(*words, log=tmp_path / "log1", MACHINE_RANK="1", **given) as second,
    ):
        assert first.exit_code() == 0, first.log.read_text()[-3000:]
        assert second.exit_code() == 0, second.log.read_text()[-3000:]
    assert world_size(out) == 2
    assert result(out)["steps"] == 10


@pytest.mark.parametrize("variable", ["MACHINE_RANK", "MASTER_ADDR", "PROCESSES_PER_HOST"])
def test_two_hosts_says_what_is_missing(tmp_path, variable):
    given = {"MACHINE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "PROCESSES_PER_HOST": "1"}
    del given[variable]
    with Started("bash", "launch/two_hosts.sh", "recipe.yaml", log=tmp_path / "log", **given) as run:
        assert run.exit_code() != 0
    assert f"{variable}: " in run.log.read_text()


# --- Kubernetes: the scripts of a pod, as processes of this machine ---------------------------------------------------


def container_of(name: str) -> dict:
    """The container of the only pods that a file below launch/kubernetes describes."""
    documents = list(yaml.safe_load_all((REPO / "launch" / "kubernetes" / name).read_text()))
    job = next(each for each in documents if each["kind"] in ("Job", "TrainingRuntime"))
    if job["kind"] == "TrainingRuntime":
        job = job["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    return container


def pods(name: str, recipe: Path, out: Path, **changes: str) -> tuple[Started, Started]:
    """Two pods of one process each; what the cluster sets, and what a user changes, is set here."""
    container, port = container_of(name), free_port()
    script = container["args"][0].replace("29500", port)
    given = {each["name"]: each["value"] for each in container.get("env", [])}
    given |= {"RECIPE": str(recipe), "RUN_DIR": str(out), "TLSCALE_CACHE": str(out.parent / "cache")}
    if name == "indexed_job.yaml":
        given |= {"PROCESSES_PER_NODE": "1", "MASTER_ADDR": "127.0.0.1"}
        rank_in = "JOB_COMPLETION_INDEX"
    else:  # what Kubeflow Trainer gives a pod
        given |= {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": port}
        rank_in = "PET_NODE_RANK"
    first, second = (
        Started(
            *container["command"], script, log=out.with_name(f"{out.name}.{rank}"), **{**given, rank_in: rank} | changes
        )
        for rank in ("0", "1")
    )
    return first, second


def failing_python(folder: Path) -> str:
    """A PATH on which python3 only fails."""
    (folder / "python3").write_text("#!/usr/bin/env bash\nexit 1\n")
    (folder / "python3").chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_pods_that_are_taken_away_and_made_anew(idx, tmp_path):
    """Pods of the one kind begin the run, and pods of the other go on with it."""
    changes = {"duration": "300 steps", "checkpoint": {"every": "300 steps"}, "evaluate": {"every": "300 steps"}}
    small_recipe(tmp_path / "recipe.yaml", idx, **changes)
    out = tmp_path / "run"
    first, second = pods("indexed_job.yaml", tmp_path / "recipe.yaml", out)
    with first, second:
        wait_for(logged(out, 20), first, second)
        assert world_size(out) == 2
        before_the_end = container_of("indexed_job.yaml")["lifecycle"]["preStop"]["exec"]["command"]
        subprocess.run(before_the_end, env={**os.environ, "RUN_DIR": str(out)}, timeout=200, check=True)
        assert [first.exit_code(), second.exit_code()] == [75, 75]
    stopped_at = int(last_checkpoint(out).name.removeprefix("step_"))
    assert 20 <= stopped_at < 300
    first, second = pods("trainjob.yaml", tmp_path / "recipe.yaml", out)
    with first, second:
        assert [first.exit_code(), second.exit_code()] == [0, 0], first.log.read_text()[-3000:]
    assert f"at step {stopped_at} of 300" in " ".join(first.log.read_text().split())
    assert result(out)["steps"] == 300
    # A pod that is made anew when the run is complete has nothing to wait for, and starts no Python.
    first, second = pods("trainjob.yaml", tmp_path / "recipe.yaml", out, PATH=failing_python(tmp_path))
    with first, second:
        assert [first.exit_code(20), second.exit_code(20)] == [0, 0]


@pytest.mark.parametrize("name", ["indexed_job.yaml", "trainjob.yaml"])
def test_a_pod_whose_run_fails_says_so(tmp_path, name):
    """With a Python that fails, and a STOPPED of an earlier start."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "STOPPED").write_text("{}")
    first, second = pods(name, tmp_path / "recipe.yaml", tmp_path / "run", PATH=failing_python(tmp_path))
    with first, second:
        assert [first.exit_code(20), second.exit_code(20)] == [1, 1]
