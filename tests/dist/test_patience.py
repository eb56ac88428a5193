"""Early stopping on two processes: where one stops, and after kills where it would have stopped."""

import json
import signal

import pytest

from tests.chaos.killing import Place, assert_ended_as, assert_same_answers, start_all
from tests.forks import HANGS
from tests.jobs.test_choice import CHANGES
from tests.small_runs import exported, largest_difference, lines, result

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]
# A rate that grows until it is too high. In float64, in which two processes give the figures of one.
PATIENT = {
    **CHANGES,
    "compute": {"precision": "fp64"},
    "evaluate": {"every": "1 steps", "select": "loss", "choose": "best", "patience": 3},
}


def test_two_processes_stop_where_one_does_and_resumed_where_they_would_have(forks, idx, tmp_path):
    one, two, killed = (Place(tmp_path / name, PATIENT, idx) for name in ("one", "two", "killed"))
    assert forks.wait(one.start(forks)) == 0, one.output()
    assert [forks.wait(pid) for pid in start_all(forks, two, 2)] == [0, 0], two.output()
    assert json.loads((two.out / "run.json").read_text())["world_size"] == 2
    stopped = result(one.out)["stopped_early"]
    assert 3 < stopped["step"] < stopped["of_steps"] == 16
    assert result(two.out)["stopped_early"] == stopped
    losses = [[line["loss"] for line in lines(place.out, "evaluate")] for place in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    assert len(losses[0]) == stopped["step"]
    assert largest_difference(exported(one.out), exported(two.out)) < 1e-9
    # In the midst of it; where the figure that ends it is written, and not saved; when all is saved but the result.
    for fault in ("evaluated@3", f"evaluated@{stopped['step'] - 2}", "checkpoint.rename", "result"):
        ends = [forks.wait(pid) for pid in start_all(forks, killed, 2, TLSCALE_FAULT=fault)]
        assert ends[0] == -signal.SIGKILL, (fault, ends, killed.output())
        assert ends[1] not in (0, HANGS), (fault, ends, killed.output())
    assert [forks.wait(pid) for pid in start_all(forks, killed, 2)] == [0, 0], killed.output()
    assert result(killed.out)["stopped_early"] == stopped
    assert_ended_as(two.out, killed.out)
    assert_same_answers(two.out, killed.out)
