"""An image with a hole is a bad image, and a sound one never is, however it was encoded."""

from __future__ import annotations

import functools
import io
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_images

from tlscale.data.decode import BadImageError, decode_image

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

VARIANTS = {
    "baseline": {},
    "optimised": {"optimize": True},
    "progressive": {"progressive": True},
    "full colour": {"subsampling": 0},
    "restart each row": {"restart_marker_rows": 1},
    "restart often": {"restart_marker_blocks": 5},
    "progressive, restart": {"progressive": True, "restart_marker_rows": 2},
}


def decode(raw: bytes) -> np.ndarray:
    return decode_image(raw, in_chans=3, max_pixels=10**7, where="x")


def encode(image: Image.Image, fmt: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, fmt, **options)
    return file.getvalue()


def by_pillow(raw: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(raw)) as image:
        return np.asarray(image.convert("RGB"))


@functools.cache
def photo(number: int = 0) -> Image.Image:
    return Image.fromarray(load_sample_images().images[number]).resize((400, 300))


def picture(kind: str, width: int, height: int, mode: str) -> Image.Image:
    if kind == "photo":
        return photo().resize((width, height)).convert(mode)
    if kind == "noise":
        noise_HWC = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        return Image.fromarray(noise_HWC).convert(mode)
    return Image.new("L", (width, height), {"white": 255, "grey": 128, "black": 0}[kind]).convert(mode)


@settings(max_examples=300)
@given(
    kind=st.sampled_from(["photo", "noise", "white", "grey", "black"]),
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    mode=st.sampled_from(["L", "RGB", "CMYK"]),
    quality=st.sampled_from([1, 30, 75, 95, 100]),
    restart=st.sampled_from(
        [{}, {"restart_marker_blocks": 1}, {"restart_marker_blocks": 7}, {"restart_marker_rows": 1}]
    ),
    options=st.fixed_dictionaries(
        {"progressive": st.booleans(), "optimize": st.booleans(), "subsampling": st.sampled_from([0, 1, 2])}
    ),
    tail=st.sampled_from([b"", b"\0" * 300, b"more \xff\xd8\xff\xd9"]),
)
def test_a_sound_jpeg_is_read_as_pillow_reads_it(kind, size, mode, quality, restart, options, tail):
    raw = encode(picture(kind, *size, mode), quality=quality, **restart, **options) + tail
    assert np.array_equal(decode(raw), by_pillow(raw))


def segment(marker: int, data: bytes) -> bytes:
    return bytes((0xFF, marker)) + (len(data) + 2).to_bytes(2) + data


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_what_else_may_be_in_a_sound_jpeg(options):
    raw = encode(photo(), **options)
    pixels = decode(raw)
    end = raw.rindex(b"\xff\xd9")
    thumbnail = segment(0xE1, b"Exif\0\0" + encode(photo().resize((60, 45)), restart_marker_rows=1))
    comment = segment(0xFE, b"\xff\xda\0\x0c\xff\xd9" * 20)
    for other in (
        raw[:2] + thumbnail + comment + raw[2:],
        raw[:end] + b"\xff\xff\xff" + raw[end:],  # padding of a marker
        raw[:end] + bytes(9) + raw[end:],  # some cameras leave a few bytes over
        raw[:end] + b"\x12\x34\xff\0" * 9 + raw[end:],
    ):
        assert np.array_equal(decode(other), pixels)


def test_the_first_of_several_pictures():
    raw = encode(photo(), "MPO", save_all=True, append_images=[photo(1)])
    with Image.open(io.BytesIO(raw)) as image:
        assert image.format == "MPO"
        assert np.array_equal(decode(raw), np.asarray(image))


def put(raw: bytes, at: int, data: bytes) -> bytes:
    return raw[:at] + data + raw[at + len(data) :]


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("share", [0.1, 0.35, 0.5, 0.8, 0.97])
def test_a_jpeg_with_a_hole_is_bad(options, share):
    raw = encode(photo(), quality=90, **options)
    start = raw.index(b"\xff\xda") + 20
    at = start + int(share * (len(raw) - start))
    length = min(4096, len(raw) - at - 2)
    for name, damaged in {
        "cut short, and an end marker": raw[:at] + b"\xff\xd9",
        "zeros": put(raw, at, bytes(length)),
        "zeros up to the end marker": put(raw, at, bytes(len(raw) - at - 2)),
        "a piece lost": raw[:at] + raw[at + length :],
        "another picture's data": put(raw, at, encode(photo(1), quality=90)[-length - 2 : -2]),
    }.items():
        with pytest.raises(BadImageError, match=r"^x: the image is damaged"):
            print(name, decode(damaged).shape)


def test_scans_and_restart_markers_that_are_missing():
    raw = encode(photo(), progressive=True)
    scans = [at for at in range(len(raw)) if raw[at : at + 2] == b"\xff\xda"]
    assert len(scans) > 5
    tables = raw.rindex(b"\xff\xc4", 0, scans[-1])  # of the last scan
    with pytest.raises(BadImageError, match=r"scans of 1 of 3 components are missing"):
        decode(raw[:tables] + b"\xff\xd9")
    raw = encode(photo(), restart_marker_rows=1)
    second, third = raw.index(b"\xff\xd1"), raw.index(b"\xff\xd2")
    for damaged in (raw[:second] + raw[third:], raw[:second] + b"\xff\xd9"):
        with pytest.raises(BadImageError, match=r"restart markers are missing"):
            decode(damaged)


@pytest.mark.parametrize("options", [{"quality": 60}, {"quality": 90}, {"lossless": True}], ids=str)
def test_a_webp_with_a_hole_is_bad(options):
    raw = encode(photo(), "WEBP", **options)
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        at = 64 + int(share * (len(raw) - 64))
        for length in (min(1500, len(raw) - at - 2), len(raw) - at - 2):
            with pytest.raises(BadImageError, match=r"^x: the image is damaged"):
                decode(put(raw, at, bytes(length)))
    with pytest.raises(BadImageError, match=r"^x: the image is damaged"):
        decode(raw[: len(raw) // 2] + b"\xff\xd9")


@pytest.mark.parametrize("kind", ["photo", "noise", "white", "grey", "black", "mixed"])
def test_a_sound_webp_is_read_as_pillow_reads_it(kind):
    sizes = [(16, 16), (200, 150), (700, 500)]
    for size in sizes:
        image = picture("white" if kind == "mixed" else kind, *size, "RGB")
        if kind == "mixed":
            image.paste(photo().resize((size[0] // 3, size[1] // 3)), (3, 3))
        for options in ({"quality": 5}, {"quality": 80, "method": 0}, {"quality": 100}, {"lossless": True}):
            raw = encode(image, "WEBP", **options)
            assert np.array_equal(decode(raw), by_pillow(raw)), (size, options)
    frames = encode(image, "WEBP", save_all=True, append_images=[image.rotate(180)], lossless=True)
    assert np.array_equal(decode(frames), by_pillow(frames))


def test_a_sound_webp_with_zeros_in_it_is_decoded_again_and_read():
    raw = encode(picture("white", 1500, 1500, "RGB"), "WEBP", quality=100)
    assert bytes(32) in raw or b"\xff" * 32 in raw, "choose another picture: this one is not suspicious"
    assert decode(raw).min() >= 254


def test_checksums_of_png():
    raw = encode(photo().resize((60, 45)), "PNG", compress_level=0)
    at = len(raw) // 2
    for damaged in (put(raw, at, bytes((raw[at] ^ 1,))), put(raw, len(raw) - 16, b"\0")):
        with pytest.raises(BadImageError, match=r"checksum of a chunk IDAT"):
            decode(damaged)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_transparent_grey_of_a_png_of_few_bits(bits):
    most = 2**bits - 1
    row = int("".join(format(value, f"0{bits}b") for value in (0, most, 1, most)).ljust(32, "0"), 2).to_bytes(4)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    header = (4).to_bytes(4) + (1).to_bytes(4) + bytes((bits, 0, 0, 0, 0))
    data = zlib.compress(b"\0" + row[: (4 * bits + 7) // 8])
    for key, expected in ((1, {0: 0, most: 255, 1: 255}), (0, {0: 255, most: 255, 1: 255 // most})):
        raw = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"tRNS", key.to_bytes(2))
        raw += chunk(b"IDAT", data) + chunk(b"IEND", b"")
        assert decode(raw)[0, :, 0].tolist() == [expected[value] for value in (0, most, 1, most)]


ROWS = np.random.default_rng(0).integers(1, 256, (13, 11, 3), dtype=np.uint8)


def png_of(rows_HWC: np.ndarray, height: int, colour_type: int, *, interlaced: bool) -> bytes:
    """Checksums and packing sound; as many rows as are given, whatever the header says."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    data = b""
    for row, column, down, across in passes if interlaced else ((0, 0, 1, 1),):
        some_HWC = rows_HWC[row::down, column::across]
        data += b"".join(b"\0" + pixels_WC.tobytes() for pixels_WC in some_HWC) if some_HWC.size else b""
    header = rows_HWC.shape[1].to_bytes(4) + height.to_bytes(4) + bytes((8, colour_type, 0, 0, int(interlaced)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("colour_type", [0, 2])
def test_a_png_with_fewer_rows_than_its_header_says_is_bad(colour_type, interlaced):
    """Its writer was cut off, and packed what there was: Pillow leaves the rest black."""
    rows_HWC = ROWS if colour_type == 2 else ROWS[:, :, :1]
    for height in range(2, 14):
        for num_rows in range(1, height):
            raw = png_of(rows_HWC[:num_rows], height, colour_type, interlaced=interlaced)
            with pytest.raises(BadImageError, match=r"^x: the image is damaged"):
                decode(raw)
    for height in range(1, 14):
        for rows in (rows_HWC[:height], rows_HWC[:height] * 0, rows_HWC[:height, :1], rows_HWC[:height, :1] * 0):
            raw = png_of(rows, height, colour_type, interlaced=interlaced)
            assert np.array_equal(decode(raw), np.broadcast_to(rows, (*rows.shape[:2], 3)))
