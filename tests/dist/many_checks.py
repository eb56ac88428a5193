"""What several processes do together; test_two_processes.py launches it and reads its facts, a JSON file a rank.

One launch does many runs, because a start costs more than all of them.
"""

import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed

import tests.small_models  # noqa: F401 (makes spare_resnet known to timm)
import tlscale
from tests.small_runs import small_recipe
from tlscale.data.sampler import DataOrder, micro_batches, split_batch_size
from tlscale.distributed.processes import Processes, start_processes
from tlscale.errors import CheckpointError, DataError, TlscaleError
from tlscale.recipe.schema import ComputeSection
from tlscale.training import loop as finetune
from tlscale.training import state as run_parts

# Nothing divides: 77 training images in batches of 16, 19 validation images, 37 test images.
EXACT = {
    "compute": {"precision": "fp64"},
    "data": {"augment": ["flip", {"mixup": 0.4}], "workers": 0},
    "loss": {"label_smoothing": 0.1, "class_weights": "balanced"},
    "optim": {"clip_grad_norm": 1.0, "ema_decay": 0.9},
    "schedule": {"warmup": "3 steps"},
}
SPLIT = {**EXACT, "compute": {"precision": "fp64", "micro_batch_size": 3}}
BATCH_NORM = {"backbone": {"name": "test_resnet"}, "evaluate": {"every": "3 steps"}, "checkpoint": {"every": "4 steps"}}

HALF_VIT = r"(cls_token|pos_embed|patch_embed\..*|blocks\.0\..*)"
# Codes of all, then of half of the backbone, and in the end none: 5, 4 and 3 steps.
STAGED = {
    "codes": {"keep": "always"},  # a stage of 4 steps would not pay for its codes
    "compute": {"precision": "fp64"},
    "stages": [
        {"freeze": ".*", "duration": "1 epochs", "lr": 5e-3},
        {"freeze": HALF_VIT, "duration": "4 steps"},
        {"duration": "3 steps", "lr": 5e-4},
    ],
    "checkpoint": {"every": "1 steps", "keep": 100},
    "optim": {"ema_decay": 0.9},
}
# Nothing but the mask makes a zero. With 2 processes 2 forward passes a step, with 4 one or two.
DROPOUT = {"head": [{"linear": 16}, {"dropout": 0.5}, "linear"], "compute": {"micro_batch_size": 4}}
APART = {"checkpoint": {"every": "2 steps", "keep": 100}, "evaluate": {"every": "2 epochs"}}
PROBE = {"probe": {"kind": "ridge"}, "codes": {"layer": ["blocks.0", "penultimate"]}}


def recipe(folder, name, place, **changes):
    return small_recipe(folder / f"{name}.{os.environ['RANK']}.yaml", place, **changes)


def rows_of_all_steps(rank, world_size):
    """The images of each step on this rank, padding left out, as positions in the training split."""
    order, split = DataOrder(77, 16, 0, False), split_batch_size(16, world_size, 3)
    return [
        [part.rows_B[: part.num_real].tolist() for part in micro_batches(order, step, split, rank)]
        for step in range(10)
    ]


def error_of(job):
    try:
        job()
    except TlscaleError as error:
        return {"kind": type(error).__name__, "message": str(error), "said_by_main": error.reported_by_main}
    return None


def equal_on_all_ranks(values):
    flat = torch.cat([value.detach().double().flatten() for value in values])
    flats = [torch.zeros_like(flat) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(flats, flat)
    return all(torch.equal(flats[0], other) for other in flats)


def at_each_checkpoint(look, folder, name, place, **changes):
    """What `look(clock, network, optimizer)` gives whenever the run makes a checkpoint."""
    seen = []
    snapshot = run_parts.snapshot

    def spy(clock, network, optimizer, *args, **options):
        seen.append(look(clock, network, optimizer))
        return snapshot(clock, network, optimizer, *args, **options)

    run_parts.snapshot = spy
    try:
        tlscale.run(recipe(folder, name, place, **changes), folder / name)
    finally:
        run_parts.snapshot = snapshot
    return seen


@contextmanager
def before_each_step(look):
    """Within: `look(batches, state)` is called before a step is made of the batches."""
    train_step, build, states = finetune.train_step, finetune.build_train_state, []

    def keep(*args, **options):
        states.append(build(*args, **options))
        return states[-1]

    def spy(model, optimizer, loss_fn, inputs, batches, *args, **options):
        look(batches, states[-1])
        return train_step(model, optimizer, loss_fn, inputs, batches, *args, **options)

    finetune.train_step, finetune.build_train_state = spy, keep
    try:
        yield
    finally:
        finetune.train_step, finetune.build_train_state = train_step, build


def begins_with_equal_weights(folder, name, data):
    """Whether all ranks have the same parameters and buffers when the first step is made."""
    seen = []

    def look(batches, state):
        if not seen:
            seen.append(equal_on_all_ranks([*state.network.parameters(), *state.network.buffers()]))

    with before_each_step(look):
        tlscale.run(recipe(folder, name, data, **EXACT), folder / name)
    return seen[0]


def dropout_masks(folder, name, data):
    """What the head's dropout lets through in each of this rank's forward passes in training, 0 and 1."""
    masks, watched = [], set()

    def note(module, inputs, output):
        if module.training:
            masks.append("".join(map(str, (output != 0).int().flatten().tolist())))

    def look(batches, state):
        (dropout,) = (module for module in state.network.head if isinstance(module, torch.nn.Dropout))
        if dropout not in watched:
            dropout.register_forward_hook(note)
            watched.add(dropout)

    with before_each_step(look):
        tlscale.run(recipe(folder, name, data, **DROPOUT), folder / name)
    return masks


def come_apart(folder, name, data):
    """The error of a run in which the last rank's weights change by themselves before the sixth step."""
    steps = []

    def look(batches, state):
        steps.append(batches)
        if len(steps) == 6 and state.processes.rank == state.processes.world_size - 1:
            with torch.no_grad():
                state.network.get_parameter("backbone.blocks.3.mlp.fc1.weight")[1, 2] += 1e-3

    with before_each_step(look):
        return error_of(lambda: tlscale.run(recipe(folder, name, data, **APART), folder / name))


def batch_norm_buffers(folder, name, data):
    """For each checkpoint, whether the buffers of all ranks are equal when it is made."""

    def look(clock, network, optimizer):
        return equal_on_all_ranks(network.buffers())

    return at_each_checkpoint(look, folder, name, data, **BATCH_NORM)


def ranks_agree(folder, name, data):
    """For each checkpoint, whether parameters, and the moments of all that was trained, are equal on all ranks."""

    def look(clock, network, optimizer):
        moments = [state["exp_avg"] for state in optimizer.state.values()]
        return [clock.step, len(moments), equal_on_all_ranks([*network.parameters(), *moments])]

    return at_each_checkpoint(look, folder, name, data, **STAGED)


def together(facts):
    """The agreements of `Processes`, on real processes."""
    processes = start_processes(ComputeSection(threads=1))
    rank = processes.rank
    facts["rank"], facts["world_size"] = rank, processes.world_size
    facts["any"] = [processes.any(rank == 1), processes.any(False), processes.any(True)]
    facts["sum"] = processes.sum(torch.tensor([rank + 1, 10])).tolist()
    facts["gather"] = processes.gather(f"of {rank}")
    facts["on_main"] = processes.run_on_main(lambda: f"by {rank}")

    def fails(where, kind, message):
        def job():
            if rank in where:
                raise kind(message)

        return job

    facts["main fails"] = error_of(lambda: processes.run_on_main(fails([0], DataError, "main's")))
    facts["main fails oddly"] = error_of(lambda: _as_ours(lambda: processes.run_on_main(fails([0], OddError, "odd"))))
    facts["last fails"] = error_of(
        lambda: processes.run_on_all(fails([processes.world_size - 1], CheckpointError, "last's"))
    )
    facts["all fail"] = error_of(lambda: processes.run_on_all(fails(range(9), CheckpointError, f"of {rank}")))
    facts["none fails"] = processes.run_on_all(lambda: rank)
    facts["rows"] = rows_of_all_steps(rank, processes.world_size)
    processes.close()


class OddError(Exception):
    """One that cannot be sent to another process."""

    def __init__(self, message):
        super().__init__(message)
        self.keeps = lambda: None


def _as_ours(job):
    try:
        job()
    except OddError as error:
        raise TlscaleError(str(error)) from error


def run_all(facts, folder, data):
    facts["begin with equal weights"] = begins_with_equal_weights(folder, "exact", data)
    tlscale.run(recipe(folder, "split", data, **SPLIT), folder / "split")
    facts["buffers equal"] = batch_norm_buffers(folder, "bn", data)
    facts["ranks agree"] = ranks_agree(folder, "staged", data)
    tlscale.run(recipe(folder, "probed", data, **PROBE), folder / "probed")
    share, Processes.broadcast_buffers = Processes.broadcast_buffers, lambda processes, module: None
    facts["not shared"] = error_of(lambda: batch_norm_buffers(folder, "unshared", data))
    Processes.broadcast_buffers = share
    facts["dropout masks"] = dropout_masks(folder, "dropout", data)
    facts["dropout masks again"] = dropout_masks(folder, "dropout_again", data)
    facts["apart"] = come_apart(folder, "apart", data)
    # Begun by one process elsewhere and gone on with here.
    if (folder / "begun").exists():
        tlscale.run(recipe(folder, "begun", data, **EXACT), folder / "begun", resume=True)
    facts["taken"] = error_of(lambda: tlscale.run(recipe(folder, "exact", data, **EXACT), folder / "exact"))
    spare = {"backbone": {"name": "spare_resnet"}, "duration": "3 steps"}
    facts["spare"] = error_of(lambda: tlscale.run(recipe(folder, "spare", data, **spare), folder / "spare"))
    spare["freeze"] = r"spare\.weight|spare\.bias"
    tlscale.run(recipe(folder, "spared", data, **spare), folder / "spared")
    wrong = {**EXACT, "compute": {"num_processes": 7}}
    facts["wrong number"] = error_of(lambda: tlscale.run(recipe(folder, "wrong", data, **wrong), folder / "wrong"))
    odd = {**EXACT, "batch_size": 15}
    facts["no equal shares"] = error_of(lambda: tlscale.run(recipe(folder, "odd", data, **odd), folder / "odd"))


def main():
    folder, data = Path(sys.argv[1]), Path(sys.argv[2])
    facts = {}
    together(facts)
    run_all(facts, folder, data)
    (folder / f"facts{facts['rank']}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
