"""Two processes behind a real launcher: each of them, the launcher, and all are killed; torchrun's own restart."""

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

from tests.chaos.killing import KILLS, Place, assert_ended_as, start_all
from tests.dist.launches import exit_code_of, launch, workers_of
from tests.small_runs import REPO, lines, logged, wait_until

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
TARGET = REPO / "tlscale" / "run.py"
STEPS = "duration=40 steps"
START_S = 240  # a start takes seconds, on a busy machine minutes


@pytest.fixture(scope="module")
def whole(forks, idx, tmp_path_factory):
    """The run that nobody killed, by two processes."""
    place = Place(tmp_path_factory.mktemp("whole") / "place", "several", idx)
    place.words += (STEPS,)
    assert [forks.wait(pid) for pid in start_all(forks, place, 2)] == [0, 0], place.output()
    return place


@pytest.fixture
def place(idx, tmp_path):
    """A place, of whose processes none is left in the end."""
    place = Place(tmp_path / "place", "several", idx)
    place.words += (STEPS,)
    place.launched, place.workers = [], []
    with contextlib.ExitStack() as place.ending:
        yield place
        for launched in place.launched:
            for pid in [launched.pid, *workers_of(launched.pid).values(), *place.workers]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            launched.wait(30)


def begin(place, *, options=(), launcher="torchrun", step=6, **variables):
    """Start the line by a launcher, and wait for a step: (launcher, rank -> process id)."""
    words = (*options, TARGET, *place.words[1:])
    started = launch(2, *words, log=place.log, launcher=launcher, **place.variables, **variables)
    launched = place.ending.enter_context(started)
    place.launched.append(launched)
    wait_until(logged(place.out, step), launched, START_S)
    workers = workers_of(launched.pid)
    assert set(workers) == {0, 1}, "the world size"
    place.workers = list(workers.values())
    return launched, workers


def wait_for_end(pids, timeout_s=120):
    end = time.monotonic() + timeout_s
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < end, "processes are left"
        time.sleep(0.02)


def kill(*pids):
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
@pytest.mark.parametrize("who", ["rank 0", "rank 1", "launcher", "all"])
def test_killed_behind_a_launcher(forks, whole, place, launcher, who):
    launched, workers = begin(place, launcher=launcher)
    victims = {"rank 0": [workers[0]], "rank 1": [workers[1]], "launcher": [launched.pid]}
    kill(*victims.get(who, [launched.pid, *workers.values()]))
    KILLS[f"behind {launcher}: {who}"] += len(victims.get(who, [0, 0, 0]))
    assert exit_code_of(launched, place.log, START_S) != 0
    if who == "launcher":
        # A cluster may start the line again before the old processes have saved and gone: it is refused, and later not.
        for _ in range(10):
            ends = [forks.wait(pid) for pid in start_all(forks, place, 2)]
            if ends == [0, 0]:
                break
            assert "another job is writing to" in place.said()
            time.sleep(1)
    wait_for_end(workers.values())
    if who != "launcher":
        ends = [forks.wait(pid) for pid in start_all(forks, place, 2)]
    assert ends == [0, 0], place.output()
    assert_ended_as(whole.out, place.out)


def test_torchrun_restarts_the_run_by_itself(whole, place):
    """Rank 1 crashes at step 7, and rank 0 when the run was resumed: the launcher's own restarts bring it to an end."""
    options = ("--max_restarts", "3")
    launched, before = begin(place, options=options, step=5, TLSCALE_FAULT="step@7:1")
    wait_until(lambda: "resumed from" in place.log.read_text(), launched, START_S)
    step = max_step(place)
    wait_until(logged(place.out, step + 3), launched, START_S)
    workers = workers_of(launched.pid)
    assert set(workers) == {0, 1}
    assert not set(workers.values()) & set(before.values())
    kill(workers[0])
    KILLS["behind torchrun, which restarts: rank 1, rank 0"] += 2
    assert exit_code_of(launched, place.log, START_S) == 0, place.output()
    assert place.log.read_text().count("resumed from") == 2
    assert "connectFullMesh failed" not in place.log.read_text(), "a new process calls one that is dead"
    assert_ended_as(whole.out, place.out)


def max_step(place):
    return max(record["step"] for record in lines(place.out))
