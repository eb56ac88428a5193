"""Every operation on files of a run, and of a comparison, fails once; of the other verbs the first and the last of each
place in the program.

The errors take turns: TLSCALE_CHAOS_SEED says which one is first. As many trials are made at a time as there are cores,
each in forks of a process of its own that has everything imported (`tests/forks.py`); none knows of the others.
"""

import os
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue

import pytest

from tests.chaos.killing import SEED
from tests.failing_disk import ERRNOS, why_not_here
from tests.failing_runs import VERBS, Job, faults_of, first_and_last_of_each_site
from tests.forks import Forks

pytestmark = [pytest.mark.long, pytest.mark.timeout(7200)]  # hundreds of runs each
_LASTING_EVERY = 12  # operations: from these on the disk stays as it is
_AT_A_TIME = min(4, os.cpu_count() or 1)


@contextmanager
def several(forks):
    """A queue of processes that fork, each for one trial at a time."""
    free, more = SimpleQueue(), [Forks() for _ in range(_AT_A_TIME - 1)]
    for one in (forks, *more):
        free.put(one)
    try:
        yield free
    finally:
        for one in more:
            one.close()


@pytest.mark.parametrize("verb", VERBS)
def test_every_operation_fails_once(forks, idx, tmp_path, verb):
    if (why := why_not_here()) is not None:
        pytest.skip(why)
    whole = Job(tmp_path / "whole", verb, idx)
    code, said = whole.start(forks, whole.failing())
    assert code == 0, said
    trace = whole.trace()
    numbers = range(1, len(trace) + 1) if verb in ("run", "compare") else first_and_last_of_each_site(trace)
    trials = [(at, False) for at in numbers] + [(at, True) for at in numbers if at % _LASTING_EVERY == 0]
    counts, faults = Counter(), {}

    def try_one(number, at, lasting):
        job, name, own = Job(tmp_path / f"job{number}", verb, idx), ERRNOS[number % len(ERRNOS)], free.get()
        try:
            ended, wrong = faults_of(own, job, whole, job.failing(at, name, lasting=lasting))
        finally:
            free.put(own)
        counts[name, ended] += 1
        if wrong:
            faults[at, *trace[at - 1][:2], name, "lasting" if lasting else "once"] = wrong
        shutil.rmtree(job.folder)

    with several(forks) as free, ThreadPoolExecutor(_AT_A_TIME) as pool:
        list(pool.map(try_one, range(SEED, SEED + len(trials)), *zip(*trials, strict=True)))
    print(f"tlscale {verb}: {len(trace)} operations, {len(trials)} trials:", dict(sorted(counts.items())))
    assert faults == {}
    assert counts.total() == len(trials) > 20
    assert sum(count for (_, ended), count in counts.items() if ended == "error") > len(trials) / 2
