"""Kill -9 of a real run, the most telling moments; `make test-chaos` has the others."""

import json
import os
import signal

import pytest

from tests.chaos.killing import (
    Place,
    assert_ended_as,
    assert_same_answers,
    last_codes,
    start_all,
    start_and_kill,
    wait_for,
)
from tests.forks import HANGS
from tests.small_runs import logged
from tlscale.errors import EXIT_BAD_INPUT


@pytest.fixture(scope="module")
def whole(forks, idx, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    places = {name: Place(folder / name, name, idx) for name in ("staged", "workers")}
    for place in places.values():
        assert forks.wait(place.start(forks)) == 0, place.output()
    return places


def test_killed_again_and_again_a_run_ends_as_one_that_was_not(forks, whole, idx, tmp_path):
    place = Place(tmp_path / "place", "staged", idx)
    for fault in (
        "codes.shard", "record", "file.rename@2", "checkpoint.rename", "metrics.line@2", "checkpoint.latest", "stage",
    ):  # fmt: skip
        assert start_and_kill(forks, place, "fault", fault)
    assert forks.wait(place.start(forks)) == 0, place.output()
    assert_ended_as(whole["staged"].out, place.out)


@pytest.mark.parametrize(("kind", "first"), [("viewed", "codes.block@4"), ("probed views", "codes.block@5")])
def test_killed_in_the_codes_of_another_view_and_resumed(forks, idx, tmp_path, kind, first):
    """Two blocks are of training images, then one of each: the plain split, and its other views."""
    whole, place = (Place(tmp_path / name, kind, idx) for name in ("whole", "killed"))
    assert forks.wait(whole.start(forks)) == 0, whole.output()
    for fault in (first, "codes.place", "codes.shard", "codes.block@2"):
        assert start_and_kill(forks, place, "fault", fault)
        assert last_codes(place).startswith("validation, center+")
    assert forks.wait(place.start(forks)) == 0, place.output()
    assert last_codes(place) == "test, center+flip+vertical_flip"
    if kind == "viewed":
        assert_ended_as(whole.out, place.out)
    assert_same_answers(whole.out, place.out)


def test_two_jobs_in_one_run_folder(forks, whole, idx, tmp_path):
    """The second refuses, however it is started, and the first is not harmed."""
    place = Place(tmp_path / "place", "workers", idx)
    first = place.start(forks)
    wait_for(logged(place.out, 2))
    os.kill(first, signal.SIGSTOP)  # it is still there when the second has started
    try:
        for option in ("--resume", "--overwrite", None):
            log = tmp_path / f"second{option}"
            words = [word for word in (*place.words[:-1], option) if word]
            assert forks.run(*words, log=log, **place.variables) == EXIT_BAD_INPUT
            assert f"another job is writing to '{place.out}'" in log.read_text()
            assert "Traceback" not in log.read_text()
    finally:
        os.kill(first, signal.SIGCONT)
    assert forks.wait(first) == 0, place.output()
    assert_ended_as(whole["workers"].out, place.out)


@pytest.mark.dist
def test_four_processes_of_which_one_is_killed(forks, idx, tmp_path):
    """Not two, for which the order of a sum does not matter: DDP adds otherwise in the first step after a start."""
    whole, killed = (Place(tmp_path / name, "several", idx) for name in ("whole", "killed"))
    assert [forks.wait(pid) for pid in start_all(forks, whole, 4)] == [0] * 4, whole.output()
    ends = [forks.wait(pid) for pid in start_all(forks, killed, 4, TLSCALE_FAULT="step@7:1")]
    assert ends.pop(1) == -signal.SIGKILL, killed.output()
    assert not {0, HANGS} & set(ends), killed.output()
    assert [forks.wait(pid) for pid in start_all(forks, killed, 4)] == [0] * 4, killed.output()
    assert json.loads((killed.out / "run.json").read_text())["world_size"] == 4
    assert_ended_as(whole.out, killed.out)


def test_a_fault_point_that_is_not_there_is_an_error(forks, idx, tmp_path):
    place = Place(tmp_path / "place", "staged", idx)
    for wrong in ("nothing", "step@0", "step@", "step@1:x", "step:1:1", "STEP", "step@1 "):
        assert forks.wait(place.start(forks, TLSCALE_FAULT=wrong)) == EXIT_BAD_INPUT
        assert f"TLSCALE_FAULT={wrong} is not <name>[@<n>][:<rank>] of a fault point: claimed," in place.said()
