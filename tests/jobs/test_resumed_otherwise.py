"""What a resumed run keeps, what it may change and says so, and what it refuses by the name of a correction."""

import json
import shutil

import pytest
import torch
from PIL import Image
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet

import tlscale
from tests.small_runs import (
    as_after,
    assert_same_bits,
    exported,
    largest_difference,
    put_small_folder,
    put_teacher,
    result,
    small_recipe,
    tensors,
)
from tlscale.errors import ResumeError
from tlscale.training import corrections
from tlscale.training.corrections import CORRECTIONS

RESNET = {"name": "test_resnet"}
HALF = {"freeze": r"(conv1|bn1|layer[12])\..*", "backbone": RESNET}
VIEWS = {**HALF, "data": {"augment": ["flip", "crop", {"mixup": 0.4}], "workers": 0}, "duration": "12 steps"}
SAVED = {"checkpoint": {"every": "1 steps", "keep": 100}, "evaluate": {"every": "3 steps"}}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TLSCALE_CACHE", str(tmp_path / "cache"))


def record_of(out):
    return json.loads((out / "run.json").read_text())


def rewrite(out, **changes):
    """`run.json` as another version would have written it; a value of None takes a key out."""
    record = {key: value for key, value in {**record_of(out), **changes}.items() if value is not None}
    (out / "run.json").write_text(json.dumps(record))


def step_of(out, number):
    return tensors(out / "checkpoints" / f"step_{number:08}" / "model.safetensors")


# -- the same views ---------------------------------------------------------------------------------------------------


def test_there_are_as_many_views_with_room_for_codes_as_without(idx, tmp_path):
    """Three epochs of two views; the third sees the first again, on codes, on images, and where codes are forbidden."""
    outs = {}
    for name, codes in (("room", {}), ("none", {"disk_gib": 1e-9}), ("never", {"keep": "never"})):
        recipe = small_recipe(
            tmp_path / f"{name}.yaml", idx, **VIEWS, **SAVED, codes={"views": 2, **codes}, name="same"
        )
        tlscale.run(recipe, tmp_path / name)
        outs[name] = tmp_path / name
    assert [result(out)["codes"] is not None for out in outs.values()] == [True, False, False]
    for name in ("none", "never"):
        assert largest_difference(exported(outs["room"]), exported(outs[name])) <= 1e-5
    fresh = small_recipe(tmp_path / "fresh.yaml", idx, **VIEWS, **SAVED, name="same")
    tlscale.run(fresh, tmp_path / "fresh")
    assert_same_bits(step_of(outs["none"], 10), step_of(tmp_path / "fresh", 10))
    assert largest_difference(step_of(outs["none"], 11), step_of(tmp_path / "fresh", 11)) > 1e-4


def test_what_was_decided_is_recorded_and_kept(idx, tmp_path):
    """Killed before its first checkpoint, a run goes on as it was decided: there is room for codes now."""
    changes = {**HALF, "duration": "2 epochs", "codes": {"disk_gib": 1e-9}}
    out = tmp_path / "run"
    tlscale.run(small_recipe(tmp_path / "r.yaml", idx, **changes), out)
    assert record_of(out)["keeps_codes"] == {"0": False}
    again = as_after(0, out, tmp_path / "again")
    tlscale.run(small_recipe(tmp_path / "r.yaml", idx, **{**changes, "codes": {}}), again, resume=True)
    assert result(again)["codes"] is None
    assert_same_bits(exported(out), exported(again))


def test_the_decision_for_each_stage_is_recorded(idx, tmp_path):
    stages = [{"freeze": ".*", "duration": "2 epochs"}, {"duration": "1 epochs"}]
    tlscale.run(small_recipe(tmp_path / "r.yaml", idx, backbone=RESNET, stages=stages), tmp_path / "run")
    assert record_of(tmp_path / "run")["keeps_codes"] == {"0": True, "1": False}


def test_one_view_for_all_epochs_and_new_ones_are_not_taken_for_each_other(idx, tmp_path):
    """`keep` may change where it only decides what is kept."""
    changes = {**HALF, **SAVED, "data": {"augment": ["flip"], "workers": 0}, "duration": "4 steps"}
    whole = tmp_path / "whole"
    tlscale.run(small_recipe(tmp_path / "r.yaml", idx, **changes), whole)
    out = as_after(3, whole, tmp_path / "run")
    with pytest.raises(ResumeError, match=r"another recipe:\n  codes.keep: 'auto' -> 'always'"):
        tlscale.run(small_recipe(tmp_path / "r.yaml", idx, **changes, codes={"keep": "always"}), out, resume=True)
    tlscale.run(small_recipe(tmp_path / "r.yaml", idx, **changes, codes={"keep": "never"}), out, resume=True)
    assert_same_bits(exported(out), exported(whole))


# -- another training -------------------------------------------------------------------------------------------------

KINDS = {
    "batch norm": ({"backbone": RESNET}, "another training (batch norm)"),
    "dropout": ({"backbone": {"drop_path_rate": 0.2}}, "another training (dropout)"),
    "both, in the head": (
        {"freeze": ".*", "codes": {"keep": "never"}, "head": [{"linear": 8}, "batchnorm", {"dropout": 0.1}, "linear"]},
        "another training (batch norm, dropout)",
    ),
    "frozen batch norm": ({"backbone": RESNET, "freeze": ".*", "codes": {"keep": "never"}}, "rounding"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_passes_on_resume_are_announced_and_recorded(idx, tmp_path, capsys, kind):
    changes, effect = KINDS[kind]
    changes = {**changes, **SAVED, "duration": "5 steps"}
    whole = tmp_path / "whole"
    tlscale.run(small_recipe(tmp_path / "r.yaml", idx, **changes), whole)
    assert result(whole)["changes"] == []
    out = as_after(3, whole, tmp_path / "run")
    capsys.readouterr()
    smaller = small_recipe(tmp_path / "r.yaml", idx, **changes, compute={"micro_batch_size": 8})
    tlscale.run(smaller, out, resume=True)
    said = " ".join(capsys.readouterr().out.split())
    made = {"step": 3, "what": "micro_batch_size", "before": 16, "after": 8, "effect": effect}
    assert result(out)["changes"] == record_of(out)["changes"] == [made]
    assert "images of a process in one pass: 16 -> 8, from step 3 on" in said
    assert ("WARNING" in said and "this is another training than the run began as" in said) == (effect != "rounding")
    difference = largest_difference(exported(out), exported(whole))
    # Dropout of 0.2 in so few steps moves little; what is only rounded does not move.
    assert difference > 1e-6 if effect != "rounding" else difference <= 1e-5


def test_a_change_whose_steps_were_lost_is_none(idx, tmp_path):
    """Resumed twice from one checkpoint: the steps between were made again, in the way of the last start."""
    changes = {"backbone": RESNET, **SAVED, "duration": "5 steps"}
    whole = tmp_path / "whole"
    tlscale.run(small_recipe(tmp_path / "r.yaml", idx, **changes), whole)
    out = as_after(3, whole, tmp_path / "run")
    tlscale.run(small_recipe(tmp_path / "r.yaml", idx, **changes, compute={"micro_batch_size": 8}), out, resume=True)
    again = as_after(3, out, tmp_path / "again")
    tlscale.run(small_recipe(tmp_path / "r.yaml", idx, **changes), again, resume=True)
    assert result(again)["changes"] == []
    assert_same_bits(exported(again), exported(whole))


def test_a_run_of_an_older_version_has_its_passes_in_words(idx, tmp_path):
    changes = {"backbone": RESNET, **SAVED, "duration": "5 steps"}
    whole = tmp_path / "whole"
    tlscale.run(small_recipe(tmp_path / "r.yaml", idx, **changes), whole)
    out = as_after(3, whole, tmp_path / "run")
    rewrite(out, computed=None, changes=None, keeps_codes=None, corrections=None)
    tlscale.run(small_recipe(tmp_path / "r.yaml", idx, **changes, compute={"micro_batch_size": 8}), out, resume=True)
    assert [change["before"] for change in result(out)["changes"]] == [16]


# -- corrections ------------------------------------------------------------------------------------------------------

BOTH = {"loss": {"class_weights": "balanced", "label_smoothing": 0.1}}
REFUSED = {
    "weights-beside-smoothing": BOTH,
    "plain-validation-loss": {"loss": {"label_smoothing": 0.1}, "evaluate": {"select": "loss", "every": "3 steps"}},
    "layer-decay-of-timm": {"backbone": {"name": "test_convnext"}, "optim": {"layer_decay": 0.7}},
    "same-views-without-codes": {**VIEWS, "codes": {"views": 2, "disk_gib": 1e-9}},
}
ALLOWED = {
    "weights alone": {"loss": {"class_weights": "balanced"}},
    "layers that timm counts as we did": {"backbone": {"name": "test_vit"}, "optim": {"layer_decay": 0.7}},
    "views of codes": {**VIEWS, "codes": {"views": 2}},
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_older_run_that_a_correction_would_change_is_refused_by_its_name(idx, tmp_path, name):
    recipe = small_recipe(tmp_path / "r.yaml", idx, **{"duration": "5 steps", **SAVED, **REFUSED[name]})
    whole = tmp_path / "whole"
    tlscale.run(recipe, whole)
    assert record_of(whole)["corrections"] == [correction.name for correction in CORRECTIONS]
    out = as_after(3, whole, tmp_path / "run")
    rewrite(out, corrections=None)
    before = {path: path.read_bytes() for path in out.rglob("*.json*")}
    with pytest.raises(ResumeError, match=f"would be another training from step 3 on:\n  {name}: "):
        tlscale.run(recipe, out, resume=True)
    assert {path: path.read_bytes() for path in out.rglob("*.json*")} == before, "nothing is touched"
    if name == "weights-beside-smoothing":
        rewrite(out, corrections=[name])
        tlscale.run(recipe, out, resume=True)
        assert_same_bits(exported(out), exported(whole))


@pytest.mark.parametrize("name", ALLOWED)
def test_an_older_run_that_no_correction_changes_goes_on(idx, tmp_path, name):
    recipe = small_recipe(tmp_path / "r.yaml", idx, **{"duration": "5 steps", **ALLOWED[name], **SAVED})
    whole = tmp_path / "whole"
    tlscale.run(recipe, whole)
    out = as_after(3, whole, tmp_path / "run")
    rewrite(out, corrections=None)
    tlscale.run(recipe, out, resume=True)
    assert_same_bits(exported(out), exported(whole))
    assert "corrections" not in record_of(out), "what began without them is known by that"


class BySizeResNet(ResNet):
    """A ResNet that computes with the size of the batch."""

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward_features(x) * (1 + x.shape[0] / 16)


default_cfgs = generate_default_cfgs(
    {"by_size_resnet.untrained": {"num_classes": 1000, "first_conv": "conv1", "classifier": "fc"}}
)


@register_model
def by_size_resnet(pretrained=False, **keys) -> torch.nn.Module:
    """A tiny one, known to timm wherever this module is imported."""
    shape = {"block": BasicBlock, "layers": (1, 1, 1, 1), "channels": (16, 16, 24, 32)}
    return build_model_with_cfg(BySizeResNet, "by_size_resnet", pretrained, **shape, **keys)


def test_a_network_that_computes_with_the_batch_size_is_trained_on_images(idx, tmp_path, capsys):
    """And an older run that trained on codes of it is refused."""
    changes = {"backbone": {"name": "by_size_resnet"}, "freeze": ".*", "codes": {"keep": "always"}}
    recipe = small_recipe(tmp_path / "r.yaml", idx, **changes, **SAVED, duration="4 steps")
    whole = tmp_path / "whole"
    tlscale.run(recipe, whole)
    assert "depends on the size of the batch" in " ".join(capsys.readouterr().out.split())
    assert result(whole)["codes"] is None
    out = as_after(3, whole, tmp_path / "run")
    rewrite(out, corrections=None)
    state = out / "checkpoints" / "step_00000003" / "state.json"
    state.write_text(state.read_text().replace('"keeps_codes": {"0": false}', '"keeps_codes": {"0": true}'))
    with pytest.raises(ResumeError, match="no-codes-of-what-counts: "):
        tlscale.run(recipe, out, resume=True)


def test_an_older_student_whose_teacher_saw_another_part_of_images_is_refused(tmp_path):
    """Where a teacher had the crop mode of its own network; of square images, and in the same mode, it is the same."""
    teacher = {"name": "test_resnet", "weights": str(put_teacher(tmp_path / "teacher.safetensors"))}
    distill = {"teacher": teacher, "image_size": 32, "match": {"penultimate": "penultimate"}}
    for name, size in (("square", (28, 28)), ("wide", (44, 28))):
        data = put_small_folder(tmp_path / f"data_{name}")
        for path in data.rglob("*.png"):
            Image.open(path).resize(size).save(path)
        changes = {"data": {"source": "folder", "crop_mode": "squash"}, "distill": distill, "duration": "5 steps"}
        recipe = small_recipe(tmp_path / f"{name}.yaml", data, **changes, **SAVED)
        whole = tmp_path / name
        tlscale.run(recipe, whole)
        recorded = record_of(whole)["teacher"]
        for mode in ("squash", "center"):
            out = as_after(3, whole, tmp_path / f"{name}_{mode}")
            rewrite(out, corrections=None, teacher={**recorded, "input": {**recorded["input"], "crop_mode": mode}})
            if (name, mode) == ("wide", "center"):
                with pytest.raises(ResumeError, match="from step 3 on:\n  teacher-with-the-students-crop: "):
                    tlscale.run(recipe, out, resume=True)
            else:
                tlscale.run(recipe, out, resume=True)
                assert_same_bits(exported(out), exported(whole))


def test_an_older_run_without_a_step_begins_anew_with_all_corrections(idx, tmp_path):
    recipe = small_recipe(tmp_path / "r.yaml", idx, duration="4 steps", **BOTH)
    tlscale.run(recipe, tmp_path / "whole")
    out = as_after(0, tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(out / "checkpoints")
    rewrite(out, corrections=None)
    tlscale.run(recipe, out, resume=True)
    assert record_of(out)["corrections"] == corrections.names()
    assert_same_bits(exported(out), exported(tmp_path / "whole"))


def test_each_correction_is_there_once_and_says_what_is_right_now():
    assert len(set(corrections.names())) == len(CORRECTIONS)
    for correction in CORRECTIONS:
        assert "now" in correction.text.split() or "now," in correction.text, correction.name
