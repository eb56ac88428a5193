"""Requests to stop: what is asked for, who hears of it, and what a second one does; by real signals."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.small_runs import REPO, environment
from tlscale.distributed.signals import StopRequest, check_stop, is_stopping, stoppable
from tlscale.errors import Stopped


def test_nothing_is_asked_outside_of_a_request():
    check_stop("waiting")
    assert not is_stopping()


def test_a_loop_that_asks_is_stopped_by_name():
    with StopRequest():
        check_stop("decoding")
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped, match="^stopped by SIGTERM while decoding. What is done is kept$"):
            check_stop("decoding", "What is done is kept")


def test_a_request_within_another_hands_on_what_was_asked(tmp_path):
    with StopRequest() as outer:
        with StopRequest(tmp_path / "STOP"):
            os.kill(os.getpid(), signal.SIGTERM)
        assert outer.requested
        with StopRequest(), pytest.raises(Stopped, match="by SIGTERM"):
            check_stop("the next run")


class Shared:
    """What processes share, as a store does."""

    def __init__(self):
        self.asked = False

    def tell(self):
        self.asked = True

    def are_told(self):
        return self.asked


def test_what_one_process_is_asked_all_hear(tmp_path):
    store = Shared()
    (tmp_path / "STOP").touch()
    with StopRequest(tmp_path / "STOP", store), pytest.raises(Stopped, match="the file"):
        check_stop("decoding")
    with StopRequest(peers=store), pytest.raises(Stopped, match="a signal to another process while decoding"):
        check_stop("decoding")


def test_a_call_of_others_is_stopped_in_the_middle():
    def fit():
        os.kill(os.getpid(), signal.SIGTERM)
        with stoppable("fitting"):
            while True:
                time.sleep(0.01)

    with StopRequest(), pytest.raises(Stopped, match="while fitting"):
        fit()


SCRIPT = """
import sys, time
from tlscale.distributed.signals import StopRequest
with StopRequest():
    print("ready", flush=True)
    while True:
        time.sleep(0.01)
"""


@pytest.mark.parametrize(
    ("sent", "expected"),
    [((signal.SIGTERM, signal.SIGTERM), -signal.SIGTERM), ((signal.SIGTERM, signal.SIGINT), -signal.SIGINT)],
    ids=["SIGTERM twice", "SIGTERM, then Ctrl-C"],
)
def test_a_second_request_ends_at_once(sent, expected):
    """The loop never asks; two that come as one are one."""
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment(), cwd=REPO
    ) as process:
        process.stdout.readline()
        process.send_signal(sent[0])
        if sent[0] == sent[1]:
            process.send_signal(sent[0])
        time.sleep(1.2)
        assert process.poll() is None
        process.send_signal(sent[1])
        assert process.wait(20) == expected
