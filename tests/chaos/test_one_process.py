"""One process, killed at every fault point, before operations on files, and at any time; again in the resumed run."""

import os
import queue
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.chaos.killing import KILLS, Place, assert_ended_as, children_of, drawing, start_and_kill, wait_for
from tests.forks import Forks
from tests.small_runs import lines, logged, result
from tlscale.errors import EXIT_STOPPED
from tlscale.storage.faults import POINTS

pytestmark = pytest.mark.long
NUM_TIMES, NUM_FILES = 8, 8  # runs that are killed at random; each up to three times

# Point -> the faults of the first start, the second and so on, or how often a start comes to the point at most, from
# which is drawn. Of the run "staged" unless the name says otherwise.
AT_POINTS = {
    "claimed": ["claimed", "step@6", "claimed"],
    "record": ["record", "record"],
    "file.rename": 25,
    "restored": ["step@7", "restored", "restored"],
    "metrics.cut": ["step@8", "metrics.cut", "metrics.cut"],
    "metrics.line": 12,
    "codes.block": ["codes.block@3", "codes.block"],
    "codes.shard": ["codes.shard@2", "codes.shard"],
    "codes.place": ["codes.place@2", "codes.place"],
    "step": 12,
    "evaluate": 3,
    "evaluated": 3,
    "checkpoint.begin": 5,
    "checkpoint.file": 12,
    "checkpoint.manifest": 5,
    "checkpoint.rename": 5,
    "checkpoint.latest": 5,
    "checkpoint.best": 5,
    "checkpoint.prune": 2,
    "stage": ["stage", "stage"],
    "export": ["export", "export"],
    "predictions": ["predictions", "predictions"],
    "result": ["result", "result"],
}
ELSEWHERE = {
    "clear": "test_killed_while_a_run_is_replaced",
    "worker": "test_a_worker_that_is_killed_ends_the_run_and_loses_nothing",
}
# The last checkpoint is there, and what comes after it is not: nothing will be saved again.
LAST = {"the last LATEST": "checkpoint.latest", "the last BEST": "checkpoint.best"}
TRIALS = [
    *AT_POINTS,
    *LAST,
    *(f"any time, {number}" for number in range(NUM_TIMES)),
    *(f"any file, {number}" for number in range(NUM_FILES)),
]


def test_every_fault_point_has_a_test():
    assert AT_POINTS.keys() | ELSEWHERE.keys() == POINTS.keys()
    assert all(name in globals() for name in ELSEWHERE.values())


@pytest.fixture(scope="module")
def pool():
    """Two fork servers, for as many threads."""
    forks = queue.Queue()
    for _ in range(2):
        forks.put(Forks())
    yield forks
    for _ in range(2):
        forks.get(timeout=300).close()


@pytest.fixture(scope="module")
def whole(pool, idx, tmp_path_factory):
    """Each recipe's run that nobody kills: its place, with its seconds and the number of its operations on files."""
    folder, forks = tmp_path_factory.mktemp("whole"), pool.get()
    places = {name: Place(folder / name, name, idx) for name in ("staged", "workers", "probed")}
    for place in places.values():
        began = time.monotonic()
        pid = place.start(forks, die_at=0, within=(place.out, place.cache))
        assert forks.wait(pid) == 0, place.output()
        place.seconds = time.monotonic() - began
        place.num_files = int(Path(f"{place.log}.count").read_text())
    pool.put(forks)
    return places


def kills_of(name, there):
    """What is done to the starts of a trial, one after the other: (kind, value)."""
    draw = drawing(name)
    if name in LAST:
        # Every second step, the ends of the stages, and what was chosen so far.
        saves = {*range(2, 13, 2), 5, 9, 13, *chosen_steps(there.out)}
        return [("fault", f"{LAST[name]}@{len(saves)}")]
    if name.startswith("any time"):
        return [("time", draw.uniform(0.0, there.seconds / (1 + start))) for start in range(3)]
    if name.startswith("any file"):
        return [("file", draw.randint(1, there.num_files // (1 + start))) for start in range(3)]
    faults = AT_POINTS[name]
    if isinstance(faults, int):
        faults = [f"{name}@{draw.randint(1, faults)}", name]
    return [("fault", fault) for fault in faults]


def chosen_steps(out):
    """The steps whose evaluation was within a standard error of the best so far, or the best."""
    best, error, steps = -1.0, 0.0, []
    for record in lines(out, "evaluate"):
        if record["split"] == "validation" and record["top1"] >= best - error:
            steps = [*steps, record["step"]]
            if record["top1"] > best:
                best, error = record["top1"], record["top1_se"]
    return steps


def end_as_whole(pool, whole, folder, idx, name):
    forks = pool.get()
    try:
        recipe = "workers" if name.startswith("any") and name[-1] in "02468" else "staged"
        place = Place(folder / name.replace(" ", "_"), recipe, idx)
        for kind, value in kills_of(name, whole[recipe]):
            print(f"{name}: {kind} {value}")
            if not start_and_kill(forks, place, kind, value):
                break
        if name in LAST:
            assert (place.out / "checkpoints" / "step_00000013").is_dir()
            assert not (place.out / "model").exists()
        status = forks.wait(place.start(forks))
        assert status == 0, place.output()
        assert_ended_as(whole[recipe].out, place.out)
    finally:
        pool.put(forks)


@pytest.fixture(scope="module")
def trials(request, pool, whole, idx, tmp_path_factory):
    """All trials that are asked for, two at a time; a test waits for its own."""
    items = [item for item in request.session.items if item.module is request.module and hasattr(item, "callspec")]
    names = [item.callspec.params.get("name") for item in items]
    folder = tmp_path_factory.mktemp("trials")
    threads = ThreadPoolExecutor(2)
    yield {name: threads.submit(end_as_whole, pool, whole, folder, idx, name) for name in names if name in TRIALS}
    threads.shutdown(cancel_futures=True)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", TRIALS)
def test_a_run_that_was_killed_ends_as_one_that_was_not(trials, name):
    trials[name].result()


@pytest.mark.timeout(900)
def test_there_were_forty_kills_at_least(trials):
    for trial in trials.values():
        trial.exception()
    print(dict(KILLS))
    assert KILLS["one process, fault"] >= 40
    assert KILLS["one process, time"] >= NUM_TIMES
    assert KILLS["one process, file"] >= NUM_FILES


# --- Other ends -------------------------------------------------------------------------------------------------------


@pytest.fixture
def forks(pool):
    taken = pool.get(timeout=600)
    yield taken
    pool.put(taken)


def test_killed_while_a_run_is_replaced(forks, whole, idx, tmp_path):
    """Half of the old one is gone; the same line, and the line with --resume, begin the new one."""
    place = Place(tmp_path / "place", "workers", idx)
    assert forks.wait(place.start(forks)) == 0, place.output()
    first = result(place.out)
    replace = [*place.words[:-1], "--overwrite", "seed=3"]
    resume = [*place.words, "seed=3"]
    removing = {"within": (place.out,), **place.variables}
    for more in [{"TLSCALE_FAULT": "clear"}, {"die_at": 15}, {"die_at": 25}, {"die_at": 35}]:
        status = forks.run(*replace, log=place.log, **removing, **more)
        assert status == -signal.SIGKILL, (more, status, place.output())
        KILLS["one process, while a run is replaced"] += 1
    assert forks.run(*resume, log=place.log, **place.variables) == 0, place.output()
    assert result(place.out)["confusion"] != first["confusion"], "the seed is another"
    other = Place(tmp_path / "other", "workers", idx)
    assert forks.run(*other.words, "seed=3", log=other.log, **other.variables) == 0
    assert_ended_as(other.out, place.out)


def test_a_probe_that_was_killed_ends_as_one_that_was_not(forks, whole, idx, tmp_path):
    place = Place(tmp_path / "place", "probed", idx)
    for fault in ("codes.shard@2", "codes.place", "record", "metrics.line@3", "export", "result"):
        assert start_and_kill(forks, place, "fault", fault)
    assert forks.wait(place.start(forks)) == 0, place.output()
    ends = [result(out) for out in (whole["probed"].out, place.out)]
    for key in ("top1", "loss", "confusion", "probe"):
        assert ends[0][key] == ends[1][key]
    files = [sorted((out / "model").iterdir()) for out in (whole["probed"].out, place.out)]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]


@pytest.mark.parametrize("how", ["at a fault point", "from outside"])
def test_a_worker_that_is_killed_ends_the_run_and_loses_nothing(forks, whole, idx, tmp_path, how):
    place = Place(tmp_path / "place", "workers", idx)
    if how == "from outside":
        pid = place.start(forks)
        wait_for(logged(place.out, 3))
        os.kill(wait_for(lambda: children_of(pid))[0], signal.SIGKILL)
        status = forks.wait(pid)
        if status == 0:
            pytest.skip("the run was over before its worker was killed")
    else:
        status = forks.wait(place.start(forks, TLSCALE_FAULT="worker@9"))
    assert status == 1, place.output()
    KILLS["a data worker"] += 1
    assert "tlscale: data.workers: a process that reads images was killed (" in place.said(), place.output()
    assert "Traceback" not in place.output()
    assert forks.wait(place.start(forks)) == 0, place.output()
    assert_ended_as(whole["workers"].out, place.out)


def test_the_workers_of_a_run_that_is_killed_do_not_keep_its_folder(forks, whole, idx, tmp_path):
    """A forked worker holds the lock as well; the next start must not be refused until it notices."""
    place = Place(tmp_path / "place", "workers", idx)
    for _ in range(3):
        pid = place.start(forks)
        wait_for(lambda pid=pid: len(children_of(pid)) == 2)
        os.kill(pid, signal.SIGKILL)
        assert forks.wait(pid) == -signal.SIGKILL
        KILLS["one process with two data workers"] += 1
    assert forks.wait(place.start(forks)) == 0, place.output()
    assert_ended_as(whole["workers"].out, place.out)


# While the first checkpoint is written: before its model file is flushed, and before its manifest is written.
IN_A_SAVE = ("/checkpoints/.step_", "/.manifest.json")  # the codes, which are stored before, have neither
SIGNALS = {
    "SIGTERM": (["SIGTERM"], EXIT_STOPPED),
    "SIGTERM twice": (["SIGTERM", "SIGTERM"], EXIT_STOPPED),
    "SIGTERM, then Ctrl-C": (["SIGTERM", "SIGINT"], 1),
    "Ctrl-C twice": (["SIGINT", "SIGINT"], 1),
}


@pytest.mark.parametrize("name", SIGNALS)
def test_signals_while_a_checkpoint_is_written(forks, whole, idx, tmp_path, name):
    place = Place(tmp_path / "place", "staged", idx)
    sent, expected = SIGNALS[name]
    status = forks.wait(place.start(forks, signals=list(zip(IN_A_SAVE, sent, strict=False))))
    assert status == expected, place.output()
    steps = sorted(path.name for path in (place.out / "checkpoints").glob("step_*"))
    if expected == EXIT_STOPPED:
        assert f"stopped by {sent[0]} after step" in place.said()
        assert steps[0] == "step_00000002", "the save that was interrupted is whole"
        assert (place.out / "checkpoints" / "LATEST").read_text().strip() == steps[-1]
    else:
        assert steps == [], "ended at once"
    assert forks.wait(place.start(forks)) == 0, place.output()
    assert_ended_as(whole["staged"].out, place.out)
