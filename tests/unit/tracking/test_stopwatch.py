"""Where the seconds went: parts that add up to the whole, whatever is nested in what."""

import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlscale.tracking.stopwatch import PARTS, Stopwatch, describe_seconds, process_began_s


class LoopState:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_what_is_within_is_taken_out_of_what_is_around_it():
    clock = LoopState()
    watch = Stopwatch(90.0, clock)
    with watch("train"):
        clock.now_s += 3
        with watch("evaluate"):
            clock.now_s += 2
            with watch("decode"):
                clock.now_s += 5
        clock.now_s += 1
    clock.now_s += 0.5
    figures = watch.figures(images_seen=8)
    assert figures["seconds"] == {
        **dict.fromkeys(PARTS, 0.0),
        "start": 10.5,
        "train": 4.0,
        "evaluate": 2.0,
        "decode": 5.0,
    }
    assert (figures["wall_s"], figures["images_per_s"]) == (21.5, 2.0)


def test_waiting_for_batches_is_a_part_of_training():
    clock = LoopState()
    watch = Stopwatch(clock=clock)

    def batches():
        for number in range(3):
            clock.now_s += 4
            yield number

    with watch("train"):
        for _ in watch.each(batches()):
            clock.now_s += 1
    figures = watch.figures(images_seen=30)
    assert (figures["seconds"]["train"], figures["waiting_s"], figures["images_per_s"]) == (15.0, 12.0, 2.0)
    assert figures["wall_s"] == 15.0
    assert describe_seconds(figures) == "15.0 s: train 15.0 (waiting 12.0)"


def test_an_error_leaves_the_part_that_it_left():
    clock = LoopState()
    watch = Stopwatch(clock=clock)

    def fail():
        with watch("train"), watch("evaluate"):
            clock.now_s += 2
            raise KeyError

    pytest.raises(KeyError, fail)
    clock.now_s += 1
    assert watch.spent() == {"start": 1.0, "train": 0.0, "evaluate": 2.0}


def test_of_two_accounts_of_the_same_starts_the_longer_one_is_added():
    clock = LoopState()
    watch = Stopwatch(clock=clock)
    watch.add_earlier({"train": 5.0, "start": 1.0})
    watch.add_earlier({"train": 4.0, "start": 1.0})  # its checkpoint, from before it was stopped
    with watch("train"):
        clock.now_s += 2
    assert watch.spent() == {"train": 7.0, "start": 1.0}
    assert (watch.total_s(), watch.train_s()) == (8.0, 7.0)


@given(st.recursive(st.just([]), lambda deeper: st.lists(st.tuples(st.sampled_from(PARTS), deeper), max_size=3)))
def test_the_parts_add_up_to_the_whole(tree):
    clock = LoopState()
    watch = Stopwatch(clock=clock)

    def live(parts):
        clock.now_s += 0.25
        for part, within in parts:
            with watch(part):
                live(within)
            clock.now_s += 0.125

    live(tree)
    assert watch.total_s() == clock.now_s - 100.0
    assert sum(watch.figures()["seconds"].values()) == pytest.approx(clock.now_s - 100.0, abs=0.01)


def test_a_process_began_when_it_was_started():
    """Its own account against that of who started it, by the clock that both share."""
    lines = "import time; time.sleep(0.3); from tlscale.tracking.stopwatch import process_began_s as p; print(p(), p())"
    before_s = time.monotonic()
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=True)
    first_s, second_s = map(float, done.stdout.split())
    assert first_s == pytest.approx(second_s, abs=0.02)
    assert before_s - 0.02 <= first_s <= time.monotonic() - 0.3
    if sys.platform == "linux":
        assert first_s <= before_s + (time.monotonic() - before_s - 0.3), "from the start, not from the import"
    assert process_began_s() < before_s
