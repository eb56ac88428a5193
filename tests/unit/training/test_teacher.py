"""What a teacher is shown: the part of an image, and the channels, that the student sees."""

from functools import partial
from pathlib import Path

import pytest

from tests.small_runs import put_teacher
from tlscale.data.input_spec import InputSpec
from tlscale.errors import RecipeError
from tlscale.recipe.schema import DistillSection
from tlscale.training.distillation.teacher import Teacher, open_teacher


def student(image_size, in_chans=3, crop_mode="center") -> InputSpec:
    mean, std = (0.25,) * in_chans, (0.125,) * in_chans
    return InputSpec(image_size, in_chans, mean, std, "bicubic", 1.0, crop_mode)


@pytest.fixture(name="opened")
def opened_(tmp_path):
    return partial(opened_in, tmp_path)


def opened_in(folder: Path, student: InputSpec, in_chans=3, image_size=None) -> Teacher:
    weights = put_teacher(folder / "teacher.safetensors", in_chans=in_chans)
    teacher = {"name": "test_resnet", "weights": str(weights), "in_chans": in_chans}
    match = {"penultimate": ["penultimate"]}
    section = DistillSection.model_validate({"teacher": teacher, "match": match, "image_size": image_size})
    return open_teacher(section, 0, ("a", "b"), student)


def test_a_teacher_sees_the_part_of_an_image_that_the_student_sees(opened):
    with pytest.raises(RecipeError, match=r"distill.image_size: .*the student of 32 x 96 px: other proportions"):
        opened(student((32, 96)))
    assert opened(student((32, 96), crop_mode="border"), image_size=[16, 48]).spec.crop_mode == "border"
    squashed = opened(student((32, 96), crop_mode="squash")).spec
    assert (squashed.crop_mode, squashed.image_hw[0] == squashed.image_hw[1]) == ("squash", True)
    assert opened(student(48, crop_mode="squash"), image_size=32).spec.crop_mode == "center"  # as it always was
    with pytest.raises(RecipeError, match="other proportions"):
        opened(student(48), image_size=[16, 48])


def test_a_teacher_of_many_channels_has_the_mean_that_the_student_has(opened):
    spec = opened(student(32, 5), 5, 32).spec
    assert (spec.mean, spec.std) == ((0.25,) * 5, (0.125,) * 5)
    assert opened(student(32, 1), 3, 32).spec.mean == (0.5,) * 3  # its own
    for ours, theirs in ((5, 3), (3, 5), (5, 4)):
        with pytest.raises(RecipeError, match=f"takes {theirs} channels, and backbone.in_chans is {ours}"):
            opened(student(32, ours), theirs, 32)
