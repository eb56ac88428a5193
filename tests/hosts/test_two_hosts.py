"""2 x 2 processes on two hosts: the run of four on one, also when a host dies or a cable is pulled."""

import json
import sys
import time
from pathlib import Path

import pytest

from tests.chaos.killing import Place, assert_ended_as, start_all
from tests.hosts.two_hosts import TwoHosts, why_not
from tests.small_runs import lines, logged

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
BIN = Path(sys.executable).parent
CHANGES = ("duration=40 steps", "compute.hang_timeout_s=30")
END_S = 150  # for a launcher to notice, on a busy machine


def torchrun(hosts, place, host):
    """The line for a host: the hosts meet at host0, and wait for each other."""
    words = (
        *(BIN / "torchrun", "--nnodes", 2, "--nproc-per-node", 2, "--rdzv-backend", "c10d"),
        *("--rdzv-endpoint", "host0:29400", "--rdzv-id", "run", "tlscale/run.py", *place.words[1:]),
    )
    return hosts.start(host, *words, log=place.log.with_name(f"log{host}"), **ENVIRONMENT, **place.variables)


def launch_file(hosts, place, host):
    """`accelerate launch --num_machines 2 --machine_rank <host>`, as the file for users has it."""
    variables = {"MACHINE_RANK": str(host), "MASTER_ADDR": "host0", "PROCESSES_PER_HOST": "2"}
    variables |= {"RUN_DIR": str(place.out), "PYTHON": sys.executable}
    words = ("bash", "launch/two_hosts.sh", place.words[1], *CHANGES)
    log = place.log.with_name(f"log{host}")
    return hosts.start(host, *words, log=log, **ENVIRONMENT, **variables, **place.variables)


LAUNCHERS = {"torchrun": torchrun, "launch/two_hosts.sh": launch_file}
ENVIRONMENT = {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "eth0"}


@pytest.fixture(scope="module")
def whole(forks, idx, tmp_path_factory):
    """The run of four processes on one host."""
    place = Place(tmp_path_factory.mktemp("whole") / "place", "several", idx)
    place.words += CHANGES
    assert [forks.wait(pid, 300) for pid in start_all(forks, place, 4)] == [0] * 4, place.output()
    assert_by_four(place)
    return place


@pytest.fixture
def hosts(tmp_path):
    reason = why_not()
    if reason:
        pytest.skip(reason)
    hosts = TwoHosts(tmp_path)
    try:
        yield hosts
    finally:
        hosts.close()


@pytest.fixture
def place(idx, tmp_path):
    place = Place(tmp_path / "place", "several", idx)
    place.words += CHANGES
    return place


def assert_by_four(place):
    assert json.loads((place.out / "run.json").read_text())["world_size"] == 4


def start_both(hosts, place, launcher):
    return [LAUNCHERS[launcher](hosts, place, host) for host in range(2)]


def wait_for_step(place, step, started):
    end, has_come = time.monotonic() + 180, logged(place.out, step)
    while not has_come():
        assert all(process.poll() is None for process in started), place.output()
        assert time.monotonic() < end, place.output()
        time.sleep(0.005)


def end_as_whole(started, place, whole):
    assert [process.wait(300) for process in started] == [0, 0], place.output()
    assert_by_four(place)
    assert_ended_as(whole.out, place.out)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_hosts_end_as_one(hosts, whole, place, launcher):
    started = start_both(hosts, place, launcher)
    wait_for_step(place, 3, started)
    for host in range(2):
        workers = [pid for pid in hosts.processes(host) if b"\0RANK=" in Path(f"/proc/{pid}/environ").read_bytes()]
        assert len(workers) == 2, "two processes on each host"
    end_as_whole(started, place, whole)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_host_dies_and_both_lines_are_started_again(hosts, whole, place, launcher, victim):
    """As a cluster does it: the launcher of the other host ends by itself, and the job is queued again."""
    started = start_both(hosts, place, launcher)
    wait_for_step(place, 8, started)
    assert hosts.kill(victim) >= 3
    assert started[1 - victim].wait(END_S) != 0
    assert max(record["step"] for record in lines(place.out)) < 40
    assert not (place.out / "result.json").exists()
    end_as_whole(start_both(hosts, place, launcher), place, whole)
    assert "resumed from" in place.said()


def test_a_cable_is_pulled_and_nobody_waits_for_ever(hosts, whole, place):
    """By the launch file; torchrun's agent itself waits for minutes for a c10d store that it cannot reach."""
    launcher = "launch/two_hosts.sh"
    started = start_both(hosts, place, launcher)
    wait_for_step(place, 8, started)
    hosts.set_link(1, "down")
    began = time.monotonic()
    ends = [process.wait(END_S) for process in started]
    print(f"ended with {ends} after {time.monotonic() - began:.0f} s")
    assert 0 not in ends
    assert "Timeout (0:00:30)!" in place.said()
    assert not (place.out / "result.json").exists()
    hosts.set_link(1, "up")
    end_as_whole(start_both(hosts, place, launcher), place, whole)
