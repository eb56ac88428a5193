"""Grey of 1, 2 and 4 bits with a range: the numbers of the file, which Pillow scales to 0..255, or an error."""

from __future__ import annotations

import json
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

import tlscale
from tests.small_runs import as_after, small_recipe
from tests.tiff_files import BLACK_IS_ZERO, WHITE_IS_ZERO, Tiff
from tests.unit.data.test_numbers import decoded, encoded, expected, wrong
from tlscale.data.decode import Reading
from tlscale.data.formats.few_bits import was_scaled
from tlscale.data.stored_numbers import bits_of
from tlscale.errors import ResumeError


def png_of(bits, numbers_HW, colour=0, more=b"") -> bytes:
    """A PNG, chunk by chunk: Pillow writes no grey of 2 and 4 bits."""
    rows = ("".join(format(value, f"0{bits}b") for value in row) for row in numbers_HW.tolist())
    rows = (row + "0" * (-len(row) % 8) for row in rows)
    data = b"".join(b"\0" + int(row, 2).to_bytes(len(row) // 8, "big") for row in rows)
    height, width = numbers_HW.shape
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = [(b"IHDR", head), *([(b"tRNS", more)] if more else []), (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    parts = (struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(d, zlib.crc32(k))) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def few_bits(bits):
    """All numbers of so few bits, in rows that end in the middle of a byte; and files that hold them, by kind."""
    numbers_HW = np.random.default_rng(bits).integers(2**bits, size=(6, 11))
    numbers_HW[0, :2] = 0, 2**bits - 1
    by_kind = {
        "PNG": png_of(bits, numbers_HW),
        "TIFF": Tiff(numbers_HW[:, :, None], bits, BLACK_IS_ZERO).to_bytes(),
        "TIFF, big-endian": Tiff(numbers_HW[:, :, None], bits, BLACK_IS_ZERO, order=">", is_deflated=True).to_bytes(),
        "white is 0": Tiff(2**bits - 1 - numbers_HW[:, :, None], bits, WHITE_IS_ZERO).to_bytes(),
    }
    if bits == 1:
        rows = "\n".join(" ".join(map(str, row)) for row in (1 - numbers_HW).tolist())
        by_kind |= {"PBM": f"P1 11 6\n{rows}\n".encode()}  # of which 1 is black
        by_kind |= {"packed PBM": encoded(Image.fromarray(numbers_HW.astype(bool)), "PPM")}
        by_kind |= {"an image in memory": Image.fromarray(numbers_HW.astype(bool))}
        by_kind |= {"fax": encoded(Image.fromarray(numbers_HW.astype(bool)), "TIFF")}
    return numbers_HW, by_kind


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_few_bits_are_the_numbers_of_the_file(bits):
    """And as ever where there is no range: shares of white."""
    numbers_HW, by_kind = few_bits(bits)
    most = 2**bits - 1
    for kind, raw in by_kind.items():
        for high in (most, *(() if kind == "white is 0" else ((most + 1) / 2,))):
            pixels = decoded(raw, reading=Reading((0, high)))
            assert np.array_equal(pixels[:, :, 0], expected(numbers_HW, 0, high)), kind
            assert np.array_equal(decoded(raw, 3, Reading((0, high))), np.repeat(pixels, 3, axis=2)), kind
        assert np.array_equal(decoded(raw, reading=Reading())[:, :, 0], numbers_HW * (255 // most)), kind


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_few_bits_in_a_range_of_other_files_are_refused(bits):
    """A picture of 8 bits that a program saved in fewer would come out dark, or one of few bits white."""
    _, by_kind = few_bits(bits)
    told = rf"here: {bits} bits?, numbers of 0 to {2**bits - 1}, and data.range goes up to 255: Save it with 8 bits"
    for kind, raw in by_kind.items():
        assert re.match(told, wrong(raw, reading=Reading((0, 255))).replace(". Save", ": Save")), kind


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_plan_tells_how_few_they_are(bits):
    for kind, raw in few_bits(bits)[1].items():
        if isinstance(raw, bytes):
            assert bits_of(raw) == f"{bits} bit{'s' * (bits > 1)}", kind


def test_few_bits_with_a_transparent_grey_lie_over_white():
    numbers_HW, _ = few_bits(2)
    raw = png_of(2, numbers_HW, more=struct.pack(">H", 1))
    shown_HW = np.where(numbers_HW == 1, 3, numbers_HW)
    assert np.array_equal(decoded(raw, reading=Reading((0, 3)))[:, :, 0], expected(shown_HW, 0, 3))


@pytest.mark.parametrize("kind", ["BMP", "GIF", "PNG"])
def test_colours_of_a_palette_have_eight_bits_however_few_their_numbers_have(kind):
    grey_HW = few_bits(1)[0] * 255
    picture = Image.fromarray(grey_HW.astype(np.uint8)).convert("1" if kind == "BMP" else "P")
    assert np.array_equal(decoded(encoded(picture, kind), reading=Reading((0, 255)))[:, :, 0], grey_HW / 255)


def test_bands_of_one_bit():
    numbers_HWC = np.random.default_rng(0).integers(2, size=(6, 16, 5))
    raw = Tiff(numbers_HWC, 1, BLACK_IS_ZERO, extra=(0,) * 4, planes_apart=True).to_bytes()
    assert np.array_equal(decoded(raw, 5, Reading((0, 1))), numbers_HWC)
    assert "1 bit, numbers of 0 to 1, and data.range goes up to 2." in wrong(raw, 5, Reading((0, 2)))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_what_was_read_otherwise_once_is_known(bits):
    """Codes of then are under another key, and runs of then are not resumed."""
    for kind, raw in few_bits(bits)[1].items():
        assert was_scaled(raw, (0, 2**bits - 1)) == (bits > 1), kind
        assert not was_scaled(raw, (0, 255))
        assert not was_scaled(raw, None)
    assert not was_scaled(encoded(Image.fromarray(np.eye(3, dtype=np.uint8)), "PNG"), (0, 1))
    assert not was_scaled(np.eye(3), (0, 1))


def test_codes_and_runs_of_a_version_that_read_them_otherwise_are_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("TLSCALE_CACHE", str(tmp_path / "cache"))
    for row in range(40):
        numbers_HW = np.full((32, 32), 1 + row % 3, np.int64) - np.eye(32, dtype=np.int64)
        place = tmp_path / "data" / ("train" if row < 30 else "test") / f"c{row % 3}" / f"{row}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        numbers_HW[0, :6] = [row >> at & 1 for at in range(6)]
        place.write_bytes(png_of(2, numbers_HW))
    probe = {"data": {"source": "folder", "range": [0, 3]}, "probe": {"kind": "ridge"}}
    found = tlscale.run(small_recipe(tmp_path / "p.yaml", tmp_path / "data", **probe), tmp_path / "probe")
    assert found["codes"]["num_computed"] == 40
    with monkeypatch.context() as before:
        before.setattr("tlscale.codes.decoders.was_scaled", lambda raw, value_range: False)
        again = tlscale.run(small_recipe(tmp_path / "a.yaml", tmp_path / "data", **probe), tmp_path / "again")
    assert again["codes"]["num_computed"] == 40
    trained = {"data": probe["data"], "duration": "3 steps", "batch_size": 8, "checkpoint": {"every": "1 steps"}}
    recipe = small_recipe(tmp_path / "t.yaml", tmp_path / "data", **trained)
    tlscale.run(recipe, tmp_path / "whole")
    out = as_after(2, tmp_path / "whole", tmp_path / "run")
    info = json.loads((out / "run.json").read_text())
    info["corrections"].remove("few-bits-as-stored")
    (out / "run.json").write_text(json.dumps(info))
    with pytest.raises(ResumeError, match="few-bits-as-stored: grey of 2 and 4 bits"):
        tlscale.run(recipe, out, resume=True)
