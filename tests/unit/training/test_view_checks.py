"""Views that have no meaning with the data are refused."""

from __future__ import annotations

import pytest

from tlscale.errors import RecipeError
from tlscale.training.view_checks import refuse_senseless_views


@pytest.mark.parametrize(
    ("views", "classes"),
    [
        (["flip"], ["left eye", "none", "right eye"]),
        (["flip"], ["eye_L", "eye_R"]),
        (["flip"], ["turn-right", "turn-left"]),
        (["vertical_flip"], ["upper", "lower"]),
        (["vertical_flip", "flip"], ["a", "thumbs up", "thumbs down"]),
    ],
)
def test_a_flip_that_makes_one_class_of_another_is_refused(views, classes):
    with pytest.raises(RecipeError, match="it makes an image of '.*' one of '.*', by their names") as caught:
        refuse_senseless_views(views, classes, 0.8)
    assert caught.value.key == "evaluate.views"


@pytest.mark.parametrize(
    ("views", "classes"),
    [
        ([], ["left", "right"]),
        (["vertical_flip"], ["left", "right"]),
        (["flip"], ["upper", "lower", "l", "leftover"]),
        (["flip", "vertical_flip", "five_crop"], ["cat", "dog"]),
    ],
)
def test_other_classes_are_not(views, classes):
    refuse_senseless_views(views, classes, 0.8)


def test_crops_of_images_that_are_shown_whole_are_refused():
    with pytest.raises(RecipeError, match="shown whole, so that all crops of it are the same") as caught:
        refuse_senseless_views(["five_crop"], ["a", "b"], 1.0)
    assert "data.crop_pct" in str(caught.value.remedy)
    refuse_senseless_views(["flip"], ["a", "b"], 1.0)
