"""A student learns of a teacher: its codes, its logits, or both; the teacher is asked once."""

import json
import os
import random
import shutil
import signal
from contextlib import closing

import pytest
import safetensors.torch
import timm
import torch

import tlscale
from tests.small_runs import (
    When,
    assert_same_bits,
    exported,
    lines,
    logged,
    put_teacher,
    small_recipe,
)
from tlscale.commands.codes import compute_codes
from tlscale.distributed.processes import start_processes
from tlscale.errors import ModelError, RecipeError, ResumeError, Stopped
from tlscale.models.model_folder import config_digest
from tlscale.tracking.console import Console
from tlscale.training import loop as finetune
from tlscale.training.input_pipeline import ImagePipeline
from tlscale.training.setup import set_up
from tlscale.training.specs import ask_teacher, input_path, open_codes_cache, open_image_cache, pipeline_spec

IMAGES = 96 + 37  # training, held out and test images
MATCH = {"layer2": "blocks.2", "penultimate": ["blocks.2", "penultimate"]}
CODES_ONLY = {"match": MATCH, "labels": 0.0}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A tiny ResNet that saw nothing yet: what it says of an image is learned all the same."""
    weights = put_teacher(tmp_path_factory.mktemp("teacher") / "teacher.safetensors")
    return {"teacher": {"name": "test_resnet", "weights": str(weights)}, "image_size": 48}


@pytest.fixture(scope="module")
def run_of_teacher(idx, tmp_path_factory):
    """A run with its classes in another order than the data have by themselves."""
    folder = tmp_path_factory.mktemp("run")
    classes = [str(number) for number in reversed(range(10))]
    recipe = small_recipe(folder / "r.yaml", idx, data={"classes": classes}, duration="12 epochs")
    tlscale.run(recipe, folder / "run")
    return folder / "run"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TLSCALE_CACHE", str(tmp_path / "cache"))


def taught(path, idx, distill, **changes):
    return small_recipe(path / "recipe.yaml", idx, distill=distill, **changes)


def test_codes_alone(idx, teacher, tmp_path):
    recipe = taught(tmp_path, idx, {**teacher, **CODES_ONLY}, duration="8 epochs", evaluate={"select": "distill_loss"})
    found = tlscale.run(recipe, tmp_path / "out")
    assert found["strategy"] == "distill"
    assert found["codes"]["num_computed"] == IMAGES, "each image was shown to the teacher once"
    losses = [line["distill_loss"] for line in lines(tmp_path / "out", "evaluate")]
    assert losses[-1] < 0.8 * losses[0]
    assert losses[-1] < 0.9, "of standardised codes, whose mean alone has 1"
    assert found["distill_loss"] == found["codes_loss"]
    assert json.loads((tmp_path / "out" / "run.json").read_text())["teacher"]["input"]["image_size"] == 48
    # The same again with other labels' weights, and nothing is computed.
    again = taught(tmp_path, idx, {**teacher, **CODES_ONLY, "labels": 1.0}, name="again")
    assert tlscale.run(again, tmp_path / "again")["codes"]["num_computed"] == 0


def test_no_projection_is_exported(idx, teacher, tmp_path):
    tlscale.run(taught(tmp_path, idx, {**teacher, **CODES_ONLY}), tmp_path / "out")
    names = set(exported(tmp_path / "out"))
    plain = timm.create_model("test_vit", num_classes=10, in_chans=1)
    assert names == set(plain.state_dict())
    model = timm.create_model(f"local-dir:{tmp_path / 'out' / 'model'}", pretrained=True).eval()
    images = torch.randn(2, 1, 32, 32)
    assert torch.equal(model(images), tlscale.load(tmp_path / "out").model(images))


def test_labels_have_no_part_in_the_backbone_where_they_weigh_nothing(idx, teacher, tmp_path):
    """The loss on labels is changed beyond recognition; the backbone has the same bits, the head has not."""
    for name, loss in (("plain", {}), ("smoothed", {"label_smoothing": 0.9})):
        evaluate = {"select": "distill_loss"}
        tlscale.run(taught(tmp_path, idx, {**teacher, **CODES_ONLY}, loss=loss, evaluate=evaluate), tmp_path / name)
    plain, smoothed = exported(tmp_path / "plain"), exported(tmp_path / "smoothed")
    heads = {"head.weight", "head.bias"}
    assert_same_bits(*({k: v for k, v in some.items() if k not in heads} for some in (plain, smoothed)))
    assert not torch.equal(plain["head.weight"], smoothed["head.weight"])


def test_codes_that_a_probe_computed_are_there_already(idx, teacher, tmp_path):
    weights = teacher["teacher"]["weights"]
    probe = small_recipe(
        tmp_path / "probe.yaml",
        idx,
        data={"image_size": 48, "crop_pct": 1.0},
        backbone={"name": "test_resnet", "weights": weights, "in_chans": 3},
        probe={"kind": "ridge"},
        codes={"layer": ["layer2", "penultimate"]},
    )
    assert tlscale.run(probe, tmp_path / "probe")["codes"]["num_computed"] == IMAGES
    found = tlscale.run(taught(tmp_path, idx, {**teacher, **CODES_ONLY}), tmp_path / "out")
    assert found["codes"]["num_computed"] == 0


def test_codes_that_were_computed_ahead_are_there_already(idx, teacher, tmp_path):
    changes = {"data": {"augment": ["flip"], "workers": 0}, "codes": {"views": 2}}
    recipe = taught(tmp_path, idx, {**teacher, **CODES_ONLY}, **changes)
    assert compute_codes(recipe) == 2 * 77 + 19 + 37
    assert tlscale.run(recipe, tmp_path / "out")["codes"]["num_computed"] == 0


RESUMED = {
    "codes": {"distill": CODES_ONLY, "optim": {"ema_decay": 0.9}},
    "codes and labels, views": {
        "distill": {"match": MATCH},
        "codes": {"views": 3},
        "data": {"augment": ["flip", "crop"], "workers": 0},
        "backbone": {"drop_path_rate": 0.2},
    },
    "views by workers": {
        "distill": CODES_ONLY,
        "codes": {"views": 2},
        "data": {"augment": ["flip"], "workers": 2},
        "compute": {"micro_batch_size": 4},
    },
    "stages": {
        "distill": {"match": {"penultimate": "penultimate"}},
        "stages": [{"freeze": ".*", "duration": "7 steps"}, {"duration": "13 steps"}],
    },
}


@pytest.mark.parametrize("name", RESUMED)
def test_stopped_and_resumed_equals_not_stopped(name, idx, teacher, tmp_path):
    changes = {"duration": "4 epochs", "checkpoint": {"every": "5 steps"}, **RESUMED[name]}
    changes = {key: value for key, value in changes.items() if key != "duration" or "stages" not in changes}
    distill = {**teacher, **changes.pop("distill")}
    recipe = taught(tmp_path, idx, distill, **changes)
    tlscale.run(recipe, tmp_path / "whole")
    for step in (random.randint(1, 9), random.randint(11, 18)):
        print(f"{step=}")
        stops = When(logged(tmp_path / "parts", step), lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped), stops:
            tlscale.run(recipe, tmp_path / "parts", resume=True)
    tlscale.run(recipe, tmp_path / "parts", resume=True)
    assert_same_bits(exported(tmp_path / "whole"), exported(tmp_path / "parts"))
    assert lines(tmp_path / "whole") == lines(tmp_path / "parts")


@pytest.mark.parametrize("name", ["codes", "codes and labels, views"])
def test_the_teacher_is_asked_of_what_the_student_sees(name, idx, teacher, tmp_path):
    """At the student's own size the pixels are the same, so the teacher can be asked again of any batch."""
    changes = {**RESUMED[name], "duration": "4 epochs"}
    distill = {**teacher, **changes.pop("distill"), "image_size": 32}
    distill["teacher"] = {**distill["teacher"], "in_chans": 1}
    changes["data"] = {**changes.get("data", {}), "interpolation": "bilinear"}  # as the teacher's pixels are made
    recipe = taught(tmp_path, idx, distill, **changes)
    processes = start_processes(recipe.compute)
    with closing(processes):
        setup = set_up(recipe, world_size=1)
        codes_cache = open_codes_cache(setup, processes, Console(enabled=False))
        targets = ask_teacher(setup, processes, codes_cache)
        spec = pipeline_spec(setup, processes.device)
        feed = ImagePipeline(spec, processes, setup.classifier, codes_cache.images, targets, recipe.codes.views)
        seen = [batch for batches in feed.steps(0, setup.total_steps) for batch in batches]
        asked = {}
        assert setup.teacher.spec.interpolation == "bilinear"
        setup.spec = setup.teacher.spec  # the mean and deviation of the teacher's input
        to_input = input_path(setup, processes.device)
        for batch in seen:
            with torch.no_grad():
                codes = torch.cat(setup.teacher.module(*to_input(batch)), 1)
            for row, pixels, code, target in zip(batch.rows_B, batch.images_BCHW, codes, batch.targets_BT, strict=True):
                asked.setdefault((int(row), pixels.numpy().tobytes()), []).append((code, target))
        views = recipe.codes.views
        assert len(asked) == 77 * views
        pairs = [pair for pairs in asked.values() for pair in pairs]
        codes, wanted = (torch.stack(some).double() for some in zip(*pairs, strict=True))
        every = torch.stack([pairs[0][0] for pairs in asked.values()]).double()
        std, mean = torch.std_mean(every, dim=0, correction=0)
        changing = std > 1e-4
        assert changing.sum() > 50
        assert torch.allclose(((codes - mean) / std)[:, changing], wanted[:, changing], atol=1e-3)


def test_logits_of_a_run_by_the_names_of_its_classes(idx, run_of_teacher, tmp_path):
    """A student that hears of labels by its teacher alone comes to answer as that one does."""
    distill = {"run": str(run_of_teacher), "codes": 0.0, "logits": 1.0, "labels": 0.0, "temperature": 2.0}
    recipe = taught(tmp_path, idx, distill, duration="30 epochs", evaluate={"select": "distill_loss"})
    found = tlscale.run(recipe, tmp_path / "out")
    assert found["codes"]["num_computed"] == IMAGES
    student, known = tlscale.load(tmp_path / "out"), tlscale.load(run_of_teacher)
    assert student.classes == tuple(reversed(known.classes))
    setup = set_up(recipe, world_size=1)
    images = open_image_cache(setup).of(setup.data.train).images(torch.arange(77).numpy())
    inputs = (images.float() / 255 - student.input_spec.mean[0]) / student.input_spec.std[0]
    with torch.no_grad():
        answers = [[one.classes[at] for at in one.model(inputs).argmax(1)] for one in (student, known)]
    assert sum(a == b for a, b in zip(*answers, strict=True)) > 60
    shown = lines(tmp_path / "out", "evaluate")
    assert shown[-1]["distill_loss"] == shown[-1]["logits_loss"] < 0.5 * shown[0]["logits_loss"]


def test_all_three_losses_together(idx, run_of_teacher, tmp_path):
    distill = {"run": str(run_of_teacher), "match": {"blocks.3": "blocks.3"}, "codes": 2.0, "logits": 0.5}
    found = tlscale.run(taught(tmp_path, idx, distill), tmp_path / "out")
    assert found["distill_loss"] == pytest.approx(2 * found["codes_loss"] + 0.5 * found["logits_loss"])


def test_another_teacher_cannot_go_on(idx, teacher, tmp_path):
    weights = tmp_path / "weights.safetensors"
    shutil.copy(teacher["teacher"]["weights"], weights)
    distill = {**teacher, **CODES_ONLY, "teacher": {"name": "test_resnet", "weights": str(weights)}}
    recipe = taught(tmp_path, idx, distill)
    stops = When(logged(tmp_path / "out", 3), lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped), stops:
        tlscale.run(recipe, tmp_path / "out")
    state = safetensors.torch.load_file(weights)
    safetensors.torch.save_file({name: tensor + 1 for name, tensor in state.items()}, weights)
    with pytest.raises(ResumeError, match="its teacher's weights are not those that it was started with"):
        tlscale.run(recipe, tmp_path / "out", resume=True)


WRONG = {
    "layer of the teacher": ({"match": {"layr2": "blocks.2"}}, ModelError, "distill.match: teacher: ResNet has"),
    "layer of the student": ({"match": {"layer2": "block.2"}}, ModelError, "distill.match: student: VisionTr"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be(name, idx, teacher, tmp_path):
    distill, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        set_up(taught(tmp_path, idx, {**teacher, **distill}), world_size=1)


def test_a_run_with_other_classes(idx, run_of_teacher, tmp_path):
    config = run_of_teacher / "model" / "config.json"
    text = config.read_text()
    try:
        plain = json.loads(text)
        assert plain["tlscale"]["classes"][0] == "9"
        plain["tlscale"]["classes"][0] = "nine"
        plain["tlscale"]["config_sha256"] = config_digest(plain)  # as an export of such a model has it
        config.write_text(json.dumps(plain))
        recipe = taught(tmp_path, idx, {"run": str(run_of_teacher), "codes": 0.0, "logits": 1.0})
        with pytest.raises(RecipeError, match="knows other classes than the data have: 9, nine are in one of them"):
            set_up(recipe, world_size=1)
    finally:
        config.write_text(text)


def test_what_is_trained_on_is_said_before(idx, teacher, tmp_path, monkeypatch):
    """A step's loss is the mean over its images of what the objective says."""
    recipe = taught(tmp_path, idx, {**teacher, **CODES_ONLY}, duration="3 steps")
    tlscale.run(recipe, tmp_path / "out")
    found = [line["loss"] for line in lines(tmp_path / "out", "train")]
    sums, step = [], finetune.train_step

    def spy(model, optimizer, loss_fn, inputs, batches, *args, **options):
        model.train()
        with torch.no_grad():
            losses = [loss_fn(model(*inputs.inputs(batch)), batch).sum() for batch in batches]
        sums.append(float(sum(losses)) / options["num_images"])
        return step(model, optimizer, loss_fn, inputs, batches, *args, **options)

    monkeypatch.setattr(finetune, "train_step", spy)
    tlscale.run(recipe, tmp_path / "again")
    assert found == pytest.approx(sums, abs=1e-5)
