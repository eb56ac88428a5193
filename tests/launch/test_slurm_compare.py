"""The logic of launch/slurm_compare.sh, with tools of ours; `make test-slurm` has a real Slurm run it."""

import os
import signal
import subprocess
import time

import pytest

from tests.small_runs import REPO

SCRIPT = REPO / "launch" / "slurm_compare.sh"
RECORDS = """#!/usr/bin/env bash
printf '%s\\n' "$@" >>"$FAKE_FOLDER/${0##*/}"
echo 'next' >>"$FAKE_FOLDER/${0##*/}"
[[ ${0##*/} != sbatch ]] || echo $((70 + $(grep -c '^next$' "$FAKE_FOLDER/sbatch")))
"""
# Is asked for the lines, and then does what FAKE_RUN says in place of a run.
PYTHON = """#!/usr/bin/env bash
printf '%s\\n' "$@" >"$FAKE_FOLDER/python"
if [[ $3 == compare && $FAKE_RUN == refuses ]]; then
  echo 'tlscale: no such recipe' >&2; exit 2
elif [[ $3 == compare && ${*: -1} == --print-jobs ]]; then
  echo "tlscale run 'runs/a b/recipes/one.yaml' --out 'runs/a b/one' --resume"
  echo "tlscale run 'runs/a b/recipes/two.yaml' --out 'runs/a b/two' --resume"
  echo "then: tlscale compare 'runs/a b/one' 'runs/a b/two' --out 'runs/a b/table'" >&2
elif [[ $3 == run ]]; then
  mkdir -p "$6"
  stopped() { echo "{\\"by\\": \\"$2\\"}" >"$1/STOPPED"; exit 75; }
  case $FAKE_RUN in
    fails) exit 3 ;;
    stopped_by_hand) stopped "$6" "the file '$6/STOP'" ;;
    is_told) stopped "$6" SIGTERM ;;
    obeys) trap 'stopped "$6" SIGTERM' TERM; touch "$FAKE_FOLDER/running"; while :; do sleep 0.02; done ;;
  esac
fi
"""


@pytest.fixture
def place(tmp_path):
    """The folder that jobs run in: two lines were submitted from there."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (("sbatch", RECORDS), ("scontrol", RECORDS), ("python", PYTHON)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    return tmp_path


def start(place, *words, run="completes", **changes):
    variables = {"PATH": f"{place / 'tools'}:{os.environ['PATH']}", "PYTHON": str(place / "tools" / "python")}
    variables |= {"FAKE_FOLDER": str(place), "FAKE_RUN": run, **changes}
    return subprocess.Popen(
        ["bash", SCRIPT, *words],
        env={**os.environ, **variables},
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process):
    output, _ = process.communicate(timeout=30)
    return process.returncode, output


def calls(place, name):
    """The words of each call of a tool."""
    file = place / name
    text = file.read_text() if file.exists() else ""
    return [call.splitlines() for call in text.split("next\n")[:-1]]


def submitted(place, **changes):
    return ended(start(place, "--gpus=1", "--time=5", "--", "photos.yaml", "--seeds", "0,1", **changes))


def test_an_array_and_a_job_after_it(place):
    code, output = submitted(place, MOST_AT_ONCE="4")
    assert code == 0, output
    assert (place / "python").read_text().split() == [
        *("-m", "tlscale", "compare", "photos.yaml", "--seeds", "0,1", "--print-jobs")
    ]
    array, table = calls(place, "sbatch")
    assert "--array=1-2%4" in array
    assert array[-5:] == ["--gpus=1", "--time=5", str(SCRIPT), "--task", "runs/a b/jobs/lines"]
    assert "--dependency=afterany:71" in table
    assert table[-5:] == ["--gpus=1", "--time=5", str(SCRIPT), "--table", "runs/a b/jobs/gather"]
    assert "2 runs: job 71" in output
    assert "their table: job 72, in runs/a b/table" in output


def test_a_comparison_that_is_refused_submits_nothing(place):
    assert submitted(place, run="refuses") == (2, "tlscale: no such recipe\n")
    code, output = ended(start(place, "--gpus=1"))
    assert (code, "the recipe is missing" in output) == (2, True)
    assert calls(place, "sbatch") == []


def task(place, **changes):
    assert submitted(place)[0] == 0
    return start(
        place, "--task", "runs/a b/jobs/lines", **{"SLURM_ARRAY_TASK_ID": "2", "SLURM_JOB_ID": "99", **changes}
    )


def test_a_task_runs_its_line_and_the_last_job_the_table(place):
    assert ended(task(place))[0] == 0
    assert (place / "python").read_text().splitlines()[2:] == [
        *("run", "runs/a b/recipes/two.yaml", "--out", "runs/a b/two", "--resume")
    ]
    assert ended(start(place, "--table", "runs/a b/jobs/gather"))[0] == 0
    assert (place / "python").read_text().splitlines()[2:] == [
        *("compare", "runs/a b/one", "runs/a b/two", "--out", "runs/a b/table")
    ]


@pytest.mark.parametrize(
    ("run", "changes", "code", "requeued"),
    [
        ("fails", {}, 3, False),
        ("is_told", {}, 75, True),  # of a preemption with a time of grace
        ("is_told", {"SLURM_RESTART_COUNT": "2", "MAX_REQUEUES": "2"}, 75, False),
        ("stopped_by_hand", {}, 75, False),
    ],
)
def test_what_stopped_is_queued_again(run, changes, code, requeued, place):
    assert ended(task(place, run=run, **changes))[0] == code
    assert calls(place, "scontrol") == ([["requeue", "99"]] if requeued else [])


@pytest.mark.parametrize(("number", "requeued"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_a_signal_to_the_task(number, requeued, place):
    """The time is nearly up; or Slurm ends the job, and queues it again itself where it does."""
    process = task(place, run="obeys")
    end = time.monotonic() + 20
    while not (place / "running").exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    process.send_signal(number)
    assert ended(process)[0] == 75
    assert calls(place, "scontrol") == ([["requeue", "99"]] if requeued else [])
