"""Augmentation depends on an image and its key, and on nothing else."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tlscale.data.input_spec import InputSpec
from tlscale.data.sampler import Stream, image_keys
from tlscale.data.transforms import MIXES, STEPS, Augmenter
from tlscale.recipe.field_types import AUGMENTATIONS, augmentation_values
from tlscale.recipe.schema import DataSection

SIZE = 20
RECIPES = {
    "none": [],
    "flip": ["flip"],
    "crop": [{"crop": 0.2}],
    "vertical_flip": ["vertical_flip"],
    "rotation": [{"rotation": 45.0}],
    "color_jitter": ["color_jitter"],
    "trivialaugment": ["trivialaugment"],
    "trivialaugment_geometric": ["trivialaugment_geometric"],
    "blur": [{"blur": 1.0}],
    "randaugment": [{"randaugment": 30.0}],
    "erasing": [{"erasing": 1.0}],
    "all": [
        *("flip", "vertical_flip", "crop", "rotation", "color_jitter", "randaugment", "blur", "erasing"),
        *("mixup", "cutmix"),
    ],
}
GOLDEN_PARTNERS = [915, 412, 898, 99]
GOLDEN_LAM = [0.7417203, 0.7802572, 0.9975, 1.87e-05]
GOLDEN_BOXES = [[0, 0, 0, 0], [0, 0, 0, 0], [8, 9, 12, 13], [0, 0, 0, 0]]


def augmenter(items: list, chans: int = 3, interpolation: str = "bicubic") -> Augmenter:
    values = augmentation_values(DataSection(source="fashion_mnist", augment=items).augment)
    mean = (100 / 255, 110 / 255, 120 / 255)[:chans]
    return Augmenter(values, InputSpec(SIZE, chans, mean, mean, interpolation, crop_pct=1.0))


def images(count: int, chans: int = 3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, chans, SIZE, SIZE), dtype=torch.uint8, generator=generator)


def keys(rows, epoch: int = 0, stream: Stream = Stream.OWN) -> np.ndarray:
    return image_keys(3, epoch, np.asarray(rows), stream)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("chans", [1, 3])
def test_an_image_is_augmented_alike_in_any_batch(name, chans):
    augment, some = augmenter(RECIPES[name], chans), images(12, chans)
    together = augment.augment(some, keys(range(12)))
    assert together.shape == (12, chans, SIZE, SIZE)
    assert together.dtype == torch.uint8
    for order in ([5], [11, 3], list(range(11, -1, -1))):
        assert torch.equal(augment.augment(some[order], keys(order)), together[order])


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "none"])
def test_epochs_and_images_differ(name):
    augment, some = augmenter(RECIPES[name]), images(1).expand(64, -1, -1, -1)
    first, second = augment.augment(some, keys(range(64))), augment.augment(some, keys(range(64), epoch=1))
    assert not torch.equal(first, second)
    assert len({image.numpy().tobytes() for image in first}) >= (2 if "flip" in name else 12)


@pytest.mark.parametrize(("height", "width"), [(16, 48), (60, 20)])
def test_images_that_are_not_square_keep_their_size_and_proportions(height, width):
    """Crops distort a long picture no more than a square one: its sides by 3/4 to 4/3 of each other."""
    values = augmentation_values(DataSection(source="fashion_mnist", augment=[{"crop": 0.5}]).augment)
    spec = InputSpec((height, width), 3, (0.0,) * 3, (1.0,) * 3, "bilinear", crop_pct=1.0)
    picture = torch.zeros(3, 4 * height, 4 * width, dtype=torch.uint8)
    picture[0] = torch.arange(4 * height)[:, None]
    picture[1] = torch.arange(4 * width)
    out = Augmenter(values, spec).augment([picture] * 40, keys(range(40))).int()
    assert out.shape == (40, 3, height, width)
    down = (out[:, 0, -1, 0] - out[:, 0, 0, 0]) / (height - 1)
    across = (out[:, 1, 0, -1] - out[:, 1, 0, 0]) / (width - 1)
    assert ((across / down > 0.7) & (across / down < 1.42)).all()
    assert (across / down).std() > 0.05
    everything = DataSection(source="fashion_mnist", augment=RECIPES["all"]).augment
    augment = Augmenter(augmentation_values(everything), spec)
    assert augment.augment([picture] * 8, keys(range(8))).shape == (8, 3, height, width)


def test_a_box_of_cutmix_has_the_proportions_of_the_image():
    share, (top, bottom, left, right) = MIXES["cutmix"](0.75, 0.5, 0.5, (40, 80))
    assert (bottom - top, right - left) == (20, 40)
    assert share == 0.75
    share, (top, bottom, left, right) = MIXES["cutmix"](0.0, 0.999, 0.0, (40, 80))
    assert (top, bottom, left, right) == (19, 40, 0, 40)
    assert share == 1 - 21 * 40 / 3200


def test_without_augmentation_images_are_left_alone():
    some = images(3)
    assert augmenter([]).augment(some, keys(range(3))) is some
    assert augmenter(["mixup"]).augment(some, keys(range(3))) is some


def test_no_generator_notices():
    np_state, py_state, torch_state = np.random.get_state(), random.getstate(), torch.get_rng_state()
    threads = torch.get_num_threads()
    for name in RECIPES:
        augment = augmenter(RECIPES[name])
        augment.augment(images(4), keys(range(4)))
        if augment.mixes:
            augment.draw_mixes(keys(range(4)), 100)
    assert random.getstate() == py_state
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), np_state, strict=True))
    assert torch.get_num_threads() == threads


def test_the_generator_is_given_back_after_an_error():
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="shorter"):
        augmenter(["flip"]).augment(images(2), keys(range(1)))
    assert torch.equal(torch.get_rng_state(), state)


def test_no_other_generator_has_a_part():
    augment, some = augmenter(RECIPES["all"]), images(8)
    wanted, mixes = augment.augment(some, keys(range(8))), augment.draw_mixes(keys(range(8)), 50)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    assert torch.equal(augment.augment(some, keys(range(8))), wanted)
    assert np.array_equal(augment.draw_mixes(keys(range(8)), 50).lam_B, mixes.lam_B)


def test_flip_flips_as_often_as_asked():
    some = images(1).expand(1000, -1, -1, -1)
    for probability in (0.0, 0.3, 1.0):
        flipped = augmenter([{"flip": probability}]).augment(some, keys(range(1000)))
        share = (flipped == some[0].flip(-1)).flatten(1).all(1).float().mean().item()
        assert abs(share - probability) <= 4 * (probability * (1 - probability) / 1000) ** 0.5


def test_a_vertical_flip_turns_an_image_over_as_often_as_asked():
    some = images(1).expand(1000, -1, -1, -1)
    flipped = augmenter([{"vertical_flip": 0.3}]).augment(some, keys(range(1000)))
    share = (flipped == some[0].flip(-2)).flatten(1).all(1).float().mean().item()
    assert abs(share - 0.3) <= 4 * (0.3 * 0.7 / 1000) ** 0.5


def test_a_rotation_turns_up_to_so_many_degrees_and_fills_with_the_mean_color():
    """A bar through the middle, white on black: its direction after the rotation is its angle."""
    size = 61
    bar = torch.zeros(3, size, size, dtype=torch.uint8)
    bar[:, size // 2 - 1 : size // 2 + 2] = 255
    values = augmentation_values([{"rotation": 30.0}])
    spec = InputSpec(size, 3, (0.2, 0.4, 0.6), (1.0, 1.0, 1.0), "bilinear", crop_pct=1.0)
    rotated = Augmenter(values, spec).augment(bar.expand(300, -1, -1, -1), keys(range(300)))
    y_H1, x_W = torch.arange(size)[:, None] - size // 2, torch.arange(size) - size // 2
    white = (rotated[:, 0] > 200) & (y_H1**2 + x_W**2 <= (size // 2) ** 2)
    degrees = [float(torch.rad2deg(torch.atan2((w * x_W * y_H1).sum(), (w * x_W**2).sum()))) for w in white.double()]
    assert max(map(abs, degrees)) <= 31
    assert min(degrees) < -24 < 24 < max(degrees)
    corners = rotated[np.abs(degrees) > 15][:, :, 0, 0]
    assert (corners == torch.tensor(spec.mean_color, dtype=torch.uint8)).all()


def test_geometric_trivialaugment_invents_no_color_and_keeps_grey_images_grey():
    """Nothing but moves: each color of an image of one color is that color or what stands for nothing."""
    augment = augmenter(["trivialaugment_geometric"], interpolation="nearest")
    plain = torch.tensor([200, 30, 90], dtype=torch.uint8)[:, None, None].expand(3, SIZE, SIZE)
    moved = augment.augment([plain] * 400, keys(range(400)))
    share = (moved == plain).all(1).flatten(1).all(1).float().mean().item()
    assert 1 / 6 < share < 0.4, "untouched: one in six is left alone, and a weak move is none"
    outside = torch.tensor([100, 110, 120], dtype=torch.uint8)[:, None, None]  # the mean
    sound = (moved == plain).all(1) | (moved == outside).all(1)
    assert sound.float().mean() > 0.9, "all but the pixels at an edge that is not straight"
    assert (moved == outside).all(1).any()
    grey = images(1).expand(-1, 3, -1, -1).clone()
    grey[:] = grey[:, :1]
    spec = InputSpec(SIZE, 3, (0.5,) * 3, (1.0,) * 3, "bicubic", crop_pct=1.0)
    values = augmentation_values(["trivialaugment_geometric"])
    turned = Augmenter(values, spec).augment(grey.expand(100, -1, -1, -1), keys(range(100)))
    assert torch.equal(turned[:, :1].expand_as(turned), turned)


def test_color_jitter_changes_brightness_within_its_bounds():
    grey = torch.full((1, 3, SIZE, SIZE), 100, dtype=torch.uint8).expand(500, -1, -1, -1)
    levels = augmenter([{"color_jitter": 0.2}]).augment(grey, keys(range(500)))[:, 0, 0, 0].float()
    assert 77 < levels.min() < 85
    assert 115 < levels.max() < 123


def test_a_crop_takes_originals_of_any_size_and_keeps_at_least_its_share():
    """Of an image whose red channel counts its columns and whose green one its rows, a crop's spread is its size."""
    height, width, least = 60, 90, 0.5
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    ramp = torch.stack([columns * 2, rows * 2, rows * 0]).to(torch.uint8)
    crops = augmenter([{"crop": least}], interpolation="nearest").augment([ramp] * 200, keys(range(200))).float()
    sides = (crops.amax((2, 3)) - crops.amin((2, 3)))[:, :2] / 2 + 1
    shares = sides.prod(1) / (height * width)
    assert shares.min() > least - 0.12  # nearest neighbours of 20 samples may miss up to a twentieth on each side
    assert shares.max() > 0.8
    assert shares.std() > 0.05


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos", "hamming", "box"])
def test_a_crop_works_with_every_interpolation(interpolation):
    assert augmenter(["crop"], interpolation=interpolation).augment(images(2), keys([0, 1])).shape[2:] == (SIZE, SIZE)


@pytest.mark.parametrize("chans", [1, 3])
def test_erasing_fills_a_rectangle_with_the_mean_color(chans):
    some = images(40, chans)
    erased = augmenter([{"erasing": 1.0}], chans).augment(some, keys(range(40)))
    changed = (erased != some).any(1)
    color = torch.tensor((100, 110, 120)[:chans], dtype=torch.uint8)
    num_changed = 0
    for image, mask in zip(erased, changed, strict=True):
        if not mask.any():  # torchvision gives up after ten rectangles that do not fit
            continue
        ys, xs = mask.nonzero(as_tuple=True)
        box = image[:, ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
        assert (box == color[:, None, None]).all()
        num_changed += 1
    assert num_changed >= 30


@given(rows=st.lists(st.integers(0, 10**9), min_size=1, max_size=20), num_images=st.integers(1, 10**9))
@settings(max_examples=40, deadline=None)
def test_mixes_are_in_range_and_independent_of_the_batch(rows, num_images):
    augment = augmenter([{"mixup": 0.01}, {"cutmix": 1.0}])
    mixes = augment.draw_mixes(keys(rows, stream=Stream.MIX), num_images)
    alone = [augment.draw_mixes(keys([row], stream=Stream.MIX), num_images) for row in rows]
    assert mixes.partners_B.tolist() == [one.partners_B[0] for one in alone]
    assert mixes.boxes_B4.tolist() == [one.boxes_B4[0].tolist() for one in alone]
    assert ((mixes.partners_B >= 0) & (mixes.partners_B < num_images)).all()
    assert ((mixes.lam_B >= 0) & (mixes.lam_B <= 1)).all()
    y0, y1, x0, x1 = mixes.boxes_B4.T
    assert ((y0 >= 0) & (y0 <= y1) & (y1 <= SIZE) & (x0 >= 0) & (x0 <= x1) & (x1 <= SIZE)).all()


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_mixup_shares_follow_the_beta_distribution(alpha):
    mixes = augmenter([{"mixup": alpha}]).draw_mixes(keys(range(3000), stream=Stream.MIX), 10)
    assert not mixes.boxes_B4.any()
    variance = 1 / (4 * (2 * alpha + 1))
    assert mixes.lam_B.mean() == pytest.approx(0.5, abs=4 * (variance / 3000) ** 0.5)
    assert mixes.lam_B.var() == pytest.approx(variance, rel=0.1)
    counts = np.bincount(mixes.partners_B, minlength=10)
    assert ((counts - 300) ** 2 / 300).sum() < 9 + 4 * 18**0.5


def test_cutmix_share_is_what_the_box_leaves():
    mixes = augmenter(["cutmix"]).draw_mixes(keys(range(500), stream=Stream.MIX), 10)
    y0, y1, x0, x1 = mixes.boxes_B4.T
    assert np.allclose(mixes.lam_B, 1 - (y1 - y0) * (x1 - x0) / SIZE**2, atol=1e-6)
    assert ((y1 - y0) != (x1 - x0)).any()  # cut off at an edge
    assert mixes.lam_B.std() > 0.15


def test_both_named_each_image_takes_one_or_the_other():
    mixes = augmenter(["mixup", "cutmix"]).draw_mixes(keys(range(2000), stream=Stream.MIX), 10)
    share = ((mixes.boxes_B4 != 0).any(1)).mean()
    assert 0.4 < share < 0.52  # half, less the boxes that are too small to hold a pixel


def test_the_draws_of_mixing_are_pinned():
    """A library that changes its streams changes every run; this is where it would be noticed."""
    mixes = augmenter(["mixup", "cutmix"]).draw_mixes(keys(range(4), stream=Stream.MIX), 1000)
    assert mixes.partners_B.tolist() == GOLDEN_PARTNERS
    assert mixes.lam_B.tolist() == pytest.approx(GOLDEN_LAM, abs=1e-6)
    assert mixes.boxes_B4.tolist() == GOLDEN_BOXES


def test_each_augmentation_of_recipes_is_built_in_one_table():
    assert sorted([*STEPS, *MIXES]) == sorted(AUGMENTATIONS)


def test_every_augmentation_of_the_schema_acts():
    for name in AUGMENTATIONS:
        augment, some = augmenter([name]), images(32)
        acts = augment.mixes or not torch.equal(augment.augment(some, keys(range(32))), some)
        assert acts, name
