"""Fault points: each is in the code and in the list, and costs next to nothing."""

import re
import subprocess
import sys
import time

import pytest

from tests.small_runs import REPO, environment
from tlscale.errors import LaunchError
from tlscale.storage import faults


def test_the_list_is_what_is_in_the_code():
    code = "".join(path.read_text() for path in (REPO / "tlscale").rglob("*.py"))
    assert set(re.findall(r'faults\.at\("([^"]+)"\)', code)) == set(faults.POINTS)
    assert len(re.findall(r"faults\.at\(", code)) == len(re.findall(r'faults\.at\("', code))


@pytest.mark.parametrize("wanted", ["stop", "step@0", "step@-1", "step@", "step@1:", "step:one", " step", "step@1@2"])
def test_what_names_no_point_is_an_error(monkeypatch, wanted):
    monkeypatch.setenv(faults.VARIABLE, wanted)
    with pytest.raises(LaunchError, match="is not <name>"):
        faults.at("claimed")


def killed(wanted, passes, **variables):
    """How often a process came by the point `step` before it was killed; None where it was not."""
    program = f"""
from tlscale.storage import faults
for number in range({passes}):
    print(number, flush=True)
    faults.at("step")
    faults.at("stage")
print("end")
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], env=environment(TLSCALE_FAULT=wanted, **variables), stdout=subprocess.PIPE
    )
    seen = ran.stdout.decode().split()
    assert ran.returncode == (0 if seen[-1] == "end" else -9)
    return None if seen[-1] == "end" else len(seen)


def test_who_is_killed_and_when():
    assert killed("step", 5) == 1
    assert killed("step@3", 5) == 3
    assert killed("step@6", 5) is None
    assert killed("stage@2", 5) == 2
    assert killed("step:1", 5) is None
    assert killed("step@2:1", 5, RANK="1") == 2
    assert killed("step@2", 5, RANK="1") is None
    assert killed("step@2", 5, TORCHELASTIC_RESTART_COUNT="1") is None


def test_a_point_costs_microseconds(monkeypatch):
    monkeypatch.delenv(faults.VARIABLE, raising=False)
    began = time.perf_counter()
    for _ in range(10_000):
        faults.at("step")
    assert (time.perf_counter() - began) / 10_000 < 50e-6
