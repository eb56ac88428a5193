"""What the backbone sees, against timm's and torchvision's own."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import timm.data
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tlscale.data.input_spec import InputSpec, resolve_input
from tlscale.data.resize import seen_share
from tlscale.data.transforms import ImageBatch, eval_transform, normalise, to_input
from tlscale.errors import RecipeError
from tlscale.recipe.image_size import height_width
from tlscale.recipe.schema import DataSection

IMAGENET = {
    "input_size": (3, 224, 224),
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "interpolation": "bilinear",
    "crop_pct": 0.875,
    "crop_mode": "center",
}


def section(**keys) -> DataSection:
    return DataSection(source="fashion_mnist", **keys)


def spec_of(size=16, chans=3, **keys) -> InputSpec:
    values = {"mean": (0.4, 0.5, 0.6)[:chans], "std": (0.2, 0.3, 0.1)[:chans], "interpolation": "bicubic"}
    return InputSpec(**({"image_size": size, "in_chans": chans, "crop_pct": 1.0} | values | keys))


def random_image(height: int, width: int, chans: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, chans), dtype=np.uint8)


def by_timm(image: np.ndarray, spec: InputSpec) -> np.ndarray:
    transform = timm.data.create_transform(
        input_size=spec.shape_CHW,
        crop_pct=spec.crop_pct,
        crop_mode=spec.crop_mode,
        interpolation=spec.interpolation,
        mean=spec.mean,
        normalize=False,
    )
    return transform(Image.fromarray(image.squeeze())).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("crop_pct", [1.0, 0.875, 0.9])
@pytest.mark.parametrize("chans", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(28, 28), (41, 64), (97, 50), (16, 16), (9, 30)])
def test_evaluation_is_timms(height, width, chans, crop_pct, crop_mode):
    image = random_image(height, width, chans)
    for size, interpolation in ((16, "bicubic"), (32, "bilinear"), ((16, 24), "bicubic"), ((40, 13), "bilinear")):
        spec = spec_of(size, chans, crop_pct=crop_pct, crop_mode=crop_mode, interpolation=interpolation)
        ours = eval_transform(image, spec)
        assert ours.shape == (*height_width(size), chans)
        assert ours.dtype == np.uint8
        assert np.array_equal(ours, by_timm(image, spec))


@given(
    height=st.integers(1, 90), width=st.integers(1, 90), size=st.tuples(st.integers(8, 40), st.integers(8, 40)),
    crop_pct=st.floats(0.3, 1.0), crop_mode=st.sampled_from(["center", "squash", "border"]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_any_image_has_the_size_of_the_spec(height, width, size, crop_pct, crop_mode):
    spec = spec_of(size, crop_pct=crop_pct, crop_mode=crop_mode, interpolation="nearest")
    assert eval_transform(random_image(height, width, 3), spec).shape == (*size, 3)


def test_an_image_of_the_right_size_is_left_alone():
    image = random_image(28, 28, 1)
    assert eval_transform(image, spec_of(28, 1)) is image


@pytest.mark.parametrize(
    "model", ["resnet18", "tf_efficientnet_lite0", "vit_tiny_patch16_224", "vit_base_patch16_siglip_224"]
)
def test_resolution_is_timms_for_three_channels(model):
    cfg = timm.get_pretrained_cfg(model).to_dict()
    wanted = timm.data.resolve_data_config(pretrained_cfg=cfg)
    spec = resolve_input(section(), in_chans=3, pretrained_cfg=cfg, sizes=[(500, 400)])
    assert spec.shape_CHW == wanted["input_size"]
    for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode"):
        assert getattr(spec, key) == wanted[key]


def test_one_channel_has_one_mean_and_one_std():
    """timm keeps three of each (pitfall T16)."""
    spec = resolve_input(section(), in_chans=1, pretrained_cfg=IMAGENET, sizes=[(28, 28)])
    assert spec.mean == pytest.approx((0.449,), abs=1e-12)
    assert spec.std == pytest.approx((0.226,), abs=1e-12)
    assert normalise(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), spec, torch.float32).shape == (2, 1, 4, 4)


def test_the_recipe_wins():
    asked = section(image_size=40, mean=[0.1, 0.2, 0.3], std=[1.0, 1.0, 0.2], crop_pct=0.5, interpolation="lanczos")
    spec = resolve_input(asked, in_chans=3, pretrained_cfg=IMAGENET, sizes=[(10, 10)])
    assert spec == InputSpec(40, 3, (0.1, 0.2, 0.3), (1.0, 1.0, 0.2), "lanczos", 0.5, "center")


@pytest.mark.parametrize(
    ("mode", "crop_pct", "expected"),
    [
        ("auto", None, ("border", 0.875)),
        ("center", None, ("center", 0.875)),
        ("squash", None, ("squash", 1.0)),
        ("border", None, ("border", 1.0)),
        ("squash", 0.9, ("squash", 0.9)),
    ],
)
def test_who_asks_to_see_all_of_an_image_sees_all_of_it(mode, crop_pct, expected):
    asked = section(crop_mode=mode, crop_pct=crop_pct)
    spec = resolve_input(asked, in_chans=3, pretrained_cfg=IMAGENET | {"crop_mode": "border"}, sizes=[(500, 500)])
    assert (spec.crop_mode, spec.crop_pct) == expected


@given(
    height=st.integers(24, 90), width=st.integers(24, 90), crop_pct=st.floats(0.3, 1.0),
    crop_mode=st.sampled_from(["center", "squash", "border"]), size=st.sampled_from([64, (64, 90), (100, 64)]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_the_share_that_is_seen_is_that_of_the_pixels(height, width, crop_pct, crop_mode, size):
    """Rows and columns are numbered by their values, so that the first and last that are seen tell how many are."""
    spec = spec_of(size, 3, crop_pct=crop_pct, crop_mode=crop_mode, interpolation="nearest", mean=(0.0, 0.0, 0.0))
    image = np.zeros((height, width, 3), np.uint8)
    image[:, :, 0] = np.arange(1, height + 1)[:, None]
    image[:, :, 1] = np.arange(1, width + 1)
    seen = eval_transform(image, spec)
    rows, columns = (np.unique(seen[:, :, chan][seen[:, :, chan] > 0]).tolist() for chan in (0, 1))
    # Nearest pixels: at each of the two edges of a side one may be missed, or seen in part.
    share = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1) / (height * width)
    assert share == pytest.approx(seen_share(height, width, spec), abs=(1 + 2 / min(height, width)) ** 2 - 1)


@pytest.mark.parametrize(
    ("image_hw", "image_size", "expected"),
    [
        ((28, 28), None, 1.0),
        ((255, 300), None, 1.0),
        ((256, 300), None, 0.875),
        ((28, 28), 24, 0.875),
        ((28, 28), 28, 1.0),
    ],
)
def test_small_images_are_not_cropped(image_hw, image_size, expected):
    spec = resolve_input(section(image_size=image_size), in_chans=3, pretrained_cfg=IMAGENET, sizes=[image_hw])
    assert spec.crop_pct == expected
    assert (min(image_hw) >= math.ceil(spec.image_size / 0.875)) == (expected < 1)


@pytest.mark.parametrize(
    ("image_hw", "expected"),
    [((37, 220), 0.875), ((36, 220), 1.0), ((37, 219), 1.0), ((220, 37), 1.0), ((400, 400), 0.875)],
)
def test_images_smaller_than_the_crop_on_one_side_are_not_cropped(image_hw, expected):
    spec = resolve_input(section(image_size=[32, 192]), in_chans=3, pretrained_cfg=IMAGENET, sizes=[image_hw])
    assert (spec.image_size, spec.crop_pct) == ((32, 192), expected)


def test_most_images_decide_whether_there_is_a_crop():
    sizes = [(37, 220), (36, 600), (400, 400), (37, 219), (80, 240)]
    for left, expected in ((sizes, 0.875), (sizes[:4], 1.0)):
        spec = resolve_input(section(image_size=[32, 192]), in_chans=3, pretrained_cfg=IMAGENET, sizes=left)
        assert spec.crop_pct == expected


def test_a_square_is_one_number_however_it_is_written():
    assert section(image_size=[64, 64]) == section(image_size=64)
    spec = resolve_input(section(), in_chans=3, pretrained_cfg={"input_size": (3, 96, 96)}, sizes=[(9, 9)])
    assert spec.to_plain()["image_size"] == 96
    assert section(image_size=[64, 96]).model_dump()["image_size"] == [64, 96]


def test_a_backbone_of_long_images_has_its_own_size():
    spec = resolve_input(section(), in_chans=3, pretrained_cfg={"input_size": (3, 1024, 768)}, sizes=[(9, 9)])
    assert (spec.image_size, spec.crop_mode) == ((1024, 768), "center")
    assert InputSpec.from_plain(json.loads(json.dumps(spec.to_plain()))) == spec


def test_a_silent_configuration_has_timms_defaults():
    spec = resolve_input(section(), in_chans=3, pretrained_cfg={"mean": None, "crop_pct": None}, sizes=[(600, 600)])
    wanted = timm.data.resolve_data_config(pretrained_cfg={"architecture": "x"})
    assert spec == InputSpec(224, 3, wanted["mean"], wanted["std"], "bicubic", wanted["crop_pct"])


def test_random_interpolation_is_bicubic():
    cfg = IMAGENET | {"interpolation": "random"}
    assert resolve_input(section(), in_chans=3, pretrained_cfg=cfg, sizes=[(9, 9)]).interpolation == "bicubic"


def test_what_cannot_be_resolved_says_what_to_set():
    with pytest.raises(RecipeError, match=r"'lanczos9'.*data\.interpolation"):
        resolve_input(section(), in_chans=3, pretrained_cfg={"interpolation": "lanczos9"}, sizes=[(9, 9)])


def test_a_spec_survives_json():
    spec = spec_of(chans=1, crop_mode="border")
    assert InputSpec.from_plain(json.loads(json.dumps(spec.to_plain()))) == spec


def batch_of(count: int, spec: InputSpec, seed: int = 0, **keys) -> ImageBatch:
    shape = (count, spec.in_chans, spec.image_size, spec.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return ImageBatch(images, torch.arange(count), torch.arange(count), count, **keys)


@pytest.mark.parametrize("chans", [1, 3])
def test_normalisation_is_torchvisions(chans):
    spec = spec_of(12, chans)
    batch = batch_of(5, spec)
    transform = timm.data.create_transform((chans, 12, 12), mean=spec.mean, std=spec.std, crop_pct=1.0)
    wanted = torch.stack([transform(Image.fromarray(x.permute(1, 2, 0).numpy().squeeze())) for x in batch.images_BCHW])
    assert torch.allclose(to_input(batch, spec, torch.float32), wanted, rtol=0, atol=1e-6)
    exact = (batch.images_BCHW.double() / 255 - torch.tensor(spec.mean, dtype=torch.float64)[:, None, None]) / (
        torch.tensor(spec.std, dtype=torch.float64)[:, None, None]
    )
    assert torch.allclose(to_input(batch, spec, torch.float64), exact, rtol=0, atol=1e-13)
    assert to_input(batch, spec, torch.bfloat16).dtype == torch.bfloat16


def test_the_mean_color_becomes_nearly_zero():
    spec = spec_of(8)
    gray = torch.tensor(spec.mean_color, dtype=torch.uint8)[None, :, None, None].expand(1, 3, 8, 8)
    assert normalise(gray, spec, torch.float32).abs().max() < 0.5 / 255 / min(spec.std) + 1e-6


def test_mixing_blends_or_pastes_each_image_by_its_own_numbers():
    spec = spec_of(8)
    boxes = torch.tensor([[0, 0, 0, 0], [2, 5, 1, 8], [0, 8, 0, 8], [3, 3, 0, 8]])
    lam = torch.tensor([0.25, 1 - 21 / 64, 0.0, 1.0])
    other = batch_of(4, spec, seed=1)
    batch = batch_of(4, spec, partners_BCHW=other.images_BCHW, lam_B=lam, boxes_B4=boxes)
    own, partner = normalise(batch.images_BCHW, spec, torch.float32), normalise(other.images_BCHW, spec, torch.float32)
    mixed = to_input(batch, spec, torch.float32)
    assert torch.allclose(mixed[0], 0.25 * own[0] + 0.75 * partner[0], atol=1e-6)
    pasted = own[1].clone()
    pasted[:, 2:5, 1:8] = partner[1][:, 2:5, 1:8]
    assert torch.equal(mixed[1], pasted)
    assert torch.equal(mixed[2], partner[2])
    assert torch.equal(mixed[3], own[3])


def test_a_batch_moves_whole():
    spec = spec_of(8)
    batch = batch_of(2, spec, lam_B=torch.ones(2))
    moved = batch.to("meta", non_blocking=True)
    assert moved.images_BCHW.device.type == moved.lam_B.device.type == moved.rows_B.device.type == "meta"
    assert (moved.num_real, moved.partners_BCHW) == (2, None)
    assert batch.images_BCHW.device.type == "cpu"


def test_statistics_made_in_an_evaluation_serve_in_training():
    spec = spec_of(8, mean=(0.11, 0.12, 0.13))
    with torch.inference_mode():
        to_input(batch_of(1, spec), spec, torch.float32)
    weight = torch.ones(1, requires_grad=True)
    (to_input(batch_of(1, spec), spec, torch.float32) * weight).sum().backward()
    assert weight.grad is not None
