"""Damaged images, and predictions that cannot be written, on one of several processes; test_damaged.py launches it and
reads its facts.

damaged.py FOLDER DATA ENGINE
"""

import json
import os
import sys
from pathlib import Path

import torch

import tlscale
from tests.small_runs import small_recipe
from tlscale.data.sampler import eval_rows, micro_batches
from tlscale.distributed.processes import start_processes
from tlscale.errors import TlscaleError
from tlscale.recipe.schema import ComputeSection
from tlscale.training.checkpoint.files import list_checkpoints
from tlscale.training.predictions import Predictions, write_predictions
from tlscale.training.setup import set_up

RANK = int(os.environ["RANK"])


def error_of(job):
    try:
        job()
    except TlscaleError as error:
        return {"kind": type(error).__name__, "message": str(error)}
    return None


def recipe_of(folder, data, engine="ddp"):
    changes = {"data": {"source": "folder", "cache_mib": 0}, "evaluate": {"every": "2 steps"}}
    return small_recipe(folder / f"{engine}.{RANK}.yaml", data, **changes, compute={"engine": engine})


def while_damaged(path, jobs):
    """Do the jobs while the image is damaged; what they raise."""
    content = path.read_bytes()
    torch.distributed.barrier()
    if RANK == 0:
        path.write_bytes(content[:100])
    torch.distributed.barrier()
    errors = [error_of(job) for job in jobs]
    torch.distributed.barrier()
    if RANK == 0:
        path.write_bytes(content)
    torch.distributed.barrier()
    return errors


def damaged_training(folder, data, engine):
    recipe, out = recipe_of(folder, data, engine), folder / f"{engine}_training"
    setup = set_up(recipe, world_size=2)
    (batch,) = micro_batches(setup.order, 2, setup.split, 1)
    path = setup.data.train.file_of(int(batch.rows_B[0]))
    errors = while_damaged(path, [lambda: tlscale.run(recipe, out)])
    saved = [folder.name for folder in list_checkpoints(out / "checkpoints")]
    tlscale.run(recipe, out, resume=True)
    return {"path": str(path), "error": errors[0], "saved": saved}


def damaged_test(folder, data, engine):
    recipe, out = recipe_of(folder, data, engine), folder / f"{engine}_test"
    split = set_up(recipe, world_size=2).data.test
    path = split.file_of(int(next(iter(eval_rows(len(split), 1, 2, 4)))[0]))
    errors = while_damaged(path, [lambda: tlscale.run(recipe, out)])
    there = [(out / name).exists() for name in ("model/config.json", "predictions.parquet", "result.json")]
    tlscale.run(recipe, out, resume=True)
    return {"path": str(path), "error": errors[0], "there": there}


def predictions_fail(folder, data, rank):
    """Rows that one process cannot put together, as it knows too few classes."""
    processes = start_processes(ComputeSection(threads=1))
    found = set_up(recipe_of(folder, data), world_size=2).data
    predictions = Predictions(found.test, found.classes[:1] if rank == RANK else found.classes)
    predictions.add(torch.arange(10) + 10 * RANK, torch.zeros(10, len(predictions.classes)))
    error = error_of(lambda: write_predictions(folder / "p.parquet", predictions, processes))
    processes.close()
    return error


def main():
    folder, data, engine = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    tlscale.run(recipe_of(folder, data, engine), folder / f"{engine}_whole")
    facts = {
        "rank": RANK,
        "world_size": int(os.environ["WORLD_SIZE"]),
        "training": damaged_training(folder, data, engine),
        "test": damaged_test(folder, data, engine),
        "predictions": [predictions_fail(folder, data, rank) for rank in (0, 1)],
    }
    (folder / f"facts{RANK}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
