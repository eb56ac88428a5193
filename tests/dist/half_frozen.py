"""Half a network trained, with its activations recomputed, compiled, and both; test_half_frozen.py launches it.

half_frozen.py FOLDER DATA NAME...
"""

import json
import os
import sys
from pathlib import Path

import tlscale
from tests.dist.many_checks import HALF_VIT
from tests.small_runs import small_recipe

# 64 images: four steps of 16, and 8 in each forward pass of 2 processes, so that one shape is compiled.
BASE = {
    "freeze": HALF_VIT,
    "codes": {"keep": "never"},
    "data": {"validation_fraction": 0.0},
    "duration": "4 steps",
    "optim": {"lr": 2e-3},
}
DROPS = {**BASE, "backbone": {"drop_path_rate": 0.3}}


def _computed(base, **compute):
    return {**base, "compute": {"precision": "fp64", **compute}}


RUNS = {
    "plain": _computed(BASE),
    "recomputed": _computed(BASE, gradient_checkpointing=True),
    "compiled": _computed(BASE, compile=True),
    "both": _computed(BASE, gradient_checkpointing=True, compile=True),
    "drops": _computed(DROPS),
    "drops_recomputed": _computed(DROPS, gradient_checkpointing=True, micro_batch_size=8),
}


def main():
    folder, data, *names = Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]
    rank = int(os.environ["RANK"])
    for name in names:
        recipe = small_recipe(folder / f"{name}.{rank}.yaml", data, **RUNS[name])
        tlscale.run(recipe, folder / name)
    facts = {"rank": rank, "world_size": int(os.environ["WORLD_SIZE"])}
    (folder / f"facts{rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
