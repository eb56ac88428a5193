"""Stages: each trains what it says, moments go over a boundary by name, and a stop anywhere changes nothing."""

import shutil

import pytest
import torch

import tlscale
from tests.small_runs import (
    as_after,
    assert_same_bits,
    assert_same_runs,
    exported,
    last_checkpoint,
    lines,
    result,
    small_recipe,
    tensors,
)
from tlscale.codes.store import CodesStore
from tlscale.errors import RecipeError
from tlscale.training import loop as finetune
from tlscale.training.setup import set_up

RESNET = {"name": "test_resnet"}
# 5 steps an epoch: boundaries after steps 5 and 12.
THREE = [
    {"freeze": ".*", "duration": "1 epochs", "lr": 5e-3},
    {"freeze": r"(conv1|bn1|layer[123])\..*", "duration": "7 steps"},
    {"duration": "1 epochs", "lr": 5e-4, "lr_rules": [{r"layer1\..*": 0.1}], "schedule": {"decay": "constant"}},
]
VARIANTS = {
    "on codes where they pay": {},
    "on images": {"codes": {"keep": "never"}},
    "averages": {"optim": {"ema_decay": 0.9}},
    "augmented views": {"data": {"augment": ["flip", {"mixup": 0.3}], "workers": 0}, "codes": {"views": 2}},
    "unfrozen, then frozen again": {
        "stages": [
            {"freeze": r"(conv1|bn1|layer[123])\..*", "duration": "5 steps"},
            {"freeze": ".*", "duration": "7 steps"},
            {"freeze": r"(conv1|bn1|layer[12])\..*", "duration": "5 steps"},
        ],
        "optim": {"ema_decay": 0.8},
    },
    "half precision": {"compute": {"precision": "bf16"}},
    "half precision on images": {"compute": {"precision": "bf16"}, "codes": {"keep": "never"}},
}
LAST = 17
# Before, at and after each boundary. A variant is resumed at two of them, in turn; `make test-long` does all.
AROUND = (4, 5, 6, 11, 12, 13)
STOPS = {name: (AROUND[number % 3], AROUND[5 - number % 3]) for number, name in enumerate(VARIANTS)}


def staged(path, idx, **changes):
    base = {"backbone": RESNET, "stages": THREE, "checkpoint": {"every": "1 steps", "keep": 100}}
    plain = {**base, **changes}
    path.parent.mkdir(parents=True, exist_ok=True)
    return small_recipe(path, idx, **plain)


@pytest.mark.parametrize(
    ("name", "stops"),
    [
        *(pytest.param(name, STOPS[name], id=name) for name in VARIANTS),
        *(pytest.param(name, AROUND, id=f"{name}, all", marks=pytest.mark.long) for name in VARIANTS),
    ],
)
def test_stopped_before_at_and_after_a_boundary(name, stops, idx, tmp_path):
    recipe = staged(tmp_path / "recipe.yaml", idx, **VARIANTS[name])
    tlscale.run(recipe, tmp_path / "whole")
    assert result(tmp_path / "whole")["steps"] == LAST
    for step in stops:
        as_after(step, tmp_path / "whole", tmp_path / f"from{step}")
        tlscale.run(recipe, tmp_path / f"from{step}", resume=True)
        assert_same_runs(tmp_path / "whole", tmp_path / f"from{step}")


@pytest.fixture(scope="module")
def whole(idx, tmp_path_factory):
    shutil.rmtree(CodesStore().root, ignore_errors=True)
    folder = tmp_path_factory.mktemp("whole")
    tlscale.run(staged(folder / "recipe.yaml", idx), folder / "run")
    return folder / "run"


def weights_after(run, step):
    return tensors(run / "checkpoints" / f"step_{step:08}" / "model.safetensors")


def changed_between(run, first, last):
    before, after = weights_after(run, first), weights_after(run, last)
    return {name.removeprefix("backbone.") for name in before if not torch.equal(before[name], after[name])}


def test_each_stage_trains_what_it_says(whole):
    head = {"head.0.weight", "head.0.bias"}
    assert changed_between(whole, 1, 5) == head
    second = changed_between(whole, 5, 12)
    assert head < second
    assert {name.split(".")[0] for name in second} == {"head", "layer4"}
    third = changed_between(whole, 12, 17)
    assert {name.split(".")[0] for name in third} == {"head", "conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}


def test_learning_rates_follow_the_stage(whole):
    rates = [record["lr"] for record in lines(whole, "train")]
    assert len(rates) == LAST
    assert max(rates[:5]) == pytest.approx(5e-3)
    assert max(rates[5:12]) == pytest.approx(2e-3)
    assert rates[12:] == pytest.approx([5e-4] * 5)  # constant; 5 % of five steps is less than one
    assert rates[4] < rates[0] / 5, "the cosine of a stage ends with it"


def test_moments_go_over_by_name(whole):
    before = tensors(whole / "checkpoints" / "step_00000005" / "optimizer.safetensors")
    after = tensors(whole / "checkpoints" / "step_00000006" / "optimizer.safetensors")
    assert {name.split(".")[0] for name in before} == {"head"}
    assert {name.split(".")[0] for name in after} == {"head", "layer4"}
    assert float(after["head.0.weight.step"]) == 6, "the head's count goes on"
    assert {float(value) for name, value in after.items() if name.startswith("layer4") and name.endswith(".step")} == {
        1
    }


def test_the_result_says_so(whole):
    figures = result(whole)
    assert figures["strategy"] == "stages"
    assert figures["trainable_params"] == figures["total_params"]
    assert figures["epochs"] == pytest.approx(LAST / 5)
    assert figures["codes"]["num_computed"] > 0


def test_best_weights_of_an_earlier_stage_are_evaluated_with_their_own_layers(idx, tmp_path):
    """The last stage trains on codes of layers that the best checkpoint does not have."""
    stages = [
        {"freeze": r"(conv1|bn1|layer[123])\..*", "duration": "2 epochs", "lr": 3e-3},
        {"freeze": ".*", "duration": "1 epochs", "lr": 0.5},  # ruins the head
    ]
    out = tmp_path / "run"
    tlscale.run(
        staged(tmp_path / "recipe.yaml", idx, stages=stages, evaluate={"every": "5 steps", "select": "loss"}), out
    )
    figures = result(out)
    assert figures["best"]["step"] <= 10, "the second stage was to make it worse"
    assert_same_bits(
        {name: tensor for name, tensor in exported(out).items() if "layer4" in name},
        {
            name.removeprefix("backbone."): tensor
            for name, tensor in weights_after(out, figures["best"]["step"]).items()
            if "layer4" in name
        },
    )
    from tlscale.commands.evaluate import evaluate_run

    again = evaluate_run(out)
    assert again["top1"] == figures["top1"]
    assert again["loss"] == pytest.approx(figures["loss"], rel=1e-5)


def test_what_a_stage_freezes_keeps_its_average(idx, tmp_path):
    stages = [{"freeze": r"(conv1|bn1|layer[123])\..*", "duration": "5 steps"}, {"freeze": ".*", "duration": "5 steps"}]
    out = tmp_path / "run"
    tlscale.run(staged(tmp_path / "recipe.yaml", idx, stages=stages, optim={"ema_decay": 0.5}), out)
    average = tensors(out / "checkpoints" / "step_00000005" / "ema.safetensors")
    frozen = weights_after(out, 6)
    for name, value in average.items():
        if name.startswith("layer4"):
            assert torch.equal(frozen[f"backbone.{name}"], value), name
    assert float((weights_after(out, 5)["head.0.weight"] - average["head.0.weight"]).abs().max()) > 0
    assert last_checkpoint(out).name == "step_00000010"


# --- What is wrong with stages is found before the first step ---------------------------------------------------------


@pytest.mark.parametrize(
    ("stages", "changes", "said"),
    [
        ([{"freeze": "conv9.*", "duration": "1 epochs"}], {}, "stages[0].freeze: the rule 'conv9.*'"),
        (
            [{"duration": "1 epochs"}, {"freeze": ".*", "duration": "1 steps", "lr_rules": [{"layer1.*": 0.1}]}],
            {},
            "stages[1].lr_rules: the rule 'layer1.*'",
        ),
        (
            [{"freeze": ".*", "duration": "5 steps"}],
            {"optim": {"lr_rules": [{"layer1.*": 0.1}]}},
            "optim.lr_rules: the rule 'layer1.*'",
        ),
        (
            [{"duration": "1 epochs"}, {"duration": "2 steps"}],
            {"schedule": {"warmup": "3 steps"}},
            "schedule.warmup: 3 steps is 3 steps, and stages[1].duration = 2 steps is 2",
        ),
        (
            [{"duration": "5 steps", "lr_rules": [{"layer1.*": 0.1}]}],
            {"optim": {"lr_rules": [{"layer1.*": 0.1}]}},
            "optim.lr_rules: has no effect: every stage has its own",
        ),
        (
            [{"duration": "1 epochs"}, {"duration": "2 steps", "schedule": {"warmup": "3 steps"}}],
            {},
            "stages[1].schedule.warmup: 3 steps is 3 steps, and stages[1].duration = 2 steps is 2",
        ),
    ],
)
def test_wrong_stages(stages, changes, said, idx, tmp_path):
    recipe = staged(tmp_path / "recipe.yaml", idx, stages=stages, **changes)
    with pytest.raises(RecipeError) as caught:
        tlscale.run(recipe, tmp_path / "run")
    assert said in str(caught.value)
    assert not (tmp_path / "run" / "run.json").exists()


def test_a_rule_of_the_recipe_may_act_in_one_stage_only(idx, tmp_path):
    recipe = staged(tmp_path / "recipe.yaml", idx, optim={"lr_rules": [{r"layer4\..*": 0.1}]})
    setup = set_up(recipe, world_size=1)
    rates = [sorted({group["lr"] for group in stage.groups}) for stage in setup.stages]
    assert rates == [[5e-3], [2e-4, 2e-3], [5e-5, 5e-4]]
    assert setup.total_steps == LAST


def test_the_end_of_a_stage_is_saved_whatever_the_interval(idx, tmp_path):
    """What comes after it may take long, and a stop then must not lose the stage."""
    out = tmp_path / "run"
    recipe = staged(
        tmp_path / "recipe.yaml", idx, checkpoint={"every": "100 steps", "keep": 100}, evaluate={"every": "100 steps"}
    )
    tlscale.run(recipe, out)
    assert {5, 12, 17} <= {int(folder.name[5:]) for folder in (out / "checkpoints").glob("step_*")}


def test_half_precision_goes_on_in_the_second_stage(idx, tmp_path, monkeypatch):
    """Accelerate marks what it has wrapped, and would wrap it no second time."""
    seen, held = {}, []
    step = finetune.train_step

    def spy(model, optimizer, loss_fn, inputs, batches, *args, **options):
        with torch.no_grad():
            hidden = []
            layer = model.head[0]
            handle = layer.register_forward_hook(lambda module, inputs, output: hidden.append(output.dtype))
            model.eval()(*inputs.inputs(batches[0].to("cpu")))
            model.train()
            handle.remove()
        # A stage has a pipeline of its own.
        seen.setdefault(id(inputs), set()).update(hidden)
        held.append(inputs)
        return step(model, optimizer, loss_fn, inputs, batches, *args, **options)

    monkeypatch.setattr(finetune, "train_step", spy)
    stages = [{"duration": "2 steps"}, {"freeze": "patch_embed.*", "duration": "2 steps"}]
    changes = {"compute": {"precision": "bf16"}, "codes": {"keep": "never"}, "backbone": {"name": "test_vit"}}
    tlscale.run(staged(tmp_path / "recipe.yaml", idx, stages=stages, **changes), tmp_path / "run")
    assert list(seen.values()) == [{torch.bfloat16}, {torch.bfloat16}]
