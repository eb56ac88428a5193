"""launch/slurm.sbatch under a real Slurm, submitted as a user would; `make test-slurm`.

Two nodes, which are two daemons on this machine, with one process of the run on each. Whatever interrupts the run, it
ends in the weights of the run that nothing interrupted, bit for bit.
"""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, why_not
from tests.small_runs import REPO, assert_same_runs, last_checkpoint, logged, put_small_idx, result, small_recipe

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(why_not() is not None, reason=why_not() or ""),
]
STEPS, EVERY = 600, 20


@pytest.fixture(scope="module")
def cluster():
    cluster = Cluster()
    try:
        cluster.open()
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    changes = {
        "duration": f"{STEPS} steps",
        "checkpoint": {"every": f"{EVERY} steps"},
        "evaluate": {"every": "200 steps"},
        "data": {"augment": ["flip"]},
    }
    small_recipe(folder / "small.yaml", put_small_idx(folder / "idx"), **changes)
    return folder / "small.yaml"


class Job:
    """One job: launch/slurm.sbatch, submitted from the checkout, on two nodes unless `options` say otherwise."""

    def __init__(self, cluster: Cluster, recipe: Path, out: Path, *options: str, words=(), **changes: str) -> None:
        self.cluster, self.out, self.log = cluster, out, out.with_name(f"{out.name}.log")
        environment = {
            "ACCELERATE_USE_CPU": "true",
            "PROCESSES_PER_NODE": "1",
            "PYTHON": sys.executable,
            "PYTHONPATH": str(REPO),
            "OMP_NUM_THREADS": "1",
            "RUN_DIR": str(out),
            **changes,
        }
        command = ["sbatch", "--parsable", "--cpus-per-task=1", f"--chdir={REPO}", f"--output={self.log}", *options]
        command += [f"{REPO}/launch/slurm.sbatch", str(recipe), *words]
        answer = cluster.ask(*command, **environment).strip()
        assert answer.isdecimal(), answer
        self.number = answer

    def facts(self) -> dict[str, str]:
        shown = self.cluster.ask("scontrol", "show", "job", "-o", self.number)
        return dict(re.findall(r"(\S+?)=(\S*)", shown))

    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait_for(self, what, condition, timeout_s=600):
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, f"not {what}: {self.facts()}\n{self.output()[-4000:]}\n{self.cluster.logs()}"
            time.sleep(0.1)

    def wait_for_step(self, step: int):
        self.wait_for(f"at step {step}", logged(self.out, step))

    def wait_for_state(self, *states: str):
        def reached():
            return self.facts()["JobState"] in states

        self.wait_for("/".join(states), reached)

    def resumed_at(self) -> list[int]:
        """The steps from which its later starts went on."""
        return [int(step) for step in re.findall(r"resumed from .*?,\s+at\s+step\s+(\d+)", self.output(), re.DOTALL)]


def take_the_nodes(cluster: Cluster) -> str:
    """Submit a short job of higher priority that wants all nodes."""
    words = ("--partition=high", "--nodes=2", "--output=/dev/null", "--wrap=srun sleep 2")
    answer = cluster.ask("sbatch", "--parsable", f"--chdir={REPO}", *words).strip()
    assert answer.isdecimal(), answer
    return answer


@pytest.fixture(scope="module")
def whole(cluster, recipe):
    """The run that nothing interrupts."""
    job = Job(cluster, recipe, recipe.with_name("whole"))
    job.wait_for_state("COMPLETED", "FAILED", "TIMEOUT")
    assert job.facts()["JobState"] == "COMPLETED", job.output()[-4000:]
    return job


def test_two_nodes_train_one_run(whole):
    facts = whole.facts()
    assert (facts["NumNodes"], facts["Restarts"]) == ("2", "0")
    assert json.loads((whole.out / "run.json").read_text())["world_size"] == 2
    assert result(whole.out)["steps"] == STEPS
    assert "complete:" in whole.output()


def test_queued_again_and_preempted(cluster, recipe, whole):
    job = Job(cluster, recipe, recipe.with_name("requeued"))
    job.wait_for_step(3 * EVERY + 5)
    cluster.ask("scontrol", "requeue", job.number)
    job.wait_for("queued again", lambda: job.facts()["Restarts"] == "1")
    job.wait_for_step(10 * EVERY + 5)
    other = take_the_nodes(cluster)
    job.wait_for("preempted", lambda: job.facts()["Restarts"] == "2")
    job.wait_for_state("COMPLETED", "FAILED")
    assert job.facts()["JobState"] == "COMPLETED", job.output()[-4000:]
    assert f"JobId={other} " in cluster.ask("scontrol", "show", "job", "-o", other)
    first, second = job.resumed_at()
    assert 0 < first < second < STEPS
    assert json.loads((job.out / "run.json").read_text())["world_size"] == 2
    assert_same_runs(whole.out, job.out)


def test_the_signal_before_the_end_of_its_time(cluster, recipe, whole):
    """The script has the run save itself, and queues the job again."""
    job = Job(cluster, recipe, recipe.with_name("signalled"))
    job.wait_for_step(4 * EVERY + 5)
    cluster.ask("scancel", "--signal=USR1", "--batch", job.number)
    job.wait_for("saved", (job.out / "STOPPED").exists)
    saved = int(last_checkpoint(job.out).name.removeprefix("step_"))
    job.wait_for("queued again", lambda: job.facts()["Restarts"] == "1")
    job.wait_for_state("COMPLETED", "FAILED")
    assert job.facts()["JobState"] == "COMPLETED", job.output()[-4000:]
    assert job.resumed_at() == [saved]
    assert saved > 4 * EVERY
    # Of its own, and not only as often as the recipe says; the two may fall on one step.
    assert f"after step {saved} of {STEPS}" in job.output()
    assert_same_runs(whole.out, job.out)


def test_preempted_with_a_time_of_grace(cluster, recipe, whole):
    """Slurm tells the processes alone; they save themselves, and the script sees why the run ended."""
    job = Job(cluster, recipe, recipe.with_name("graceful"), "--partition=grace")
    job.wait_for_step(4 * EVERY + 5)
    take_the_nodes(cluster)
    job.wait_for("queued again", lambda: job.facts()["Restarts"] == "1")
    job.wait_for_state("COMPLETED", "FAILED")
    assert job.facts()["JobState"] == "COMPLETED", job.output()[-4000:]
    assert "the run saved itself, and is queued again" in job.output()
    assert_same_runs(whole.out, job.out)


def test_killed_and_submitted_again(cluster, recipe, whole):
    """Kill -9 of every process of the run at once is a failure, which is not queued again; the same line goes on."""
    out = recipe.with_name("killed")
    job = Job(cluster, recipe, out)
    job.wait_for_step(4 * EVERY + 5)
    killed = kill_processes_of(job)
    assert len(killed) >= 4, "two launchers and two workers"
    job.wait_for_state("FAILED", "COMPLETED", "PENDING")
    assert job.facts()["JobState"] == "FAILED"
    assert "failed with exit code" in job.output()
    assert job.facts()["Restarts"] == "0"
    again = Job(cluster, recipe, out)
    again.wait_for_state("COMPLETED", "FAILED")
    assert again.facts()["JobState"] == "COMPLETED", again.output()[-4000:]
    assert again.resumed_at(), again.output()[-2000:]
    assert_same_runs(whole.out, out)


def kill_processes_of(job: Job) -> list[int]:
    """SIGKILL to each process of the job that runs tlscale or its launcher."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            variables = (entry / "environ").read_bytes().split(b"\0")
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        # srun has the run's command line as well, and is not on the nodes.
        program = Path(words[0].decode()).name
        if f"SLURM_JOB_ID={job.number}".encode() in variables and program.startswith("python"):
            found.append(int(entry.name))
    for number in found:
        os.kill(number, signal.SIGKILL)
    return found


def test_what_is_cancelled_stays_cancelled(cluster, recipe):
    job = Job(cluster, recipe, recipe.with_name("cancelled"))
    job.wait_for_step(2 * EVERY + 5)
    cluster.ask("scancel", job.number)
    job.wait_for_state("CANCELLED")
    time.sleep(15)  # longer than a job that is queued again has to wait
    assert job.facts()["JobState"] == "CANCELLED"
    assert job.facts()["Restarts"] == "0"
    assert not (job.out / "result.json").exists()


def test_the_end_of_its_time(cluster, recipe):
    """Slurm's own signal: a limit of two minutes, and one to stop in; Slurm may send it half a minute earlier."""
    options = ("--time=2", "--signal=B:USR1@60")
    job = Job(cluster, recipe, recipe.with_name("timed"), *options, words=("duration=200000 steps",))
    job.wait_for("queued again", lambda: job.facts()["Restarts"] == "1")
    job.wait_for("gone on", lambda: len(job.resumed_at()) == 1)
    cluster.ask("scancel", job.number)
    job.wait_for_state("CANCELLED")
    assert "asked to stop, in start 1" in job.output()
    assert job.resumed_at()[0] > 0


def test_array(cluster, recipe):
    """Each task its own seed and folder."""
    out = recipe.with_name("array")
    words = ("seed=%a", "duration=20 steps", "evaluate.every=20 steps")
    job = Job(cluster, recipe, out, "--array=3-4", "--nodes=1", words=words, RUN_DIR=f"{out}_%a")
    folders = {seed: out.with_name(f"array_{seed}") for seed in (3, 4)}
    done = [folder / "result.json" for folder in folders.values()]
    job.wait_for("complete", lambda: all(file.exists() for file in done))
    for seed, folder in folders.items():
        assert f"seed: {seed}\n" in (folder / "recipe.yaml").read_text()
        assert json.loads((folder / "run.json").read_text())["world_size"] == 1
        assert result(folder)["steps"] == 20


@pytest.mark.timeout(900)
def test_comparison(cluster, recipe, tmp_path):
    """Its runs as tasks of an array, one of which is queued again, and their table after the last of them."""
    out = tmp_path / "compared"
    script = [f"{REPO}/launch/slurm_compare.sh", "--nodes=1", f"--chdir={REPO}", "--", str(recipe)]
    words = ["duration=200 steps", "--strategies", "scratch", "--seeds", "0,1,2", "--out", str(out)]
    variables = {"PYTHON": sys.executable, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    said = cluster.ask("bash", *script, *words, **variables)
    array, table = re.findall(r"job (\d+)", said)

    def states(number):
        return set(re.findall(r"JobState=(\S+)", cluster.ask("scontrol", "show", "job", "-o", number)))

    def wait_for(condition):
        end = time.monotonic() + 600
        while not condition():
            assert time.monotonic() < end, f"{said}\n{states(array)} {states(table)}\n{cluster.logs()}"
            time.sleep(0.2)

    folders = [out / f"scratch_s{seed}" for seed in (0, 1, 2)]
    wait_for(logged(folders[0], 40))
    cluster.ask("scancel", "--signal=USR1", "--batch", f"{array}_1")
    wait_for((folders[0] / "STOPPED").exists)
    assert not (out / "table").exists()
    wait_for(lambda: states(table) <= {"COMPLETED", "FAILED"})
    output = (out / "jobs" / "1.out").read_text()
    assert "queued again" in output
    assert "resumed from" in output
    assert states(table) == {"COMPLETED"}, (out / "jobs" / "table.out").read_text()
    assert [result(folder)["steps"] for folder in folders] == [200] * 3
    compared = json.loads((out / "table" / "compare.json").read_text())
    assert [run["seed"] for run in compared["runs"]] == [0, 1, 2]
