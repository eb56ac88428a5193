"""Runs whose outcome must not depend on the number of processes; test_matrix.py launches it, and calls it for one.

matrix.py FOLDER DATA train       all of RUNS, and the evaluations
matrix.py FOLDER DATA evaluate    the evaluations alone
matrix.py FOLDER DATA resume      goes on with every FOLDER/begun_*
"""

import json
import os
import sys
from itertools import product
from pathlib import Path

import tlscale
from tests.dist.many_checks import before_each_step, equal_on_all_ranks
from tests.small_runs import put_teacher, small_recipe
from tlscale.data.sources.open import ImageSplit
from tlscale.distributed.processes import start_processes
from tlscale.training import loop as finetune
from tlscale.training import state as run_parts
from tlscale.training.evaluate import evaluate
from tlscale.training.input_pipeline import ImagePipeline
from tlscale.training.setup import set_up
from tlscale.training.specs import make_loss, open_image_cache, pipeline_spec

# 77 training images in batches of 16 (the last of an epoch: 13), two epochs: 10 steps.
BATCH = 16
RARELY = {"evaluate": {"every": "2 epochs"}, "checkpoint": {"every": "2 epochs"}}
OPTIMS = {
    "sgd": {"optim": {"name": "momentum", "lr": 0.05, "options": {"momentum": 0.9}, "clip_grad_norm": 1.0}},
    "adamw": {"optim": {"name": "adamw", "lr": 2e-3, "ema_decay": 0.9}},
}
ACCUMULATIONS = (1, 2, 4)
MATRIX = {
    f"{optim}_{precision}_{passes}": (passes, {**RARELY, **OPTIMS[optim], "compute": {"precision": precision}})
    for optim, precision, passes in product(OPTIMS, ("fp64", "fp32"), ACCUMULATIONS)
}
MIXED = {
    **RARELY,
    "compute": {"precision": "fp64"},
    "data": {"augment": ["flip", {"mixup": 0.4}, "cutmix"], "workers": 0},
    "loss": {"label_smoothing": 0.1, "class_weights": "balanced"},
    "optim": {"name": "momentum", "lr": 0.05, "clip_grad_norm": 0.5, "ema_decay": 0.9},
}
# Checkpoints in the middle of an epoch, to go on from with another number of processes.
SAVED = {"saved_adamw": {**MIXED, "optim": {"lr": 2e-3, "ema_decay": 0.9}}, "saved_sgd": MIXED}
OFTEN = {"evaluate": {"every": "2 epochs"}, "checkpoint": {"every": "3 steps", "keep": 100}}
BATCH_NORM = {"backbone": {"name": "test_resnet"}}
# What a teacher says is kept once for all processes.
TAUGHT = {
    **RARELY,
    "compute": {"precision": "fp64"},
    "data": {"augment": ["flip"], "workers": 0},
    "codes": {"views": 2},
    "distill": {
        "teacher": {"name": "test_resnet"},
        "image_size": 48,
        "match": {"layer2": "blocks.2", "penultimate": ["blocks.2", "penultimate"]},
    },
}
ADAPTERS = {
    **RARELY,
    "adapters": {"lora": {"layers": r"blocks\..*", "rank": 2}},
    "freeze": r"blocks\.[012]\..*",
    "codes": {"keep": "always"},
    "compute": {"precision": "fp64"},
    "optim": {"name": "momentum", "lr": 0.05, "ema_decay": 0.9},
}
RUNS = {
    "taught": (2, TAUGHT),
    "adapters": (2, ADAPTERS),
    **MATRIX,
    "mixed": (2, MIXED),
    **{name: (2, {**changes, **OFTEN}) for name, changes in SAVED.items()},
    "evaluated_rarely": (1, {**RARELY, **BATCH_NORM}),
    "evaluated_often": (1, {**RARELY, **BATCH_NORM, "evaluate": {"every": "1 steps"}}),
}
EVALUATED = (1, 2, 3, 7, 36, 37)  # images of the test split


def changes_of(name, world_size):
    """What the recipe of a run has for so many processes: each makes as many forward passes for a full batch."""
    accumulation, changes = RUNS[name]
    compute = {**changes.get("compute", {}), "micro_batch_size": BATCH // (world_size * accumulation)}
    return {**changes, "compute": compute}


def train(folder, data, rank=0, world_size=1):
    """The facts of all runs: for each, the images of each forward pass by step."""
    facts = {}
    for name in RUNS:
        steps = []
        with before_each_step(lambda batches, state, steps=steps: steps.append([b.num_real for b in batches])):
            run(folder, data, name, rank, world_size)
        facts[name] = steps
    return facts


def run(folder, data, name, rank, world_size, resume=False):
    changes = changes_of(name, world_size)
    if "distill" in changes:
        teacher = {"name": "test_resnet", "weights": str(put_teacher(folder / f"teacher{rank}.safetensors"))}
        changes = {**changes, "distill": {**changes["distill"], "teacher": teacher}}
    recipe = small_recipe(folder / f"{name}.{rank}.yaml", data, **changes)
    return tlscale.run(recipe, folder / name, resume=resume)


def evaluations(folder, data, rank=0):
    """Figures of one network on splits of few images, by their number; 4 processes, and 3, are more than some have."""
    # 12 can be shared by 1, 2, 3 and 4 processes.
    recipe = small_recipe(folder / f"evaluated.{rank}.yaml", data, batch_size=12, compute={"precision": "fp64"})
    processes = start_processes(recipe.compute)
    try:
        setup = set_up(recipe, world_size=processes.world_size)
        spec = pipeline_spec(setup, processes.device)
        feed = ImagePipeline(spec, processes, setup.classifier, open_image_cache(setup))
        test = setup.data.test
        splits = [ImageSplit(f"first {count}", test.table, test.rows_N[:count]) for count in EVALUATED]
        return {
            str(len(split)): evaluate(
                feed.module,
                feed.eval_batches(split),
                inputs=feed.inputs,
                num_images=len(split),
                loss_fn=make_loss(setup, processes.device),
                classes=setup.data.classes,
                processes=processes,
            )
            for split in splits
        }
    finally:
        processes.close()


def resume(folder, data, rank, world_size):
    """Goes on with each run that was begun elsewhere: for each the seed of each step, and whether ranks agreed."""
    facts = {}
    for out in sorted(path for path in folder.glob("begun_*") if path.is_dir()):
        seeds, agreed = [], []
        train_step, snapshot = finetune.train_step, run_parts.snapshot

        def spy(*args, seed, seeds=seeds, train_step=train_step, **options):
            seeds.append(seed)
            return train_step(*args, seed=seed, **options)

        def look(clock, network, optimizer, ema, *args, agreed=agreed, snapshot=snapshot, **options):
            agreed.append([clock.step, equal_on_all_ranks([*network.parameters(), *ema.averages.values()])])
            return snapshot(clock, network, optimizer, ema, *args, **options)

        finetune.train_step, run_parts.snapshot = spy, look
        try:
            name = out.name.removeprefix("begun_").split(".")[0]
            recipe = small_recipe(folder / f"{out.name}.{rank}.yaml", data, **changes_of(name, world_size))
            tlscale.run(recipe, out, resume=True)
        finally:
            finetune.train_step, run_parts.snapshot = train_step, snapshot
        facts[out.name] = {"seeds": seeds, "agreed": agreed}
    return facts


def main():
    folder, data, what = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    facts = {"rank": rank, "world_size": world_size}
    facts["evaluations"] = evaluations(folder, data, rank) if what != "resume" else None
    if what == "train":
        facts["steps"] = train(folder, data, rank, world_size)
    if what == "resume":
        facts["resumed"] = resume(folder, data, rank, world_size)
    (folder / f"facts{rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
