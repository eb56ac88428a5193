"""A sample of the operations on files that may fail; `tests/chaos/test_failed_writes.py` has all of them."""

import re

import pytest

from tests.failing_disk import why_not_here
from tests.failing_runs import VERBS, Job, faults_of

pytestmark = pytest.mark.slow  # each starts a run twice


@pytest.fixture(scope="module")
def wholes(forks, idx, tmp_path_factory):
    """Jobs that met no failure, by verb; `trace` has their operations on files."""
    if (why := why_not_here()) is not None:
        pytest.skip(why)
    found = {}
    for verb in VERBS:
        job = found[verb] = Job(tmp_path_factory.mktemp(verb) / "job", verb, idx)
        code, said = job.start(forks, job.failing())
        assert code == 0, said
    return found


@pytest.mark.parametrize(
    ("verb", "call", "path", "name", "lasting"),
    [
        ("run", "write", r"run/metrics\.jsonl", "ENOSPC", False),
        ("run", "fsync", r"run/checkpoints/\.step_0*2\.\d+/optimizer", "EIO", False),
        ("run", "rename", r"run/checkpoints/\.step_0*4\.\d+$", "EROFS", True),
        ("run", "write", r"run/\.predictions", "EDQUOT", False),
        ("probe", "write", r"run/model/", "ENOSPC", True),
        ("codes", "fsync", r"cache/codes/.*safetensors", "EIO", False),
        ("compare", "write", r"run/\.compare\.json", "ENOSPC", True),
    ],
)
def test_a_failed_operation_is_reported_and_loses_nothing(
    forks, wholes, idx, tmp_path, verb, call, path, name, lasting
):
    trace = wholes[verb].trace()
    at = next(n for n, (its_call, its_path, _) in enumerate(trace, 1) if its_call == call and re.search(path, its_path))
    job = Job(tmp_path / "job", verb, idx)
    ended, wrong = faults_of(forks, job, wholes[verb], job.failing(at, name, lasting=lasting))
    assert (ended, wrong) == ("error", [])


@pytest.mark.parametrize("lasting", [False, True])
def test_what_cannot_be_removed_is_named_and_removed_by_the_same_line(forks, wholes, idx, tmp_path, lasting):
    trace = wholes["probe"].trace()
    at = next(n for n, (call, path, _) in enumerate(trace, 1) if call == "unlinkat" and "/.fits/" in path)
    job = Job(tmp_path / "job", "probe", idx)
    ended, wrong = faults_of(forks, job, wholes["probe"], job.failing(at, "ENOSPC", lasting=lasting))
    assert (ended, wrong) == ("success", [])
