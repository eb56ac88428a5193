"""An image that makes one process's loss NaN, under each policy; test_non_finite.py launches it.

non_finite.py FOLDER DATA
"""

import json
import os
import sys
from pathlib import Path

import tlscale
from tests.dist.many_checks import before_each_step, equal_on_all_ranks, error_of
from tests.jobs.test_non_finite import BASE
from tests.small_runs import small_recipe

POLICIES = ("raise", "skip")


def changes_of(action):
    return {**BASE, "duration": "2 epochs", "checkpoint": {"every": "4 steps"}, "non_finite": {"action": action}}


def facts_of_run(folder, data, action, rank):
    """What this rank made of it: the error, the steps that were begun with the white image here, what is agreed on."""
    labels, agreed = [], []

    def look(batches, state):
        # What every rank has when a step begins, whatever became of the one before.
        agreed.append(equal_on_all_ranks([*state.network.parameters(), *state.ema.averages.values()]))
        white = [batch.images_BCHW[: batch.num_real].flatten(1).float().std(1).eq(0).any().item() for batch in batches]
        labels.append(any(white))

    recipe = small_recipe(folder / f"{action}.{rank}.yaml", data, **changes_of(action))
    with before_each_step(look):
        error = error_of(lambda: tlscale.run(recipe, folder / action))
    return {"error": error, "has_white": labels, "agreed": agreed}


def main():
    folder, data = Path(sys.argv[1]), Path(sys.argv[2])
    rank = int(os.environ["RANK"])
    facts = {"rank": rank, "world_size": int(os.environ["WORLD_SIZE"])}
    facts |= {action: facts_of_run(folder, data, action, rank) for action in POLICIES}
    (folder / f"facts{rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
