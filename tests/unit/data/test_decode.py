"""Images of every kind become the right uint8 pixels, or a BadImageError with their place."""

from __future__ import annotations

import io
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from tests.recipes.wrong_data import bomb_png
from tlscale.data.decode import DICOMS, EXTENSIONS, FORMATS, BadImageError, decode_image

# Pillow warns about damaged TIFF tags on the way to its error.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

RGB = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
LOSSLESS = [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("PPM", {}), ("WEBP", {"lossless": True})]


def decode(raw: bytes | np.ndarray, in_chans: int = 3, max_pixels: int = 10_000) -> np.ndarray:
    return decode_image(raw, in_chans=in_chans, max_pixels=max_pixels, where="here/x.png")


def encode(image: Image.Image, fmt: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, fmt, **options)
    return file.getvalue()


@pytest.mark.parametrize(("fmt", "options"), LOSSLESS)
def test_lossless_formats_give_the_pixels(fmt, options):
    pixels = decode(encode(Image.fromarray(RGB), fmt, **options))
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, RGB)


def test_formats_and_endings_agree_with_pillow():
    Image.init()
    assert {Image.EXTENSION[end] for end in EXTENSIONS - DICOMS} == {*FORMATS, "MPO"}


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_grey_is_kept_and_repeated(grey_HW):
    for raw in (encode(Image.fromarray(grey_HW)), grey_HW, grey_HW[:, :, None]):
        assert np.array_equal(decode(raw, 1), grey_HW[:, :, None])
        assert np.array_equal(decode(raw, 3), np.repeat(grey_HW[:, :, None], 3, axis=2))


def test_an_array_gives_the_same_as_its_file():
    for in_chans in (1, 3):
        assert np.array_equal(decode(RGB, in_chans), decode(encode(Image.fromarray(RGB)), in_chans))


def test_an_array_is_copied():
    pixels = decode(RGB)
    pixels[:] = 0
    assert RGB.any()


def test_luma_is_itu_601():
    colours = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]], dtype=np.uint8)
    assert decode(colours, 1).ravel().tolist() == [76, 150, 29]


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_orientation_is_applied(turn):
    # How the EXIF standard defines the tag: where the 0th row and the 0th column of the stored image are shown.
    stored_of = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a.transpose(1, 0, 2), 2),
        8: lambda a: np.rot90(a, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = turn
    stored = Image.fromarray(np.ascontiguousarray(stored_of[turn](RGB)))
    for fmt in ("PNG", "TIFF"):
        assert np.array_equal(decode(encode(stored, fmt, exif=exif)), RGB), fmt


@pytest.mark.parametrize(("fmt", "is_turned"), [("AVIF", True), ("HEIF", False)])
def test_photos_of_telephones(fmt, is_turned):
    smooth = np.linspace(0, 255, 24 * 16).reshape(24, 16, 1).repeat(3, axis=2).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(smooth)
    assert np.abs(decode(encode(image, fmt, quality=95)).astype(int) - smooth).mean() < 4
    turned = np.rot90(smooth, -1) if is_turned else smooth  # HEIF has a turn of its own, and EXIF's does not count
    assert np.abs(decode(encode(image, fmt, quality=95, exif=exif)).astype(int) - turned).mean() < 4


def test_damaged_exif_does_not_make_an_image_bad():
    assert decode(encode(Image.fromarray(RGB), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")).shape == RGB.shape


def test_alpha_lies_over_white():
    rgba = np.zeros((1, 3, 4), dtype=np.uint8)
    rgba[0, :, 3] = 0, 128, 255
    assert decode(encode(Image.fromarray(rgba)), 1).ravel().tolist() == [255, 127, 0]
    assert decode(encode(Image.fromarray(rgba[:, :, [0, 3]], "LA")), 1).ravel().tolist() == [255, 127, 0]


def test_colour_keys_and_palettes():
    palette = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    assert decode(encode(palette)).reshape(3, 3).tolist() == [[10, 20, 30], [40, 50, 60], [70, 80, 90]]
    keyed = decode(encode(palette, transparency=1)).reshape(3, 3)
    assert keyed.tolist() == [[10, 20, 30], [255, 255, 255], [70, 80, 90]]
    grey = Image.fromarray(np.array([[0, 7, 9]], dtype=np.uint8))
    assert decode(encode(grey, transparency=7), 1).ravel().tolist() == [0, 255, 9]


def test_one_bit():
    bits = np.array([[True, False, True]])
    assert decode(encode(Image.fromarray(bits)), 1).ravel().tolist() == [255, 0, 255]


@pytest.mark.parametrize("fmt", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_not_clipped(fmt):
    wide = np.array([[0, 257, 300, 32768, 65535]], dtype=np.uint16)
    assert decode(encode(Image.fromarray(wide), fmt), 1).ravel().tolist() == [0, 1, 1, 128, 255]


def test_sixteen_bit_colour_key():
    wide = Image.fromarray(np.array([[0, 1000, 65535]], dtype=np.uint16))
    raw = encode(wide)
    end = raw.index(b"IDAT") - 4
    key = b"tRNS" + (1000).to_bytes(2, "big")
    keyed = raw[:end] + (2).to_bytes(4, "big") + key + zlib.crc32(key).to_bytes(4, "big") + raw[end:]
    assert decode(keyed, 1).ravel().tolist() == [0, 255, 255]


def test_float_and_32_bit_in_a_known_range():
    floats = Image.fromarray(np.array([[0, 0.5, 1]], dtype=np.float32))
    assert decode(encode(floats, "TIFF"), 1).ravel().tolist() == [0, 128, 255]
    ints = Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.int32))
    assert decode(encode(ints, "TIFF"), 1).ravel().tolist() == [0, 128, 255]


@pytest.mark.parametrize("values", [[0, 70000], [-1, 5], [0.0, 2.0], [float("nan"), 0.5], [-0.1, 0.5]])
def test_unknown_ranges_are_bad(values):
    kind = np.float32 if isinstance(values[0], float) else np.int32
    with pytest.raises(BadImageError, match=r"no telling which is white"):
        decode(encode(Image.fromarray(np.array([values], dtype=kind)), "TIFF"))


def test_cmyk_jpeg():
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert np.abs(decode(encode(red, "JPEG"))[0, 0].astype(int) - [255, 0, 0]).max() <= 2


def test_first_frame_of_an_animation():
    frames = [Image.new("L", (4, 4), grey) for grey in (10, 200)]
    for fmt in ("GIF", "PNG", "TIFF"):
        raw = encode(frames[0], fmt, save_all=True, append_images=frames[1:])
        assert set(decode(raw, 1).ravel().tolist()) == {10}, fmt


def test_pixel_cap_is_checked_from_the_header():
    with pytest.raises(BadImageError, match=r"here/x.png: 9000 x 9000 pixels, 81.0 megapixels"):
        decode(bomb_png(9000, 9000), max_pixels=64_000_000)
    with pytest.raises(BadImageError, match=r"more than"):
        decode(RGB, max_pixels=53)
    assert decode(RGB, max_pixels=54).shape == RGB.shape


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("edge", [10_000, 14_000])
def test_what_pillow_calls_a_bomb_is_bad(edge):
    with pytest.raises(BadImageError, match=r"pixels"):
        decode(bomb_png(edge, edge), max_pixels=89_000_000)


@pytest.mark.parametrize("fmt", FORMATS)
@settings(deadline=None)  # to encode HEIF and AVIF takes long
@given(share=st.floats(0, 0.9))
def test_cut_short_is_bad(fmt, share):
    raw = encode(Image.fromarray(RGB), fmt)
    with pytest.raises(BadImageError, match=r"^here/x.png: "):
        decode(raw[: int(len(raw) * share)])


@given(st.binary(max_size=200), st.sampled_from(["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM"]))
def test_any_bytes_give_pixels_or_a_bad_image(noise, fmt):
    start = encode(Image.fromarray(RGB), fmt)[:40]
    try:
        pixels = decode(start + noise)
    except BadImageError:
        return
    assert pixels.shape[2] == 3


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "it is empty"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
        (b"<html>not found</html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (b"hello", "not an image of the formats JPEG, PNG"),
    ],
)
def test_what_is_no_image_is_named(raw, says):
    with pytest.raises(BadImageError, match=says):
        decode(raw)


@pytest.mark.parametrize(
    "array", [np.zeros((4, 4)), np.zeros((4, 4, 4), np.uint8), np.zeros((4,), np.uint8), np.zeros((0, 4), np.uint8)]
)
def test_arrays_that_are_no_image(array):
    with pytest.raises(BadImageError, match=r"^here/x.png: "):
        decode(array)
