"""Views of an image: which there are, and that each is the pixels that its name says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms import functional

from tests.unit.data.test_transforms import random_image, spec_of
from tlscale.data.loader import stacked
from tlscale.data.transforms import ImageBatch, InputPath, eval_transform, to_input
from tlscale.data.views import CENTER, CORNERS, PLAIN, View, crop_places, views_of


def batch_of(images_BCHW):
    rows_B = torch.arange(len(images_BCHW))
    return ImageBatch(images_BCHW, rows_B, rows_B, len(images_BCHW))


def test_views_are_all_combinations_the_plain_image_first():
    assert views_of([]) == (PLAIN,)
    assert views_of(["flip"]) == (PLAIN, View(flips=("flip",)))
    ten = views_of(["five_crop", "flip"])
    assert ten == views_of(["flip", "five_crop"])
    assert ten[0] == PLAIN
    assert {view.place for view in ten} == {CENTER, *CORNERS}
    assert len(set(map(str, ten))) == 10
    assert len(set(views_of(["vertical_flip", "flip", "five_crop"]))) == 20


@pytest.mark.parametrize("chans", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(28, 28), (41, 64), (97, 50)])
def test_crops_are_torchvisions_five(height, width, chans):
    spec, image = spec_of(16, chans, crop_pct=0.8), random_image(height, width, chans)
    crops_HWC = eval_transform(image, spec, crop_places(["five_crop"]))
    assert crops_HWC.shape == (16, 16, 5 * chans)
    # All that the crops are cut from: the image as it is resized.
    scale = 20 / min(height, width)
    large = spec_of((int(height * scale), int(width * scale)), chans, crop_mode="squash")
    resized_CHW = torch.tensor(eval_transform(image, large)).permute(2, 0, 1)
    top_left, top_right, bottom_left, bottom_right, center = functional.five_crop(resized_CHW, [16, 16])
    expected = torch.cat([center, top_left, top_right, bottom_left, bottom_right]).permute(1, 2, 0).numpy()
    assert np.array_equal(crops_HWC, expected)
    assert np.array_equal(crops_HWC[:, :, :chans], eval_transform(image, spec))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("chans", [1, 3])
def test_inputs_of_views_are_those_of_the_crops_turned_round(chans, count):
    spec, names = spec_of(16, chans, crop_pct=0.8), ["flip", "vertical_flip", "five_crop"]
    path = InputPath(spec, torch.float32, torch.device("cpu"), channels_last=False)
    images = [random_image(30, 40, chans, seed=seed) for seed in range(count)]
    joined = torch.from_numpy(stacked([eval_transform(image, spec, crop_places(names)) for image in images]))
    found = path.of_views(batch_of(joined), views_of(names))
    for view, inputs_BCHW in zip(views_of(names), found, strict=True):
        alone = torch.from_numpy(stacked([eval_transform(image, spec, [view.place]) for image in images]))
        expected = to_input(batch_of(alone), spec, torch.float32)
        for name, dim in (("flip", 3), ("vertical_flip", 2)):
            expected = expected.flip(dim) if name in view.flips else expected
        assert torch.equal(inputs_BCHW, expected), view
        assert inputs_BCHW.stride() == expected.stride(), view
        assert torch.equal(path.of_views(batch_of(alone), (view,))[0], expected), view
