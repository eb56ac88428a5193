"""Which engine trains: the recipe says so, and a launcher or a number of processes that cannot be is refused."""

import pytest
import torch
from torch import nn

from tests.small_models import TINY, classifier, noise
from tests.small_runs import put_small_idx, small_recipe
from tlscale.commands.plan import plan
from tlscale.distributed.fsdp import gather_into, meta_copy, repeated_blocks, shard
from tlscale.distributed.processes import start_processes
from tlscale.errors import LaunchError, ModelError
from tlscale.recipe.schema import ComputeSection


@pytest.mark.parametrize(
    ("variable", "name"),
    [
        ("ACCELERATE_USE_FSDP", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "a parallelism configuration"),
    ],
)
@pytest.mark.parametrize("engine", ["auto", "ddp", "fsdp2"])
def test_a_launcher_that_asks_for_an_engine_is_refused(monkeypatch, variable, name, engine):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(LaunchError) as caught:
        start_processes(ComputeSection(engine=engine))
    message = str(caught.value)
    assert f"compute.engine: {engine} in the recipe, but 'accelerate launch' asks for {name} ({variable})" in message
    assert "Remove it (" in message
    assert "compute.engine: fsdp2" in message or "the recipe's does the same" in message


def test_version_1_of_fsdp_has_its_own_reason(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for version, says_why in ((None, True), ("1", True), ("2", False)):
        if version:
            monkeypatch.setenv("FSDP_VERSION", version)
        with pytest.raises(LaunchError) as caught:
            start_processes(ComputeSection())
        assert ("puts frozen and trained parameters into one flat tensor" in str(caught.value)) == says_why


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_an_engine_has_no_effect_on_one_process(engine):
    with pytest.raises(LaunchError, match=f"compute.engine: {engine} has no effect with one process"):
        start_processes(ComputeSection(engine=engine))


def test_what_trains_nothing_asks_for_no_engine():
    compute = ComputeSection(engine="fsdp2", threads=1).without_engine()
    processes = start_processes(compute)
    assert not processes.engine.shards
    assert processes.world_size == 1
    assert compute.threads == 1
    processes.close()


BLOCKS = {
    "test_resnet": "BasicBlock",
    "test_vit": "Block",
    "test_efficientnet": "InvertedResidual",
    "test_convnext": "ConvNeXtBlock",
}


@pytest.mark.parametrize("name", TINY)
def test_blocks_do_not_overlap_and_hold_what_is_trained(name):
    network = classifier(name)
    blocks = repeated_blocks(network)
    inside = [param for block in blocks for param in block.parameters()]
    assert len(inside) == len({id(param) for param in inside})
    assert all(any(block.children()) for block in blocks), "single layers are too small"
    if name in BLOCKS:
        assert {type(block).__name__ for block in blocks} >= {BLOCKS[name]}
        assert sum(param.numel() for param in inside) > 0.5 * sum(p.numel() for p in network.backbone.parameters())


def test_the_smallest_of_nested_blocks_is_taken_and_frozen_ones_are_not():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

    class Stage(nn.Module):
        def __init__(self):
            super().__init__()
            self.down = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
            self.blocks = nn.Sequential(Block(), Block())

    stages = nn.Sequential(Stage(), Stage())
    network = nn.ModuleDict({"stages": stages, "layers": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))})
    assert repeated_blocks(network) == [block for stage in stages for block in stage.blocks]
    for param in stages[0].parameters():
        param.requires_grad_(False)
    assert repeated_blocks(network) == list(stages[1].blocks)


def test_a_parameter_without_rows_cannot_be_sharded():
    network = classifier("test_resnet")
    network.head.scale = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ModelError, match=r"head\.scale is a single number without rows"):
        shard(network, network, None, "fp32", keep_fp32=())


def test_a_meta_copy_is_filled_again():
    network = classifier("test_vit", freeze=[r"blocks\.0\..*"])
    copy = meta_copy(network)
    for name, param in network.named_parameters():
        own = copy.get_parameter(name)
        assert own.is_meta if param.requires_grad else own is param
    with torch.no_grad():
        network.head[0].weight.add_(1.0)
    whole = gather_into(copy, network, keep=True)
    assert torch.equal(whole.eval()(noise()), network.eval()(noise()))


def test_the_plan_counts_shares_and_what_is_whole_while_it_computes(tmp_path, capsys):
    idx = put_small_idx(tmp_path / "idx")
    rows = {}
    for engine in ("ddp", "fsdp2"):
        plan(small_recipe(tmp_path / f"{engine}.yaml", idx, compute={"engine": engine}), world_size=4)
        out = capsys.readouterr().out.split("Memory of a process")[1]
        rows[engine] = {
            name: float(line.split()[-1])
            for line in out.splitlines()
            for name in ("weights ", "gradients", "unsharded")
            if line.strip().startswith(name)
        }
    network = classifier("test_vit", in_chans=1, num_classes=10)
    num_bytes = sum(param.numel() * 4 for param in network.parameters())
    blocks = [sum(param.numel() * 4 for param in block.parameters()) for block in repeated_blocks(network)]
    assert rows["ddp"]["gradients"] == pytest.approx(num_bytes / 2**20, abs=0.06)
    assert rows["fsdp2"]["gradients"] == pytest.approx(num_bytes / 4 / 2**20, abs=0.06)
    assert rows["fsdp2"]["weights "] == pytest.approx(num_bytes / 4 / 2**20, abs=0.06)
    whole = num_bytes - sum(blocks) + max(blocks)
    assert rows["fsdp2"]["unsharded"] == pytest.approx(whole / 2**20, abs=0.06)
    assert "unsharded" not in rows["ddp"]
