"""What a step learns of labels, against the formula written by hand: weights, smoothing, mixed labels, micro-batches
and a teacher together; and the loss that is reported."""

import itertools
import json

import numpy as np
import pytest
import torch

import tlscale
from tests.recompute import assert_follows
from tests.small_runs import lines, put_teacher, result, small_recipe, tensors
from tlscale.commands.evaluate import evaluate_run
from tlscale.data.loader import train_batches
from tlscale.data.transforms import to_input
from tlscale.training.setup import set_up
from tlscale.training.specs import open_image_cache

LR = 0.5
NAMES = {str(number): float(number + 1) ** 2 for number in range(10)}  # 1 to 100


def by_hand(recipe, weights, smoothing):
    """The head after one plain step of gradient descent, and the mean loss of labels before it: in numpy."""
    setup = set_up(recipe, world_size=1)
    store, backbone = open_image_cache(setup).train(), setup.classifier.backbone.eval()
    [step] = train_batches(
        store, setup.order, setup.split, 0,
        seed=recipe.seed, augment=setup.augment, start_step=0, stop_step=1,
        views=recipe.codes.views if recipe.distill else None,
    )  # fmt: skip
    weight_CD, bias_C = (part.detach().numpy().copy() for part in setup.classifier.head.parameters())
    counts_C = np.bincount(setup.data.train.labels_N, minlength=10)
    weights_C = {"none": np.ones(10), "balanced": 1 / counts_C, "by name": np.array(list(NAMES.values()))}[weights]
    weights_C = weights_C * counts_C.sum() / (weights_C * counts_C).sum()
    num_images = sum(batch.num_real for batch in step)
    loss, slope_CD, slope_C = 0.0, np.zeros_like(weight_CD), np.zeros_like(bias_C)
    for batch in step:
        with torch.no_grad():
            codes_BD = backbone(to_input(batch, setup.spec, torch.float64)).numpy()
        labels = [(batch.labels_B.numpy(), np.ones(len(codes_BD)))]
        if batch.partner_labels_B is not None:
            lam_B = batch.lam_B.double().numpy()
            labels = [(batch.labels_B.numpy(), lam_B), (batch.partner_labels_B.numpy(), 1 - lam_B)]
        for labels_B, share_B in labels:
            for code_D, label, share in list(zip(codes_BD, labels_B, share_B, strict=True))[: batch.num_real]:
                logits_C = weight_CD @ code_D + bias_C
                logs_C = logits_C - logits_C.max() - np.log(np.exp(logits_C - logits_C.max()).sum())
                target_C = np.full(10, smoothing / 10) + (1 - smoothing) * np.eye(10)[label]
                weight = share * weights_C[label] / num_images
                loss -= weight * (target_C @ logs_C)
                slope_CD += weight * np.outer(np.exp(logs_C) - target_C, code_D)
                slope_C += weight * (np.exp(logs_C) - target_C)
    return weight_CD - LR * slope_CD, bias_C - LR * slope_C, loss


def recipe_of(path, idx, weights, smoothing, *, augment=(), micro=None, **changes):
    return small_recipe(
        path, idx,
        data={"augment": list(augment), "workers": 0},
        loss={"class_weights": NAMES if weights == "by name" else weights, "label_smoothing": smoothing},
        optim={"name": "momentum", "lr": LR, "weight_decay": 0.0, "options": {"momentum": 0.0}},
        schedule={"warmup": "0%", "decay": "constant"},
        compute={"precision": "fp64", **({"micro_batch_size": micro} if micro else {})},
        duration="1 steps",
        **changes,
    )  # fmt: skip


def assert_one_step_is_the_formula(recipe, out, weights, smoothing, *, is_all=True):
    weight_CD, bias_C, loss = by_hand(recipe, weights, smoothing)
    tlscale.run(recipe, out)
    last = tensors(out / "checkpoints" / "step_00000001" / "model.safetensors")
    np.testing.assert_allclose(last["head.0.weight"].numpy(), weight_CD, rtol=0, atol=1e-12)
    np.testing.assert_allclose(last["head.0.bias"].numpy(), bias_C, rtol=0, atol=1e-12)
    [line] = lines(out, "train")
    if is_all:
        assert line["loss"] == pytest.approx(loss, rel=1e-12)
    else:
        assert line["loss"] > loss, "the teacher adds to it"


# Several processes end in the weights of one (tests/dist/test_matrix.py, recipe `mixed`), which these are.
COMBINATIONS = [
    *itertools.product(["none", "balanced", "by name"], [0.0, 0.1], [()], [None]),
    ("by name", 0.1, ("mixup",), None),
    ("by name", 0.1, ("cutmix",), 5),
    ("balanced", 0.3, ("mixup", "cutmix"), 3),
    ("by name", 0.1, (), 5),
]


@pytest.mark.parametrize(("weights", "smoothing", "augment", "micro"), COMBINATIONS)
def test_one_step_is_the_formula(idx, tmp_path, weights, smoothing, augment, micro):
    recipe = recipe_of(
        tmp_path / "r.yaml", idx, weights, smoothing, augment=augment, micro=micro,
        freeze=".*", codes={"keep": "never"},
    )  # fmt: skip
    assert_one_step_is_the_formula(recipe, tmp_path / "run", weights, smoothing)


UNEQUAL = {"adjusted": {"logit_adjustment": 1.5}, "focal": {"kind": "focal", "focal_gamma": 2.0}}


@pytest.mark.parametrize("name", UNEQUAL)
def test_one_step_of_a_loss_for_unequal_classes_is_the_formula(idx, tmp_path, name):
    """On real images, against torch's own gradient of the formula; what is reported is the plain cross-entropy."""
    recipe = recipe_of(tmp_path / "r.yaml", idx, "none", 0.0, freeze=".*", codes={"keep": "never"})
    recipe = recipe.with_(loss=UNEQUAL[name])
    setup = set_up(recipe, world_size=1)
    store, backbone = open_image_cache(setup).train(), setup.classifier.backbone.eval()
    [[batch]] = train_batches(
        store, setup.order, setup.split, 0, seed=0, augment=setup.augment, start_step=0, stop_step=1
    )
    weight_CD, bias_C = (part.detach().clone().requires_grad_() for part in setup.classifier.head.parameters())
    with torch.no_grad():
        codes_BD = backbone(to_input(batch, setup.spec, torch.float64))
    logits_BC = codes_BD @ weight_CD.T + bias_C
    counts_C = torch.bincount(torch.from_numpy(setup.data.train.labels_N), minlength=10).double()
    if name == "adjusted":
        logs_B = (
            (logits_BC + 1.5 * torch.log(counts_C / counts_C.sum())).log_softmax(1).gather(1, batch.labels_B[:, None])
        )
        loss = -logs_B.mean()
    else:
        logs_B = logits_BC.log_softmax(1).gather(1, batch.labels_B[:, None])
        loss = -((1 - logs_B.exp()) ** 2 * logs_B).mean()
    loss.backward()
    tlscale.run(recipe, tmp_path / "run")
    last = tensors(tmp_path / "run" / "checkpoints" / "step_00000001" / "model.safetensors")
    for part, before in (("weight", weight_CD), ("bias", bias_C)):
        after = (before - LR * before.grad).detach()
        np.testing.assert_allclose(last[f"head.0.{part}"].numpy(), after.numpy(), rtol=0, atol=1e-12)
    [line] = lines(tmp_path / "run", "train")
    assert line["loss"] == pytest.approx(float(loss.detach()), rel=1e-12)
    assert_follows(result(tmp_path / "run"), tmp_path / "run" / "predictions.parquet")


def test_beside_a_teacher_labels_weigh_the_same(idx, tmp_path, monkeypatch):
    monkeypatch.setenv("TLSCALE_CACHE", str(tmp_path / "cache"))
    teacher = put_teacher(tmp_path / "teacher.safetensors")
    distill = {
        "teacher": {"name": "test_resnet", "weights": str(teacher)},
        "image_size": 48,
        "match": {"layer2": "blocks.2"},
        "labels": 1.0,
    }
    recipe = recipe_of(tmp_path / "r.yaml", idx, "by name", 0.1, micro=5, distill=distill)
    assert_one_step_is_the_formula(recipe, tmp_path / "run", "by name", 0.1, is_all=False)


def test_the_reported_loss_is_plain_everywhere(idx, tmp_path):
    """Weights and smoothing are means of training: validation, result and `tlscale evaluate` give one figure."""
    changes = {"loss": {"class_weights": NAMES, "label_smoothing": 0.2}, "duration": "6 steps"}
    out = tmp_path / "run"
    found = tlscale.run(small_recipe(tmp_path / "r.yaml", idx, **changes), out)
    evaluated = evaluate_run(out, split_name="test")
    for key in ("loss", "top1", "macro_f1", "ece"):
        assert found[key] == pytest.approx(evaluated[key], abs=1e-6), key
    validated = evaluate_run(out, split_name="validation")
    [logged] = [line for line in lines(out, "evaluate") if line["step"] == found["best"]["step"]]
    assert logged["loss"] == pytest.approx(validated["loss"], abs=1e-6)
    assert json.loads((out / "result.json").read_text())["loss"] == result(out)["best"]["loss"]
