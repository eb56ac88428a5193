"""What several processes do with a network that is spread over them; test_fsdp.py launches it and reads its facts.

One launch does many runs, because a start costs more than all of them.
"""

import gc
import json
import os
import resource
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import timm
import torch
from timm.models import register_model
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import tlscale
from tests.dist.many_checks import EXACT, HALF_VIT, at_each_checkpoint, error_of, recipe
from tests.small_models import TINY
from tlscale.distributed.fsdp import Fsdp2Engine
from tlscale.distributed.processes import start_processes
from tlscale.models.freeze import is_norm
from tlscale.recipe.schema import ComputeSection, LossSection
from tlscale.training.evaluate import evaluate
from tlscale.training.loss import CrossEntropyLoss

FSDP = {"engine": "fsdp2", "precision": "fp64"}


def with_fsdp(changes):
    return {**changes, "compute": {**changes.get("compute", {}), **FSDP}}


PLAIN = {"compute": {"precision": "fp64"}}
HALF = {
    **PLAIN,
    "freeze": HALF_VIT,
    "codes": {"keep": "always"},
    "optim": {"clip_grad_norm": 0.5, "ema_decay": 0.9, "lr": 5e-3},
    "checkpoint": {"every": "3 steps", "keep": 100},
}
# What ends in the same weights whatever the engine and the number of processes.
RUNS = {
    "exact": EXACT,
    # 3 images at a time; blocks are computed again in the backward pass.
    "split": {**EXACT, "compute": {"precision": "fp64", "micro_batch_size": 3, "gradient_checkpointing": True}},
    "codes": HALF,
    "images": {**HALF, "codes": {"keep": "never"}},
    "adapters": {**HALF, "adapters": {"lora": {"layers": r"blocks\..*", "rank": 2}}},
    # Frozen in the middle of a stage and of a block; what is behind that is computed again in the backward pass.
    "convnext": {
        "compute": {"precision": "fp64", "gradient_checkpointing": True},
        "backbone": {"name": "test_convnext"},
        "freeze": r"(stem\..*|stages\.[01]\..*|stages\.2\.blocks\.0\.(conv_dw|norm)\..*)",
        "codes": {"keep": "always"},
    },
}
# Four processes run all of them (`make test-dist`), two these.
SOME = ("exact", "codes", "convnext")
# Each process has its own batch statistics, so this one ends as DDP on as many processes does.
BATCH_NORM = {
    **PLAIN,
    "backbone": {"name": "test_resnet"},
    "freeze": r"(conv1|bn1|layer1)\..*",
}


# In these the engines differ by rounding alone, so they are run by both.
ROUNDED = {
    "fp32": {"compute": {"precision": "fp32"}, "optim": {"clip_grad_norm": 0.5}},
    "bf16": {"compute": {"precision": "bf16"}},
    "bf16_bn": {"compute": {"precision": "bf16"}, "backbone": {"name": "test_resnet"}, "freeze": r"conv1\..*"},
}


class Spoiler(nn.Module):
    """Gives no numbers in the fifth step on the last process."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        is_on_trial = torch.equal(x[0], x[-1])  # before the run, with images that are all zero
        self.calls += self.training and not is_on_trial
        is_last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
        return x * float("nan") if self.training and self.calls == 5 and is_last else x


@register_model
def spoilt_vit(pretrained=False, **keys):
    network = timm.create_model("test_vit", pretrained=False, **keys)
    network.norm_pre = Spoiler()
    return network


SPOILT = {
    "backbone": {"name": "spoilt_vit"},
    "compute": {"precision": "fp64"},
    "non_finite": {"action": "skip"},
    "optim": {"ema_decay": 0.9},
}


FAMILIES = {
    name: {"backbone": {"name": name}, "compute": {"precision": "fp64"}, "duration": "4 steps", "drop_last": True}
    for name in (*TINY, "lenet5")
}


def share_of(rows, rank, world_size):
    """Rows that a process holds: as `torch.chunk` cuts."""
    most = -(-rows // world_size)
    return max(min(rows - rank * most, most), 0)


def how_spread(network, optimizer):
    """What is trained, and its moments, as this process holds it."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    trained = {name: param for name, param in network.named_parameters() if param.requires_grad}
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    tensors = [*trained.values(), *moments]
    return {
        "num_trained": len(trained),
        "num_moments": len(moments),
        "spread": all(isinstance(tensor, DTensor) for tensor in tensors),
        "shares": all(
            tensor.to_local().shape == (share_of(tensor.shape[0], rank, world_size), *tensor.shape[1:])
            for tensor in tensors
            if isinstance(tensor, DTensor)
        ),
        "held": sum(param.to_local().numel() for param in trained.values()),
        "of": sum(param.numel() for param in trained.values()),
        "frozen whole": not any(isinstance(p, DTensor) for p in network.parameters() if not p.requires_grad),
    }


def watched(folder, name, data, changes):
    """How everything is spread at each checkpoint, and whether anything still holds the whole tensors then."""
    before, shard = [], Fsdp2Engine.shard

    def spy(engine, module, network, *args, **options):
        before.extend(weakref.ref(param) for param in network.parameters() if param.requires_grad)
        return shard(engine, module, network, *args, **options)

    def look(clock, network, optimizer):
        gc.collect()
        whole = sum(ref() is not None for ref in before)
        return {**how_spread(network, optimizer), "step": clock.step, "still whole": whole, "were whole": len(before)}

    Fsdp2Engine.shard = spy
    try:
        return at_each_checkpoint(look, folder, name, data, **changes)
    finally:
        Fsdp2Engine.shard = shard


def where_one_cannot_write(folder, data):
    """The error of each process when the last one may write no file as large as its share."""
    free = resource.getrlimit(resource.RLIMIT_FSIZE)
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, free[1]))
    try:
        return error_of(lambda: run(folder, "full", data, with_fsdp(PLAIN)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, free)


def passes_of_uneven_shares():
    """Forward passes of each process in an evaluation in step, where they have 3, 2, 1 and 0 batches; and its count."""
    processes = start_processes(ComputeSection(engine="fsdp2", threads=1))
    rank, world_size = processes.rank, processes.world_size
    counts = [3, 2, 1, 0][-world_size:] if world_size > 2 else [3, 0]
    batches = [SimpleNamespace(labels_B=torch.arange(2), x_BD=torch.randn(2, 4)) for _ in range(counts[rank])]
    passes = []
    network = nn.Linear(4, 5)
    network.register_forward_hook(lambda module, args, output: passes.append(len(args[0])))
    figures = evaluate(
        network,
        batches,
        inputs=lambda batch: (batch.x_BD,),
        num_images=2 * sum(counts),
        loss_fn=CrossEntropyLoss(LossSection(), None),
        classes=list("abcde"),
        processes=processes,
    )
    processes.close()
    return {"passes": passes, "num_images": figures["num_images"], "most": max(counts), "all": 2 * sum(counts)}


def types_while_computing(clock, network, optimizer):
    """Of parameters that are whole, as they are exchanged: those of norm layers, and the others."""
    blocks = [module for module in network.modules() if isinstance(module, FSDPModule)]
    found = {"norm": set(), "other": set()}
    for block in blocks:
        block.unshard()
        for layer in block.modules():
            kind = "norm" if is_norm(layer) else "other"
            found[kind] |= {str(p.dtype) for p in layer.parameters(recurse=False) if not isinstance(p, DTensor)}
        block.reshard()
    return {kind: sorted(types) for kind, types in found.items()}


def run_both(folder, data, runs):
    for name, changes in runs.items():
        for engine in ("ddp", "fsdp2"):
            compute = {**changes.get("compute", {}), "engine": engine}
            run(folder, f"{name}_{engine}", data, {**changes, "compute": compute})


def run(folder, name, place, changes, **options):
    return tlscale.run(recipe(folder, name, place, **changes), folder / name, **options)


def go_on(folder, data):
    """With runs that were begun elsewhere, by another number of processes."""
    for name in sorted(path.name for path in folder.glob("begun_*") if path.is_dir()):
        run(folder, name, data, with_fsdp(RUNS[name.split("_")[1]]), resume=True)


def main():
    folder, data, parts = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    rank = int(os.environ["RANK"])
    facts = {"rank": rank, "world_size": int(os.environ["WORLD_SIZE"])}
    go_on(folder, data)
    if parts in ("some", "all"):
        names = RUNS if parts == "all" else SOME
        facts["spread"] = {name: watched(folder, name, data, with_fsdp(RUNS[name])) for name in names}
        run_both(folder, data, {"bn": BATCH_NORM})
        in_bf16 = {"compute": {"precision": "bf16", "engine": "fsdp2"}}
        facts["types"] = at_each_checkpoint(types_while_computing, folder, "types", data, **in_bf16)
        facts["uneven"] = passes_of_uneven_shares()
        wrong = with_fsdp({"optim": {"name": "adafactor"}})
        facts["wrong optimizer"] = error_of(lambda: run(folder, "wrong", data, wrong))
        facts["one cannot write"] = where_one_cannot_write(folder, data)
    if parts == "both":
        run_both(folder, data, {"spoilt": SPOILT, **ROUNDED, **FAMILIES})
    (folder / f"facts{rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
