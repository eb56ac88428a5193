"""Two gloo processes, of which one, the other or both are killed; the other ends by itself, and nothing is lost."""

import contextlib
import json
import os
import shutil
import signal
import time

import pytest

from tests.chaos.killing import KILLS, Place, assert_ended_as, drawing, start_all
from tests.forks import HANGS
from tests.small_runs import last_checkpoint, result
from tests.small_runs import lines as lines_of

pytestmark = pytest.mark.long
# Name -> for each start, the faults of one or both ranks.
AT_POINTS = {
    "rank 1 after a step, again and again": ["step@4:1", "step@2:1", "step@1:1"],
    "rank 0 while it saves": ["checkpoint.file@4", "checkpoint.rename", "checkpoint.latest"],
    "rank 0 while it cuts the log": ["step@6", "metrics.cut"],
    "rank 1 on resuming": ["step@6:1", "restored:1", "restored:1"],
    "rank 0 on resuming": ["step@6", "restored", "claimed"],
    "rank 1 in an evaluation": ["evaluate@2:1", "evaluate:1"],
    "rank 0 between evaluation and save": ["evaluated@2", "checkpoint.best"],
    "rank 0 in its codes": ["codes.block", "codes.shard", "codes.place"],
    "rank 0 at the end": ["export", "result"],
    "rank 1 at a stage's end": ["stage:1", "stage@1:1"],
}
STAGED = ("rank 0 in its codes", "rank 1 at a stage's end")
NUM_TIMES = 5
TIMEOUT_S = 90  # for the one that is left


@pytest.fixture(scope="module")
def whole(forks, idx, tmp_path_factory):
    """The runs that nobody killed."""
    folder = tmp_path_factory.mktemp("whole")
    places = {name: Place(folder / name, name, idx) for name in ("several", "staged")}
    for place in places.values():
        began = time.monotonic()
        assert ends_of(forks, start_all(forks, place, 2)) == [0, 0], place.output()
        place.seconds = time.monotonic() - began
        assert_by_two(place)
    return places


def assert_by_two(place):
    assert json.loads((place.out / "run.json").read_text())["world_size"] == 2


def ends_of(forks, pids):
    return [forks.wait(pid, TIMEOUT_S) for pid in pids]


def end_as_whole(forks, place, whole):
    assert ends_of(forks, start_all(forks, place, 2)) == [0, 0], place.output()
    assert_by_two(place)
    assert_ended_as(whole.out, place.out)


@pytest.mark.parametrize("name", AT_POINTS)
def test_killed_at_a_point(forks, whole, idx, tmp_path, name):
    recipe = "staged" if name in STAGED else "several"
    place = Place(tmp_path / "place", recipe, idx)
    for fault in AT_POINTS[name]:
        killed = int(fault.partition(":")[2] or 0)
        ends = ends_of(forks, start_all(forks, place, 2, TLSCALE_FAULT=fault))
        assert ends[killed] == -signal.SIGKILL, (fault, ends, place.output())
        assert ends[1 - killed] not in (0, HANGS), (fault, ends, place.output())
        KILLS[f"rank {killed} of two, at a point"] += 1
    end_as_whole(forks, place, whole[recipe])


@pytest.mark.parametrize("number", range(NUM_TIMES))
def test_killed_at_any_time(forks, whole, idx, tmp_path, number):
    """One of them, or both at once, up to three times."""
    place, draw = Place(tmp_path / "place", "several", idx), drawing(f"two, any time, {number}")
    for start in range(3):
        killed = draw.choice([[0], [1], [0, 1]])
        moment_s = draw.uniform(0.0, whole["several"].seconds / (1 + start))
        print(f"{killed} after {moment_s:.2f} s")
        pids = start_all(forks, place, 2)
        time.sleep(moment_s)
        for rank in killed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pids[rank], signal.SIGKILL)
        ends = ends_of(forks, pids)
        if ends == [0, 0]:
            break
        assert HANGS not in ends, place.output()
        KILLS["one or both of two, any time"] += ends.count(-signal.SIGKILL)
    end_as_whole(forks, place, whole["several"])


def test_killed_before_operations_on_files(forks, whole, idx, tmp_path):
    place, draw = Place(tmp_path / "place", "staged", idx), drawing("two, files")
    for rank, most in ((0, 120), (1, 15), (0, 80)):
        dying = {rank: {"die_at": draw.randint(1, most), "within": (place.out, place.cache)}}
        print(dying)
        ends = ends_of(forks, start_all(forks, place, 2, by_rank=dying))
        assert ends[rank] == -signal.SIGKILL, (ends, place.output())
        assert ends[1 - rank] not in (0, HANGS), (ends, place.output())
        KILLS[f"rank {rank} of two, before an operation on a file"] += 1
    end_as_whole(forks, place, whole["staged"])


# --- A newest checkpoint that is damaged ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(forks, idx, tmp_path_factory):
    """A run that was killed when it had three checkpoints or more."""
    place = Place(tmp_path_factory.mktemp("stopped") / "place", "several", idx)
    ends = ends_of(forks, start_all(forks, place, 2, TLSCALE_FAULT="step@9"))
    assert ends[0] == -signal.SIGKILL, place.output()
    assert ends[1] not in (0, HANGS)
    KILLS["rank 0 of two, at a point"] += 1
    return place


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a bit of the model": lambda newest: flip(newest / "model.safetensors"),
    "the optimizer cut short": lambda newest: os.truncate(newest / "optimizer.safetensors", 100),
    "no manifest": lambda newest: (newest / "manifest.json").unlink(),
    "all files empty": lambda newest: [os.truncate(path, 0) for path in newest.iterdir()],
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_newest_checkpoint_is_passed_over_by_both(forks, whole, stopped, idx, tmp_path, name):
    place = Place(tmp_path / "place", "several", idx)
    shutil.copytree(stopped.out, place.out)
    newest, before = last_checkpoint(place.out), sorted((place.out / "checkpoints").glob("step_*"))[-2]
    DAMAGES[name](newest)
    end_as_whole(forks, place, whole["several"])
    said = " ".join(place.log.with_name("log0").read_text().split())
    assert said.count("WARNING: the checkpoint") == 1
    assert f"{newest}' cannot be used:" in said
    assert f"resumed from {before}" in said
    assert "Traceback" not in place.said()
    assert [record["step"] for record in lines_of(place.out, "train")] == list(range(1, 14))


def test_none_that_can_be_used_ends_both_with_one_message(forks, stopped, idx, tmp_path):
    place = Place(tmp_path / "place", "several", idx)
    shutil.copytree(stopped.out, place.out)
    for folder in (place.out / "checkpoints").glob("step_*"):
        flip(folder / "model.safetensors")
    files = {path: path.read_bytes() for path in place.out.rglob("*") if path.is_file() and path.name != ".lock"}
    assert ends_of(forks, start_all(forks, place, 2)) == [1, 1]
    assert place.said().count("can be used:") == 1
    assert "Traceback" not in place.said()
    assert {path: path.read_bytes() for path in files} == files
    assert not (place.out / "result.json").exists()


def test_the_results_are_figures_of_a_run(whole):
    """That what everything is compared with is a run that learned something."""
    for place in whole.values():
        losses = [record["loss"] for record in lines_of(place.out, "train")]
        assert losses[-1] < losses[0]
        assert result(place.out)["steps"] == 13
