"""Numbers of images as they are stored: more than 8 bits, more channels, arrays; scaled by a range, never by bytes."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiff_files import BLACK_IS_ZERO, SIGNED, WHITE_IS_ZERO, Tiff
from tlscale.data.channel_stats import channel_stats
from tlscale.data.decode import BadImageError, Reading, decode_image, header_hw
from tlscale.data.given import find_images
from tlscale.data.input_spec import InputSpec, resolve_input, sampled_sizes
from tlscale.data.sources.open import open_data
from tlscale.data.transforms import Augmenter, eval_transform, normalise
from tlscale.errors import DataError
from tlscale.recipe.field_types import augmentation_values
from tlscale.recipe.schema import DataSection

WIDE = Reading((100, 1100))
RANDOM = np.random.default_rng(0)


def npy(array, **keys) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asanyarray(array), **keys)
    return file.getvalue()


def encoded(picture: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


def decoded(raw, in_chans=1, reading=WIDE, max_pixels=10**6):
    return decode_image(raw, in_chans=in_chans, max_pixels=max_pixels, where="here", reading=reading)


def wrong(raw, in_chans=1, reading=WIDE, **keys) -> str:
    with pytest.raises(BadImageError) as caught:
        decoded(raw, in_chans, reading, **keys)
    return str(caught.value)


def expected(numbers, low=100, high=1100):
    return ((numbers.astype(np.float64) - low) / (high - low)).clip(0, 1).astype(np.float32)


# -- a range ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_stay_sixteen_bits(kind):
    numbers = np.arange(1300, dtype=np.uint16).reshape(26, 50)  # steps of a thousandth, of which 8 bits know a quarter
    raw = encoded(Image.fromarray(numbers), kind)
    pixels = decoded(raw)
    assert pixels.dtype == np.float32
    assert np.array_equal(pixels[:, :, 0], expected(numbers))
    assert len(np.unique(pixels)) == 1001
    assert np.array_equal(decoded(raw, 3), np.repeat(pixels, 3, axis=2))
    assert decoded(raw, reading=Reading()).dtype == np.uint8  # today's reading


def test_other_types_are_scaled_alike():
    numbers = RANDOM.integers(0, 1200, (9, 7))
    for raw in (
        encoded(Image.fromarray(numbers.astype(np.float32)), "TIFF"),
        encoded(Image.fromarray(numbers.astype(np.int32)), "TIFF"),
        *(npy(numbers.astype(dtype)) for dtype in ("<i2", ">u2", "f8", "i8")),
        npy(np.asfortranarray(numbers)),
        npy(numbers[:, :, None]),
        numbers,
    ):
        assert np.array_equal(decoded(raw)[:, :, 0], expected(numbers))
    grey = numbers.astype(np.uint8)
    assert np.array_equal(
        decoded(encoded(Image.fromarray(grey), "PNG"), reading=Reading((0, 255))), grey[..., None] / np.float32(255)
    )
    color = RANDOM.integers(0, 256, (9, 7, 3), dtype=np.uint8)
    shares = decoded(encoded(Image.fromarray(color), "PNG"), 3, Reading((0, 255)))
    assert np.allclose(shares, color / 255, atol=1e-7)
    luma = decoded(encoded(Image.fromarray(color), "PNG"), 1, Reading((0, 255)))
    assert np.allclose(luma[:, :, 0], color @ [0.299, 0.587, 0.114] / 255, atol=1e-6)


@pytest.mark.parametrize("white", [15, 100, 255, 1000, 4095, 65535])
def test_numbers_of_a_pgm_are_those_of_the_file(white):
    numbers = RANDOM.integers(0, white + 1, (20, 30))
    reading = Reading((0, 5000))
    binary = f"P5 30 20 {white}\n".encode() + numbers.astype("u1" if white < 256 else ">u2").tobytes()
    plain = f"P2 30 20 {white}\n{' '.join(map(str, numbers.ravel()))}\n".encode()
    for raw in (binary, plain):
        assert np.array_equal(decoded(raw, reading=reading)[:, :, 0], expected(numbers, 0, 5000))
        assert decoded(raw, reading=Reading()).max() > 200  # white is white
    color = np.stack([numbers, numbers[::-1], numbers[:, ::-1]], 2)
    raw = f"P6 30 20 {white}\n".encode() + color.astype("u1" if white < 256 else ">u2").tobytes()
    if white < 256:
        assert np.array_equal(decoded(raw, 3, reading), expected(color, 0, 5000))
    else:
        assert "16-bit colour in a PPM" in wrong(raw, 3, reading)


@pytest.mark.parametrize("bits", [8, 16])
def test_white_as_zero_is_turned_round_in_the_range(bits):
    numbers_HW1 = RANDOM.integers(0, 256, (6, 8, 1))
    raw = Tiff(numbers_HW1, bits, WHITE_IS_ZERO).to_bytes()
    found = decoded(raw, reading=Reading((0, 1000)))
    assert np.allclose(found, 1 - expected(numbers_HW1, 0, 1000), atol=1e-6)


def test_numbers_from_two_to_the_31_are_no_negative_ones():
    numbers_HW1 = np.array([[0, 1 << 30, 1 << 31, 3 << 30]], np.int64)[:, :, None]
    raw = Tiff(numbers_HW1, 32, BLACK_IS_ZERO).to_bytes()
    assert decoded(raw, reading=Reading((0, 1 << 32)))[0, :, 0].tolist() == [0, 0.25, 0.5, 0.75]
    raw = Tiff(numbers_HW1 - (1 << 31), 32, BLACK_IS_ZERO, form=SIGNED).to_bytes()
    assert decoded(raw, reading=Reading((-(1 << 31), 1 << 31)))[0, :, 0].tolist() == [0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize("dtype", ["f2", "f8", "u8", "i8"])
def test_types_that_pillow_does_not_read(dtype):
    tifffile = pytest.importorskip("tifffile")
    numbers = RANDOM.integers(0, 1200, (6, 9)).astype(dtype)
    file = io.BytesIO()
    tifffile.imwrite(file, numbers)
    assert np.array_equal(decoded(file.getvalue())[:, :, 0], expected(numbers))
    assert np.array_equal(decoded(file.getvalue(), 3)[:, :, 2], expected(numbers))


def test_what_a_range_cannot_mean_is_a_bad_image():
    assert "NaN or infinite" in wrong(npy(np.array([[1.0, np.nan]])))
    assert "no numbers of an image" in wrong(npy(np.array([["a", "b"]])))
    assert "Python objects" in wrong(npy(np.array([[None]]), allow_pickle=True))
    raw = npy(np.zeros((8, 8), np.uint16))
    assert "damaged or cut short: 127 bytes" in wrong(raw[:-1])
    assert "damaged or cut short: 129 bytes" in wrong(raw + b"\0")
    assert "more than the 0.0 of data.max_megapixels" in wrong(raw, max_pixels=63)
    assert "an array of 4, where H x W" in wrong(npy(np.zeros(4)))
    sixteen = bytearray(encoded(Image.fromarray(np.zeros((4, 4, 3), np.uint8)), "PNG"))
    sixteen[24] = 16
    assert "16-bit colour in a PNG" in wrong(bytes(sixteen), 3)


def test_without_a_range_numbers_are_bytes():
    grey = RANDOM.integers(0, 256, (5, 6), dtype=np.uint8)
    plain = Reading()
    assert np.array_equal(decoded(npy(grey), 1, plain), grey[:, :, None])
    assert np.array_equal(decoded(npy(grey), 3, plain), np.repeat(grey[:, :, None], 3, 2))
    bands = RANDOM.integers(0, 256, (5, 6, 4), dtype=np.uint8)
    assert np.array_equal(decoded(npy(bands), 4, plain), bands)
    assert np.array_equal(decoded(encoded(Image.fromarray(bands, "RGBA"), "PNG"), 4, plain), bands)
    assert "Set data.range: [low, high]" in wrong(npy(bands.astype(np.uint16) * 9), 4, plain)
    assert "set data.range: [low, high]" in wrong(npy(grey.astype(np.float32)), 1, plain)


# -- channels -----------------------------------------------------------------------------------------------------


def test_channels_come_last_unless_it_is_said():
    bands = RANDOM.integers(0, 1200, (6, 7, 5)).astype(np.uint16)
    first = Reading((100, 1100), channels_first=True)
    assert np.array_equal(decoded(npy(bands), 5), expected(bands))
    assert np.array_equal(decoded(npy(np.moveaxis(bands, 2, 0)), 5, first), expected(bands))
    assert "set data.channels_first: true" in wrong(npy(np.moveaxis(bands, 2, 0)), 5)
    said = wrong(npy(bands), 3)
    assert "it has 5 channels (6 x 7 x 5), and the network takes 3" in said
    assert said.endswith("Set backbone.in_chans: 5, if all images have so many")  # and no word of skipping them
    assert decoded(npy(bands), None).shape == (6, 7, 5)
    assert header_hw(io.BytesIO(npy(bands)), "here") == (6, 7)
    assert header_hw(io.BytesIO(npy(np.moveaxis(bands, 2, 0))), "here", first) == (6, 7)


LAYOUTS = {
    "bands": {"photometric": "minisblack", "planarconfig": "contig"},
    "planes": {"photometric": "minisblack", "planarconfig": "separate"},
    "deflated": {"photometric": "rgb", "planarconfig": "contig", "compression": "zlib"},
    "pages": {"imagej": True, "metadata": {"axes": "CYX"}},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_bands_of_a_tiff(layout, dtype):
    tifffile = pytest.importorskip("tifffile")
    bands = RANDOM.integers(0, 250, (6, 9, 5)).astype(dtype)
    file = io.BytesIO()
    tifffile.imwrite(file, bands if layout in ("bands", "deflated") else np.moveaxis(bands, 2, 0), **LAYOUTS[layout])
    raw = file.getvalue()
    reading = Reading((0, 500))
    assert np.array_equal(decoded(raw, 5, reading), expected(bands, 0, 500))
    assert header_hw(io.BytesIO(raw), "here") == (6, 9)
    assert "5 channels" in wrong(raw, 4, reading)
    assert "more than the" in wrong(raw, 5, max_pixels=50)
    if dtype == "uint8":
        assert np.array_equal(decoded(raw, 5, Reading()), bands)
    else:
        assert "Set data.range" in wrong(raw, 5, Reading())
    start = int(tifffile.TiffFile(io.BytesIO(raw)).pages[0].dataoffsets[0])
    said = wrong(raw[: start + 80], 5, reading)
    assert "damaged or cut short" in said or layout == "pages"  # whose other pages are found behind the data


@pytest.mark.parametrize("keys", [{}, {"metadata": None}])
def test_pages_without_a_name_are_bands(keys):
    tifffile = pytest.importorskip("tifffile")
    bands = RANDOM.integers(0, 250, (5, 6, 9)).astype(np.uint16)
    file = io.BytesIO()
    tifffile.imwrite(file, bands, **keys)
    assert np.array_equal(decoded(file.getvalue(), 5), expected(np.moveaxis(bands, 0, 2)))
    assert "it has 5 channels" in wrong(file.getvalue(), 4)
    slices = io.BytesIO()
    tifffile.imwrite(slices, bands, metadata={"axes": "ZYX"})
    assert "a TIFF with the axes ZYX" in wrong(slices.getvalue(), 5)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_bands_are_turned_as_pillow_turns_grey(orientation):
    tifffile = pytest.importorskip("tifffile")
    numbers = RANDOM.integers(0, 1200, (6, 9)).astype(np.uint16)
    turned = []
    for array, in_chans in ((numbers, 1), (np.stack([numbers, 1200 - numbers], 2), 2)):
        file = io.BytesIO()
        keys = {"photometric": "minisblack", "planarconfig": "contig", "extratags": [(274, 3, 1, orientation, True)]}
        tifffile.imwrite(file, array, **keys)
        turned.append(decoded(file.getvalue(), in_chans))
        assert header_hw(io.BytesIO(file.getvalue()), "here") == turned[-1].shape[:2]
    assert np.array_equal(turned[0][:, :, 0], turned[1][:, :, 0])


def test_a_packed_tiff_says_what_unpacks_it(monkeypatch):
    pytest.importorskip("tifffile")
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    file = io.BytesIO()
    Image.fromarray(RANDOM.integers(0, 255, (6, 9, 4), dtype=np.uint8), "RGBA").save(
        file, "TIFF", compression="tiff_lzw"
    )
    said = wrong(file.getvalue(), 4)
    assert "packed (LZW)" in said
    assert "pip install imagecodecs" in said
    assert "damaged" not in said


def test_sixteen_bit_colour_of_a_tiff():
    tifffile = pytest.importorskip("tifffile")
    color = RANDOM.integers(0, 1200, (6, 9, 3)).astype(np.uint16)
    file = io.BytesIO()
    tifffile.imwrite(file, color, photometric="rgb")
    assert np.array_equal(decoded(file.getvalue(), 3), expected(color))


def test_what_reads_bands_is_named_where_it_is_missing(monkeypatch):
    raw = encoded(Image.fromarray(np.zeros((4, 4), np.uint8)), "TIFF")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'tlscale[bands]'" in wrong(raw, 5)
    assert decoded(raw, 1).shape == (4, 4, 1)


# -- on the way to the network ------------------------------------------------------------------------------------


def spec_of(in_chans=5, image_size=16, value_range=(0.0, 1.0), **keys) -> InputSpec:
    values = {"mean": (0.25,) * in_chans, "std": (0.5,) * in_chans, "interpolation": "bicubic", "crop_pct": 1.0}
    return InputSpec(**values | keys, image_size=image_size, in_chans=in_chans, range=value_range)


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("value_range", [None, (0.0, 1.0)])
def test_each_channel_is_resized_as_a_grey_image(crop_mode, value_range):
    numbers = RANDOM.integers(0, 256, (23, 40, 5), dtype=np.uint8)
    image = numbers if value_range is None else numbers / np.float32(255)
    keys = {"crop_mode": crop_mode, "interpolation": "bilinear"}  # without overshoot, which 8 bits clip at each side
    spec = spec_of(value_range=value_range, image_size=(16, 20), **keys)
    seen = eval_transform(image, spec)
    assert seen.shape == (16, 20, 5)
    assert seen.dtype == image.dtype
    for channel in range(5):
        one = spec_of(1, (16, 20), None, **keys)
        grey = eval_transform(np.ascontiguousarray(numbers[:, :, channel : channel + 1]), one)[:, :, 0]
        found = seen[:, :, channel] if value_range is None else seen[:, :, channel] * 255
        assert np.abs(found - grey.astype(np.float64)).max() <= (0 if value_range is None else 1)
    assert value_range is None or (seen.min() >= 0 and seen.max() <= 1)


def test_normalisation_leaves_the_images_as_they_are():
    images = torch.rand(2, 5, 4, 4)
    before = images.clone()
    assert torch.equal(normalise(images, spec_of(), torch.float32), (images - 0.25) / 0.5)
    assert torch.equal(images, before)


def test_augmentation_of_many_channels_and_bits():
    names = [*("flip", "vertical_flip", "crop", "rotation", "trivialaugment_geometric", "blur", "erasing")]
    values = augmentation_values(DataSection(source="fashion_mnist", augment=names).augment)
    for interpolation in ("bicubic", "lanczos"):
        augment = Augmenter(values, spec_of(image_size=(12, 20), interpolation=interpolation))
        out = augment.augment([torch.rand(5, 30, 40)] * 6, np.arange(6, dtype=np.uint64))
        assert out.shape == (6, 5, 12, 20)
        assert out.dtype == torch.float32
        assert 0 <= out.min() < out.max() <= 1
    color = augmentation_values(DataSection(source="fashion_mnist", augment=["color_jitter"]).augment)
    out = Augmenter(color, spec_of(3)).augment(torch.rand(4, 3, 16, 16), np.arange(4, dtype=np.uint64))
    assert 0 <= out.min() < out.max() <= 1


class Arrays:
    """A table of images in memory, one of which cannot be read."""

    def __init__(self, images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def where(self, row):
        return str(row)

    def read(self, row):
        return self.images[row]


def test_mean_and_deviation_of_other_channels_are_measured():
    images = RANDOM.normal(1000, 200, (20, 8, 8, 4)) * [1, 0.5, 1, 2]
    section = DataSection(source="fashion_mnist", range=[0, 4000])
    mean, std = channel_stats(Arrays([*images, b"no image"]), section, 4)
    assert mean == pytest.approx((images / 4000).mean((0, 1, 2)), abs=1e-4)
    assert std == pytest.approx((images / 4000).std((0, 1, 2)), abs=1e-4)
    spec = resolve_input(section, in_chans=4, pretrained_cfg={}, sizes=[(8, 8)], measure=lambda: (mean, std))
    assert (spec.mean, spec.std, spec.range) == (mean, std, (0, 4000))
    assert InputSpec.from_plain(spec.to_plain()) == spec
    three = resolve_input(section, in_chans=3, pretrained_cfg={}, sizes=[(8, 8)], measure=lambda: (mean, std))
    assert three.mean == (0.485, 0.456, 0.406)
    given = DataSection(source="fashion_mnist", mean=[0.1] * 4, std=[0.2] * 4)
    given = resolve_input(given, in_chans=4, pretrained_cfg={}, sizes=[(8, 8)], measure=lambda: (mean, std))
    assert (given.mean, given.std) == ((0.1,) * 4, (0.2,) * 4)


def test_what_nobody_asked_for_is_in_no_address():
    plain = spec_of(3, value_range=None).to_plain()
    assert set(plain) == {"image_size", "in_chans", "mean", "std", "interpolation", "crop_pct", "crop_mode"}


def test_a_folder_is_searched_for_arrays_where_it_has_no_pictures(tmp_path):
    notes: list[str] = []
    np.save(tmp_path / "a.npy", np.zeros((4, 4)))
    assert list(find_images([tmp_path], notes.append)) == [str(tmp_path / "a.npy")]
    assert notes == []
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "b.png")
    assert list(find_images([tmp_path], notes.append)) == [str(tmp_path / "b.png")]
    assert "passed over a file" in notes[0]


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0, 3)])
@pytest.mark.parametrize("keys", [{}, {"range": [0, 255]}])
def test_an_image_without_pixels_is_a_bad_one(shape, keys, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.npy").write_bytes(npy(np.zeros(shape, np.uint8)))
    data = open_data(DataSection(source="folder", path=str(tmp_path), validation_fraction=0.0, **keys), 0)
    with pytest.raises(DataError, match=rf"none of 2 .* {shape[1]} x {shape[0]} pixels: nothing to see"):
        sampled_sizes(data.train.table)
    (tmp_path / "a" / "0.npy").write_bytes(npy(np.zeros((4, 6), np.uint8)))
    assert sampled_sizes(data.train.table) == [(4, 6)]


def test_complex_numbers_are_none_of_an_image():
    tifffile = pytest.importorskip("tifffile")
    file = io.BytesIO()
    tifffile.imwrite(file, np.full((8, 8), 100 + 3j, np.complex64))
    assert "numbers of an image" in wrong(file.getvalue())
    assert "numbers of an image" in wrong(npy(np.full((8, 8), 100 + 3j, np.complex64)))
