"""The logic of launch/slurm.sbatch, with an srun and a scontrol of ours; `make test-slurm` has a real Slurm run it."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.small_runs import REPO

# Does in the run folder what tlscale would do there, as FAKE_RUN says; srun's own exit code is never the run's.
SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" >"$FAKE_FOLDER/srun"
while [[ $1 != --out ]]; do shift; done
mkdir -p "$2"
touch "$FAKE_FOLDER/running"
stopped() { echo "{\\"by\\": \\"$2\\"}" >"$1/STOPPED"; exit 1; }
case $FAKE_RUN in
  completes) echo '{}' >"$2/result.json" ;;
  fails) exit 3 ;;
  obeys) until [[ -e $2/STOP ]]; do sleep 0.02; done; rm "$2/STOP"; stopped "$2" "the file '$2/STOP'" ;;
  begins_late) until [[ -e $2/STOP ]]; do sleep 0.02; done; rm "$2/STOP"; touch "$FAKE_FOLDER/begun"
    until [[ -e $2/STOP ]]; do sleep 0.02; done; rm "$2/STOP"; stopped "$2" "the file '$2/STOP'" ;;
  is_told) stopped "$2" SIGTERM ;;
  hangs) echo $$ >"$FAKE_FOLDER/pid"; exec sleep 60 ;;
esac
"""
# Slurm ends what it queues again.
SCONTROL = """#!/usr/bin/env bash
echo "$@" >>"$FAKE_FOLDER/scontrol"
[[ ! -e $FAKE_FOLDER/pid ]] || kill -9 "$(<"$FAKE_FOLDER/pid")"
"""


class Script:
    """The script as Slurm's daemon would start it, in the folder `place`."""

    def __init__(self, place: Path, run: str, *words: str, **changes: str) -> None:
        self.place = place
        tools = place / "tools"
        tools.mkdir(exist_ok=True)
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        slurm = {"SLURM_JOB_ID": "123456", "SLURM_NNODES": "2"}
        path = f"{tools}:{os.environ['PATH']}"
        self.process = subprocess.Popen(
            ["bash", REPO / "launch" / "slurm.sbatch", *(words or ("recipes/flowers.yaml",))],
            env={**os.environ, **slurm, "PATH": path, "FAKE_FOLDER": str(place), "FAKE_RUN": run, **changes},
            cwd=place,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def send(self, number: signal.Signals) -> None:
        end = time.monotonic() + 20
        while not (self.place / "running").exists():
            assert time.monotonic() < end
            time.sleep(0.01)
        self.process.send_signal(number)

    def end(self) -> tuple[int, str]:
        """Its exit code, and what it said."""
        try:
            output, _ = self.process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return self.process.returncode, output

    def requeued(self) -> list[str]:
        file = self.place / "scontrol"
        return file.read_text().splitlines() if file.exists() else []

    def words(self) -> list[str]:
        """What srun was given."""
        return (self.place / "srun").read_text().splitlines()


def test_the_command(tmp_path):
    script = Script(tmp_path, "completes", "recipes/flowers.yaml", "optim.lr=1e-3", "name=a b", MASTER_ADDR="first")
    code, output = script.end()
    assert (code, script.requeued()) == (0, [])
    assert "complete: runs/flowers/result.json" in output
    words = script.words()
    assert words[-6:] == ["recipes/flowers.yaml", "--out", "runs/flowers", "--resume", "optim.lr=1e-3", "name=a b"]
    assert words[words.index("--nnodes") + 1] == "2"
    assert words[words.index("--nproc-per-node") + 1] == "gpu"
    assert words[words.index("--master-addr") + 1] == "first"
    assert words[words.index("--master-port") + 1] == "23456"  # of the job's number


def test_srun_asks_for_the_cores_of_the_job(tmp_path):
    script = Script(tmp_path, "completes", SLURM_CPUS_PER_TASK="64")
    assert script.end()[0] == 0
    assert "--cpus-per-task=64" in script.words()


def test_without_a_recipe(tmp_path):
    script = Script(tmp_path, "completes", "")
    code, output = script.end()
    assert code != 0
    assert "the recipe is missing" in output
    assert not (tmp_path / "srun").exists()


def test_a_failure_is_not_queued_again(tmp_path):
    script = Script(tmp_path, "fails")
    assert script.end()[0] == 3
    assert script.requeued() == []


def test_a_failure_is_not_taken_for_the_stop_of_an_earlier_start(tmp_path):
    (tmp_path / "runs" / "flowers").mkdir(parents=True)
    (tmp_path / "runs" / "flowers" / "STOPPED").write_text(json.dumps({"by": "SIGTERM"}))
    script = Script(tmp_path, "fails")
    assert script.end()[0] == 3
    assert script.requeued() == []


@pytest.mark.parametrize(("starts_before", "requeued"), [("", True), ("1", True), ("2", False)])
def test_the_signal_stops_the_run_and_queues_it_again_up_to_a_cap(tmp_path, starts_before, requeued):
    changes = {"SLURM_RESTART_COUNT": starts_before} if starts_before else {}
    script = Script(tmp_path, "obeys", MAX_REQUEUES="2", **changes)
    script.send(signal.SIGUSR1)
    code, output = script.end()
    assert code == 75
    assert script.requeued() == (["requeue 123456"] if requeued else [])
    assert ("and is queued again" in output) == requeued
    assert ("not queued again: this was start 3" in output) != requeued


def test_the_signal_may_come_before_the_run_begins(tmp_path):
    """A run that begins removes a STOP that is there, as one of an earlier start."""
    script = Script(tmp_path, "begins_late")
    script.send(signal.SIGUSR1)
    assert script.end()[0] == 75
    assert script.requeued() == ["requeue 123456"]
    assert (tmp_path / "begun").exists()


def test_two_signals_are_one(tmp_path):
    script = Script(tmp_path, "obeys")
    script.send(signal.SIGUSR1)
    script.send(signal.SIGUSR1)
    assert script.end()[0] == 75
    assert script.requeued() == ["requeue 123456"]


def test_a_run_that_does_not_stop_in_time_goes_on_from_its_last_checkpoint(tmp_path):
    script = Script(tmp_path, "hangs", STOP_WITHIN_S="1")
    script.send(signal.SIGUSR1)
    script.end()
    assert script.requeued() == ["requeue 123456"]


def test_a_run_whose_processes_were_told_to_stop_is_queued_again(tmp_path):
    """So it is after a preemption with a time of grace."""
    script = Script(tmp_path, "is_told")
    assert script.end()[0] == 75
    assert script.requeued() == ["requeue 123456"]


def test_a_run_that_somebody_stopped_is_not(tmp_path):
    (tmp_path / "runs" / "flowers").mkdir(parents=True)
    (tmp_path / "runs" / "flowers" / "STOP").touch()
    script = Script(tmp_path, "obeys")
    code, output = script.end()
    assert code == 75
    assert script.requeued() == []
    assert "stopped by hand" in output


def test_a_job_that_slurm_ends_is_left_to_slurm(tmp_path):
    script = Script(tmp_path, "obeys")
    script.send(signal.SIGTERM)
    (tmp_path / "runs" / "flowers" / "STOP").touch()
    code, output = script.end()
    assert code == 75
    assert script.requeued() == []
    assert "ended by Slurm" in output


def test_each_task_of_an_array_has_its_own(tmp_path):
    words = ("sweep/%a.yaml", "seed=%a")
    by_itself = Script(tmp_path, "completes", *words, SLURM_ARRAY_TASK_ID="7")
    assert by_itself.end()[0] == 0
    assert by_itself.words()[-5:] == ["sweep/7.yaml", "--out", "runs/7_7", "--resume", "seed=7"]
    named = Script(tmp_path, "completes", *words, SLURM_ARRAY_TASK_ID="7", RUN_DIR="sweeps/%a/run")
    assert named.end()[0] == 0
    assert named.words()[-5:] == ["sweep/7.yaml", "--out", "sweeps/7/run", "--resume", "seed=7"]
