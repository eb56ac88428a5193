"""Measure what agreeing on a stop costs a step: asked for in each step, as before, and every k steps (StopPoll).

    python benchmarks/stop_flag.py [--processes 4] [--steps 200] [--rounds 5] [--width 256]

Processes (gloo, on the CPU, one thread each) train a small network with DDP on random numbers. Each round makes the
same steps three times: without asking for a stop, asking all processes in each step, and with `StopPoll`. The figures
are medians over the rounds of the milliseconds of a step. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import torch
from torch import nn

from tlscale.distributed.processes import Processes, start_processes
from tlscale.distributed.signals import StopRequest
from tlscale.recipe.schema import ComputeSection
from tlscale.training.stop_poll import StopPoll

_BATCH = 32


def step_ms(processes: Processes, num_steps: int, width: int, is_stopping: Callable[[int], bool]) -> float:
    """Train so many steps, after ten to warm up; return the milliseconds of one."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    model, optimizer = processes.accelerator.prepare(network, optimizer)
    inputs = torch.randn(_BATCH, width)
    began = 0.0
    for step in range(-10, num_steps):
        if step == 0:
            processes.any(False)  # all begin together
            began = time.perf_counter()
        processes.accelerator.backward(model(inputs).square().mean())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        is_stopping(step)
    spent_s = time.perf_counter() - began
    processes.accelerator.free_memory()
    return 1e3 * spent_s / num_steps


def measure(num_steps: int, rounds: int, width: int) -> None:
    with closing(start_processes(ComputeSection(threads=1))) as processes, StopRequest() as stop:
        kinds: dict[str, list[float]] = {"never": [], "each step": [], "every k steps": []}
        asked = 0
        for _ in range(rounds):
            poll = StopPoll(processes, -11)
            kinds["never"].append(step_ms(processes, num_steps, width, lambda step: False))
            kinds["each step"].append(step_ms(processes, num_steps, width, lambda step: processes.any(stop.requested)))
            kinds["every k steps"].append(step_ms(processes, num_steps, width, poll.is_stopping))
            asked += poll.num_asked
        if processes.is_main:
            found = {f"step_ms, {kind}": round(statistics.median(values), 4) for kind, values in kinds.items()}
            facts = {"benchmark": "stop_flag", "processes": processes.world_size, "steps": num_steps, "rounds": rounds}
            print(json.dumps({**facts, **found, "questions_a_round": asked / rounds}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=256)
    args = parser.parse_args()
    if "RANK" in os.environ:
        measure(args.steps, args.rounds, args.width)
        return
    torchrun = Path(sys.executable).parent / "torchrun"
    command = [torchrun, "--standalone", "--nproc-per-node", str(args.processes), __file__, *sys.argv[1:]]
    subprocess.run(command, check=True, env={**os.environ, "ACCELERATE_USE_CPU": "true"})


if __name__ == "__main__":
    main()
