"""How often several processes read files of checkpoints; test_reads.py launches it and reads its facts."""

import json
import os
import sys
from pathlib import Path

import torch

import tlscale
from tests.checkpoints import Reads
from tests.small_runs import as_after, small_recipe
from tlscale.distributed.processes import start_processes
from tlscale.recipe.schema import ComputeSection
from tlscale.training.checkpoint.sharded import load_newest_on_all

CHANGES = {
    "duration": "8 steps",
    "checkpoint": {"every": "2 steps", "keep": 2},
    "evaluate": {"every": "100 epochs"},  # the last step is the best one, so that no other is loaded in the end
    "optim": {"ema_decay": 0.9},
}


def bytes_read():
    with open("/proc/self/io") as file:
        return int(file.readline().removeprefix("rchar: "))


def bytes_of_a_load(root, engine):
    """What this process reads to load the newest checkpoint."""
    processes = start_processes(ComputeSection(engine=engine, threads=1))
    before = bytes_read()
    checkpoint, unusable = load_newest_on_all(root, {}, processes, None)
    spent = bytes_read() - before
    processes.close()
    assert (checkpoint.step, unusable) == (8, [])
    return spent


def look(folder, data, engine):
    rank = int(os.environ["RANK"])
    recipe = small_recipe(folder / f"{engine}.{rank}.yaml", data, **CHANGES, compute={"engine": engine})
    with Reads() as saving:
        tlscale.run(recipe, folder / engine)
    if rank == 0:
        as_after(6, folder / engine, folder / f"{engine}_resumed")
    torch.distributed.barrier()
    with Reads() as resuming:
        tlscale.run(recipe, folder / f"{engine}_resumed", resume=True)
    return {
        "saving": [[*key, count] for key, count in saving.counts.items()],
        "resuming": {name: count for (step, name), count in resuming.counts.items() if step == "step_00000006"},
        "bytes": bytes_of_a_load(folder / engine / "checkpoints", engine),
    }


def main():
    folder, data = Path(sys.argv[1]), Path(sys.argv[2])
    facts = {engine: look(folder, data, engine) for engine in ("ddp", "fsdp2")}
    facts |= {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
    (folder / f"facts{facts['rank']}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
