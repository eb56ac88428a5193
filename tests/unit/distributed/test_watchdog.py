"""A process that hangs ends, and says where."""

import signal
import subprocess
import sys
import time

from tests.small_runs import REPO, environment

SCRIPT = """
import sys, time
from tlscale.distributed.watchdog import Watchdog

def waits_for_ever():
    time.sleep(60)

def works(dog, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.02)
        dog.beat()

dog = Watchdog(1.0)
dog.beat()
time.sleep(1.5)  # outside of a watch
with dog.watching():
    works(dog, 2.5)
    with dog.watching():
        works(dog, 0.1)
    print("still here", flush=True)
    {then}
time.sleep(1.5)
print("over", flush=True)
"""


def run(then):
    command = [sys.executable, "-c", SCRIPT.replace("{then}", then)]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=REPO, timeout=50, check=False)
    return done, time.monotonic() - began


def test_a_process_that_hangs_ends_and_names_the_line():
    done, took_s = run("waits_for_ever()")
    assert done.stdout == "still here\n"
    assert done.returncode == 1
    assert "Timeout (0:00:01)!" in done.stderr
    assert "in waits_for_ever" in done.stderr
    assert "line 6 in waits_for_ever" in done.stderr
    assert took_s < 40


def test_a_process_that_shows_signs_of_life_goes_on():
    done, _ = run("pass")
    assert (done.stdout, done.stderr, done.returncode) == ("still here\nover\n", "", 0)


PAUSED = """
import time
from tlscale.distributed.watchdog import Watchdog

dog = Watchdog(1.0)
with dog.watching():
    print("ready", flush=True)
    time.sleep(0.5)  # without a sign of life: half of what is allowed
    dog.beat()
    print("still here", flush=True)
    time.sleep(60)
"""


def test_time_in_which_a_process_is_paused_is_not_counted():
    """It is stopped for twice as long as it may be quiet, and goes on; then it hangs, and is ended all the same."""
    command = [sys.executable, "-c", PAUSED]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), cwd=REPO
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(2.0)
        process.send_signal(signal.SIGCONT)
        assert process.stdout.readline() == "still here\n", process.stderr.read()
        assert process.wait(50) == 1
        assert "Timeout (0:00:01)!" in process.stderr.read()
