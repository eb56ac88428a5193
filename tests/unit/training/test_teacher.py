"""What a teacher is shown: the part of an image, and the channels, that the student sees."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet

import tlscale
from tests.small_runs import put_teacher, small_recipe
from tlscale.data.input_spec import InputSpec
from tlscale.data.transforms import eval_transform
from tlscale.errors import RecipeError
from tlscale.recipe.schema import DistillSection
from tlscale.training.distillation.teacher import Teacher, open_teacher


def student(image_size, in_chans=3, crop_mode="center") -> InputSpec:
    mean, std = (0.25,) * in_chans, (0.125,) * in_chans
    return InputSpec(image_size, in_chans, mean, std, "bicubic", 1.0, crop_mode)


@pytest.fixture(name="opened")
def opened_(tmp_path):
    return partial(opened_in, tmp_path)


def opened_in(
    folder: Path, student: InputSpec, in_chans=3, image_size=None, name="test_resnet", crops=False
) -> Teacher:
    weights = put_teacher(folder / "teacher.safetensors", name, in_chans=in_chans)
    teacher = {"name": name, "weights": str(weights), "in_chans": in_chans}
    match = {"penultimate": ["penultimate"]}
    section = DistillSection.model_validate({"teacher": teacher, "match": match, "image_size": image_size})
    return open_teacher(section, 0, ("a", "b"), student, crops=crops)


def test_a_teacher_sees_the_part_of_an_image_that_the_student_sees(opened):
    with pytest.raises(RecipeError, match=r"distill.image_size: .*the student of 32 x 96 px: other proportions"):
        opened(student((32, 96)))
    assert opened(student((32, 96), crop_mode="border"), image_size=[16, 48]).spec.crop_mode == "border"
    squashed = opened(student((32, 96), crop_mode="squash")).spec
    assert (squashed.crop_mode, squashed.image_hw[0] == squashed.image_hw[1]) == ("squash", True)
    with pytest.raises(
        RecipeError, match=r"the student of 32 x 96 px: other proportions.*take crop out of data.augment"
    ):
        opened(student((32, 96), crop_mode="squash"), crops=True)
    with pytest.raises(RecipeError, match="other proportions"):
        opened(student(48), image_size=[16, 48])


@pytest.fixture(scope="module")
def run_of_teacher(idx, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    tlscale.run(small_recipe(folder / "r.yaml", idx, backbone={"in_chans": 3}, duration="1 steps"), folder / "run")
    return folder / "run"


default_cfgs = generate_default_cfgs({"squashing_resnet.untrained": {"first_conv": "conv1", "crop_mode": "squash"}})


@register_model
def squashing_resnet(pretrained=False, **keys):
    """test_resnet, if it had been pretrained on squashed images."""
    shape = {"block": BasicBlock, "layers": (1, 1, 1, 1), "channels": (16, 16, 24, 32)}
    return build_model_with_cfg(ResNet, "squashing_resnet", pretrained, **shape, **keys)


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("name", ["test_resnet", "squashing_resnet", "a run"])
def test_a_teacher_sees_an_image_that_is_not_square_as_the_student_sees_it(opened, run_of_teacher, name, crop_mode):
    """Whatever it was trained on; interpolation and mean are its own."""
    taught = student(48, crop_mode=crop_mode)
    if name == "a run":
        section = DistillSection(run=str(run_of_teacher), logits=1.0, codes=0.0)
        classes = tlscale.load(run_of_teacher).classes
        spec = open_teacher(section, 0, classes, replace(taught, image_size=32), crops=False).spec
    else:
        spec = opened(taught, name=name, image_size=48).spec
    own = {key: getattr(spec, key) for key in ("image_size", "interpolation", "mean", "std")}
    image_HWC = np.random.default_rng(0).integers(256, size=(60, 150, 3), dtype=np.uint8)
    np.testing.assert_array_equal(eval_transform(image_HWC, spec), eval_transform(image_HWC, replace(taught, **own)))


def test_a_teacher_of_many_channels_has_the_mean_that_the_student_has(opened):
    spec = opened(student(32, 5), 5, 32).spec
    assert (spec.mean, spec.std) == ((0.25,) * 5, (0.125,) * 5)
    assert opened(student(32, 1), 3, 32).spec.mean == (0.5,) * 3  # its own
    for ours, theirs in ((5, 3), (3, 5), (5, 4)):
        with pytest.raises(RecipeError, match=f"takes {theirs} channels, and backbone.in_chans is {ours}"):
            opened(student(32, ours), theirs, 32)
