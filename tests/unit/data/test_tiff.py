"""Every TIFF comes out right, or is refused with what it is."""

from __future__ import annotations

import io
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.tiff_files import BLACK_IS_ZERO, CMYK, FLOAT, LAB, PALETTE, RGB, SIGNED, UNSIGNED, WHITE_IS_ZERO, YCBCR, Tiff
from tlscale.data.decode import BadImageError, decode_image

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

SHARES = np.random.default_rng(0).random((19, 37, 6))  # of white; neither side a multiple of a tile, nor of a byte
SHARES[0, 0], SHARES[0, 1] = 0, 1
LAYOUTS = [{}, {"rows_per_strip": 5}, {"tile_px": 16}, {"is_deflated": True, "rows_per_strip": 5}]


def decode(raw: bytes) -> np.ndarray:
    return decode_image(raw, in_chans=3, max_pixels=10**6, where="x.tif")


def numbers(samples: int, bits: int) -> np.ndarray:
    return np.rint(SHARES[:, :, :samples] * (2**bits - 1)).astype(np.int64)


def is_right(tiff: Tiff) -> bool:
    """Whether it is read; fails where it is read wrongly, or refused without its name."""
    try:
        pixels_HWC = decode(tiff.to_bytes())
    except BadImageError as error:
        refused = str(error)
    else:
        refused = ""
    if refused:
        assert "a TIFF that is not read (" in refused or "no telling which is white" in refused
        return False
    expected = tiff.shows()
    assert expected is not None, "it was read, and nobody can say how"
    assert np.abs(pixels_HWC - expected).max() <= 1 + 1e-6
    return True


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("order", ["<", ">"])
def test_what_is_read(layout, order):
    kinds = [(numbers(1, bits), bits, grey) for bits, grey in product((1, 2, 4, 8), (WHITE_IS_ZERO, BLACK_IS_ZERO))]
    kinds += [(numbers(1, 16), 16, BLACK_IS_ZERO), (numbers(3, 8), 8, RGB), (numbers(3, 16), 16, RGB)]
    kinds += [(numbers(4, 8), 8, CMYK)]
    kinds += [(numbers(1, 16), 16, WHITE_IS_ZERO), (numbers(1, 12), 12, BLACK_IS_ZERO)] if order == "<" else []
    for samples_HWS, bits, photometric in kinds:
        assert is_right(Tiff(samples_HWS, bits, photometric, order, **layout)), (bits, photometric)
    for extra in ((0,), (2,), (2, 0), (0, 0)):
        assert is_right(Tiff(numbers(3 + len(extra), 8), 8, RGB, order, extra=extra, **layout)), extra
    for extra in ((0,), (1,), (2,)):
        assert is_right(Tiff(np.sort(numbers(2, 8)), 8, BLACK_IS_ZERO, order, extra=extra, **layout)), extra
    assert is_right(Tiff(numbers(3, 8), 8, RGB, order, planes_apart=True, **layout))
    for bits in (1, 2, 4, 8):
        palette = np.random.default_rng(bits).integers(0, 256, (3, 2**bits)) * 257
        assert is_right(Tiff(numbers(1, bits), bits, PALETTE, order, palette=palette, **layout)), bits
    for photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO):
        is_read = is_right(Tiff(SHARES[:, :, :1], 32, photometric, order, form=FLOAT, **layout))
        assert is_read == (order == "<" or "is_deflated" not in layout)


@st.composite
def tiffs(draw) -> Tiff:
    photometric = draw(st.sampled_from([None, WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, CMYK, YCBCR, LAB, 4, 9, 32803]))
    form = draw(st.sampled_from([UNSIGNED, UNSIGNED, SIGNED, FLOAT]))
    bits = draw(st.sampled_from([16, 32, 64] if form == FLOAT else [8, 16, 32] if form == SIGNED else range(1, 33)))
    extra = tuple(draw(st.lists(st.sampled_from([0, 1, 2]), max_size=2)))
    samples = draw(st.sampled_from([{RGB: 3, CMYK: 4}.get(photometric, 1) + len(extra), 1, 3, 4]))
    samples_HWS = SHARES[:, :, :samples] if form == FLOAT else numbers(samples, bits)
    samples_HWS = samples_HWS - (1 << (bits - 1)) if form == SIGNED else samples_HWS
    return Tiff(
        np.sort(samples_HWS) if 1 in extra else samples_HWS,
        bits,
        photometric,
        draw(st.sampled_from("<>")),
        planes_apart=draw(st.booleans()),
        form=form,
        extra=extra,
        fill_order=draw(st.sampled_from([1, 1, 2])),
        **draw(st.sampled_from(LAYOUTS)),
    )


@settings(max_examples=150)
@given(tiffs())
def test_any_tiff_is_right_or_refused_by_name(tiff):
    is_right(tiff)


@pytest.mark.parametrize(
    ("tiff", "says"),
    [
        (Tiff(numbers(3, 16), 16, RGB, planes_apart=True), "16-bit RGB, 3 samples a pixel, planes apart"),
        (Tiff(numbers(1, 8) - 128, 8, BLACK_IS_ZERO, form=SIGNED), "8-bit signed grey"),
        (Tiff(numbers(1, 14), 14, BLACK_IS_ZERO), "14-bit grey"),
        (Tiff(numbers(1, 16), 16, WHITE_IS_ZERO, ">"), "16-bit grey with white as 0, 1 sample a pixel, big-endian"),
        (Tiff(numbers(3, 8), 8, BLACK_IS_ZERO), "8-bit grey, 3 samples a pixel"),
        (Tiff(numbers(3, 8), 8, LAB), "CIE Lab"),
        (Tiff(numbers(1, 8), 8, None), "no word on what 0 is"),
        (Tiff(numbers(1, 8), 8, BLACK_IS_ZERO, tags=[(254, 4, [1])]), "its first page is a reduced copy"),
        (Tiff(numbers(1, 4), 4, PALETTE, palette=np.arange(48)), "its palette is black"),
        (Tiff(numbers(4, 8), 8, CMYK, tags=[(332, 3, [2])]), "its inks are others"),
        (Tiff(SHARES[:, :, :1], 64, BLACK_IS_ZERO, form=FLOAT), "64-bit floating point grey"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_refused_is_named(tiff, says):
    with pytest.raises(BadImageError) as caught:
        decode(tiff.to_bytes())
    assert says in str(caught.value)
    assert "not an image of the formats" not in str(caught.value)


@pytest.mark.parametrize(
    "compression", ["raw", "tiff_lzw", "packbits", "tiff_adobe_deflate", "group3", "group4", "zstd", "lzma", "jpeg"]
)
def test_what_pillow_writes_is_read(compression):
    pixels = np.rint(SHARES[:, :, :3] * 255).astype(np.uint8)
    pixels = np.kron(pixels, np.ones((8, 8, 1), np.uint8))  # flat blocks, which JPEG leaves as they are
    for mode in ("1",) if compression.startswith("group") else ("RGB", "L"):
        image = Image.fromarray(pixels).convert(mode)
        file = io.BytesIO()
        image.save(file, "TIFF", compression=compression, **({"quality": 100} if compression == "jpeg" else {}))
        error = np.abs(decode(file.getvalue()).astype(int) - np.asarray(image.convert("RGB")))
        assert np.median(error) <= (1 if compression == "jpeg" else 0)
        assert error.max() <= (40 if compression == "jpeg" else 0)


def test_of_several_pages_the_first_is_read():
    file = io.BytesIO()
    pages = [Image.new("L", (9, 5), grey) for grey in (10, 200)]
    pages[0].save(file, "TIFF", save_all=True, append_images=pages[1:])
    assert set(decode(file.getvalue()).ravel().tolist()) == {10}
