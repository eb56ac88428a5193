"""Steps of different lengths on each process, and a request to stop on one of them; test_stop_poll.py launches it.

stop_poll.py FOLDER
"""

import json
import os
import signal
import sys
import time
from contextlib import closing
from pathlib import Path

from tlscale.distributed.processes import start_processes
from tlscale.distributed.signals import StopRequest
from tlscale.recipe.schema import ComputeSection
from tlscale.training.stop_poll import StopPoll

MOST_STEPS = 4000
EVERY_S = 0.5


def facts_of_steps(processes, step_s, *, stop_after_s):
    """The steps at which this rank asked, the last one, and the seconds from the request to the stop."""
    with StopRequest():
        poll = StopPoll(processes, 0, every_s=EVERY_S)
        began, asked, requested_s = time.monotonic(), [], None
        for step in range(1, MOST_STEPS):
            time.sleep(step_s)
            is_one = processes.rank == processes.world_size - 1
            if is_one and requested_s is None and time.monotonic() - began > stop_after_s:
                requested_s = time.monotonic()
                os.kill(os.getpid(), signal.SIGTERM)
            before = poll.num_asked
            stopping = poll.is_stopping(step, now=step == 7)
            if poll.num_asked > before:
                asked.append(step)
            if stopping:
                waited_s = None if requested_s is None else time.monotonic() - requested_s
                return {"asked": asked, "last": step, "waited_s": waited_s}
    return {"asked": asked, "last": None, "waited_s": None}


def main():
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    with closing(start_processes(ComputeSection())) as processes:
        facts = {"rank": rank, "world_size": processes.world_size}
        # The first process is the slower one, and so sets the pace.
        facts["fast"] = facts_of_steps(processes, 0.004 if rank == 0 else 0.001, stop_after_s=2.0)
        facts["slow"] = facts_of_steps(processes, 0.6, stop_after_s=1.5)
    (folder / f"facts{rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
