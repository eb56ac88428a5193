"""The line on training that waits for images: when it is said, and how many processes it names."""

import re

import pytest

from tlscale.tracking.stopwatch import Stopwatch
from tlscale.training.reading_check import ReadingCheck


class Training:
    """Steps on a clock of its own: so long is waited for images, and computed; then the host waits for the device."""

    def __init__(self, workers, most=15) -> None:
        self.now_s, self.said, self.settled_s, self.step = 0.0, [], 0.0, 0
        self.watch = Stopwatch(clock=lambda: self.now_s)
        self.check = ReadingCheck(self.watch, workers, most, self.said.append)

    def line(self, steps, waiting_s, computing_s, device_s=0.0):
        def batches():
            for _ in range(steps):
                self.now_s += waiting_s
                yield

        with self.watch("train"):
            for _ in self.watch.each(batches()):
                self.now_s += computing_s
            self.now_s += device_s
            self.settled_s += device_s
            self.step += steps
            self.check.at_line(self.step, self.settled_s)


@pytest.mark.parametrize(
    ("workers", "waiting_s", "computing_s", "enough"),
    [
        (4, 3.0, 1.0, 16),  # they read a batch in 4 s, all of them, and one is trained on in 1 s
        (4, 1.0, 1.0, 8),
        (0, 3.0, 1.0, 3),  # this process reads a batch in 3 s
    ],
)
def test_it_names_as_many_as_read_as_fast_as_is_trained(workers, waiting_s, computing_s, enough):
    training = Training(workers, most=16)
    training.line(10, 9.0, 1.0)  # the first line has the start of the workers in it
    training.line(10, waiting_s, computing_s)
    (line,) = training.said
    assert f"data.workers={enough} would do (now {workers})" in line
    assert f"{waiting_s / (waiting_s + computing_s):.0%}" in line


def test_it_does_not_ask_for_more_than_there_are_cores():
    training = Training(4, most=5)
    training.line(1, 3.0, 1.0)
    training.line(10, 3.0, 1.0)
    assert re.search(r"data.workers=5 reads faster .*16 processes.* cores for 5", training.said[0])
    training = Training(5, most=5)
    training.line(1, 3.0, 1.0)
    training.line(10, 3.0, 1.0)
    assert "data.workers" not in training.said[0]
    assert "data.cache_mib" in training.said[0]


def test_it_is_said_once_and_of_enough_steps():
    training = Training(2)
    for _ in range(8):
        training.line(1, 3.0, 1.0)
        assert training.said == []
    for _ in range(20):
        training.line(1, 3.0, 1.0)
    assert len(training.said) == 1


@pytest.mark.parametrize("times", [(0.1, 1.0, 0.0), (0.3, 0.1, 6.0)], ids=["it hardly waits", "the device is behind"])
def test_nothing_is_said_where_images_are_not_what_is_waited_for(times):
    training = Training(4)
    for _ in range(3):
        training.line(10, *times)
    assert training.said == []


def test_nothing_is_said_where_workers_could_take_nothing_over():
    training = Training(None)
    for _ in range(3):
        training.line(10, 3.0, 1.0)
    assert training.said == []
