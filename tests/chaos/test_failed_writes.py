"""Every operation on files of a run, and of a comparison, fails once; of the other verbs the first and the last of each
place in the program.

The errors take turns: TLSCALE_CHAOS_SEED says which one is first.
"""

import shutil
from collections import Counter

import pytest

from tests.chaos.killing import SEED
from tests.failing_disk import ERRNOS, why_not_here
from tests.failing_runs import VERBS, Job, faults_of, first_and_last_of_each_site

pytestmark = [pytest.mark.long, pytest.mark.timeout(7200)]  # hundreds of runs each
_LASTING_EVERY = 12  # operations: from these on the disk stays as it is


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
    for number, (at, lasting) in enumerate(trials, start=SEED):
        job, name = Job(tmp_path / "job", verb, idx), ERRNOS[number % len(ERRNOS)]
        ended, wrong = faults_of(forks, job, whole, job.failing(at, name, lasting=lasting))
        counts[name, ended] += 1
        if wrong:
            faults[at, *trace[at - 1][:2], name, "lasting" if lasting else "once"] = wrong
        shutil.rmtree(job.folder)
    print(f"tlscale {verb}: {len(trace)} operations, {len(trials)} trials:", dict(sorted(counts.items())))
    assert faults == {}
    assert counts.total() == len(trials) > 20
    assert sum(count for (_, ended), count in counts.items() if ended == "error") > len(trials) / 2
