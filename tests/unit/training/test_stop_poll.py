"""A single process obeys a stop in the step in which it hears of it; see tests/dist/test_stop_poll.py for several."""

from contextlib import closing

from tlscale.distributed.processes import start_processes
from tlscale.distributed.signals import StopRequest
from tlscale.recipe.schema import ComputeSection
from tlscale.training.stop_poll import StopPoll


def test_one_process_stops_at_once_and_asks_nobody(tmp_path):
    with closing(start_processes(ComputeSection())) as processes, StopRequest(tmp_path / "STOP"):
        poll = StopPoll(processes, 0)
        assert not any(poll.is_stopping(step) for step in range(1, 100))
        (tmp_path / "STOP").touch()
        assert poll.is_stopping(100)
        assert poll.num_asked == 0
