"""A power loss at every moment of a run, and of a start that resumes one: all states that the disk may be in then."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.chaos.killing import KILLS
from tests.forks import Forks
from tests.jobs.test_power_loss import record
from tests.power_loss import put, states
from tests.small_runs import assert_same_runs

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]
WORKERS = 2


def fault_of(state, forks, place, folder):
    """What is wrong with the run that is resumed from a state; None: nothing."""
    name, tree = state
    disk, log = put(tree, folder / "disk"), folder / "log"
    words = ("run", place / "recipe.yaml", "--out", disk / "run", "--resume")
    status = forks.run(*words, log=log, TLSCALE_CACHE=str(disk / "cache"))
    try:
        assert status == 0, f"exit code {status}: {log.read_text()[-2000:]}"
        assert_same_runs(place / "disk" / "run", disk / "run")
    except (AssertionError, OSError) as error:
        return f"{name}: {error}"
    finally:
        shutil.rmtree(folder)
    return None


def test_every_state_goes_on_to_the_same_weights(idx, tmp_path):
    recorder, _ = record(tmp_path, idx)
    found = list(states(recorder.moments))[:: int(os.environ.get("TLSCALE_CHAOS_EVERY", "1"))]
    shares = [found[number::WORKERS] for number in range(WORKERS)]
    servers = [Forks() for _ in shares]

    def work(number):
        folder = tmp_path / f"worker{number}"
        return [fault_of(state, servers[number], tmp_path, folder) for state in shares[number]]

    with ThreadPoolExecutor(WORKERS) as pool:
        faults = [fault for faults in pool.map(work, range(WORKERS)) for fault in faults if fault is not None]
    for server in servers:
        server.close()
    KILLS["one process, states of the disk after a power loss"] += len(found)
    assert not faults, f"{len(faults)} of {len(found)}:\n" + "\n".join(faults[:20])
