"""What is no image, whatever it is called: pipes, sockets, devices, links that lead nowhere, holes, sound, text."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.recipes.wrong_data import put_folder
from tlscale.data import decode, resize
from tlscale.data.decode import FORMATS, BadImageError, decode_image, header_hw
from tlscale.data.input_spec import InputSpec
from tlscale.data.sources.open import open_data
from tlscale.data.transforms import eval_transform
from tlscale.data.views import CENTER, CORNERS
from tlscale.errors import DataError
from tlscale.recipe.schema import DataSection


def section_of(root: Path, **keys: object) -> DataSection:
    return DataSection.model_validate({"source": "folder", "path": str(root), **keys})


def put_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # an address has at most 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(path.name)
    finally:
        os.chdir(here)


STRANGE = {
    "a named pipe": os.mkfifo,
    "a socket": put_socket,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "Too many levels of symbolic links": lambda path: path.symlink_to(path.name),
    "No such file": lambda path: path.symlink_to("gone.png"),
}


@pytest.mark.parametrize("what", STRANGE)
@pytest.mark.parametrize("skip", ["error", "skip"])
def test_a_file_that_is_no_regular_one_is_never_opened(what: str, skip: str, tmp_path: Path):
    STRANGE[what](put_folder(tmp_path, cat=3, dog=3) / "cat" / "x.png")
    with pytest.raises(DataError, match=re.escape("x.png") + f".*{what}"):
        open_data(section_of(tmp_path, on_bad_image=skip), 0)


@pytest.mark.parametrize("to", ["/dev/zero", "pipe", "cat"])
def test_a_manifest_tells_what_it_names_in_place_of_a_file(to: str, tmp_path: Path):
    os.mkfifo(put_folder(tmp_path, cat=2, dog=2) / "pipe")
    (tmp_path / "list.csv").write_text(f"path,label\ncat/0.png,cat\n{to},dog\n")
    with pytest.raises(DataError, match=rf"no regular files: '{to}' is a (device|named pipe|folder)"):
        open_data(section_of(tmp_path / "list.csv", source="manifest"), 0)


@pytest.mark.parametrize("name", ["horse", "loop"])
def test_a_class_that_is_a_link_to_nowhere_is_not_left_out(name: str, tmp_path: Path):
    (put_folder(tmp_path, cat=2, dog=2) / name).symlink_to("loop")
    with pytest.raises(DataError, match=f"not there: .*{name}"):
        open_data(section_of(tmp_path), 0)


def test_a_test_split_that_is_a_link_to_nowhere_is_not_left_out(tmp_path: Path):
    (put_folder(tmp_path, train__cat=2, train__dog=2) / "test").symlink_to("unmounted")
    with pytest.raises(DataError, match="not there: .*test"):
        open_data(section_of(tmp_path), 0)


def test_a_hole_of_300_gb_is_a_bad_image(tmp_path: Path):
    with (put_folder(tmp_path, cat=3, dog=3) / "cat" / "hole.png").open("wb") as file:
        file.truncate(300 << 30)
    data = open_data(section_of(tmp_path, validation_fraction=0.0), 0)
    hole = next(i for i in range(len(data.train)) if data.train.where(i).endswith("hole.png"))
    with pytest.raises(DataError, match=r"hole\.png: a file of 300\.0 GiB is no image"):
        data.train.read(hole)
    data = open_data(section_of(tmp_path, on_bad_image="skip"), 0)
    assert [why for why in data.bad_images.reasons() if "300.0 GiB" in why]


OTHERS = {
    "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "AVIF": b"\0\0\0\x1cftypavif\0\0\0\0avifmif1",
    "video (MP4": b"\0\0\0\x18ftypisom\0\0\2\0isomiso2",
    "sound (WAV)": b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0",
    "sound (MP3)": b"ID3\x04\0\0\0\0\0\0",
    "sound or a video (Ogg)": b"OggS\0\2",
    "HTML": b"\xef\xbb\xbf\n<!DOCTYPE html><html>404</html>",
    "text": "nicht gefunden: Bär\n".encode() * 60,
    "empty": b"",
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_is_no_image_is_called_what_it_is(what: str, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(decode, "FORMATS", FORMATS[:7])  # a machine that reads neither HEIF nor AVIF
    for look in (lambda raw: decode_image(raw, in_chans=3, max_pixels=10**6, where="x.jpg"), header_of(tmp_path)):
        with pytest.raises(BadImageError, match=re.escape(what)) as caught:
            look(OTHERS[what])
        assert "damaged" not in str(caught.value)
        assert "data.on_bad_image" in str(caught.value)
        assert ("heif" in str(caught.value)) == (what == "HEIC")


def header_of(folder: Path):
    def look(raw: bytes) -> tuple[int, int]:
        path = folder / "x.jpg"
        path.write_bytes(raw)
        with path.open("rb") as file:
            return header_hw(file, "x.jpg")

    return look


@pytest.mark.parametrize("kind", FORMATS)
def test_no_image_is_taken_for_another_file(kind: str, tmp_path: Path):
    rng = np.random.default_rng(0)
    for size in (1, 2, 7, 20):
        Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(tmp_path / "x", kind)
        raw = (tmp_path / "x").read_bytes()
        assert decode_image(raw, in_chans=3, max_pixels=10**6, where="x").shape == (size, size, 3)
    assert decode_image(b"P2 2 1 255 1 2 ", in_chans=1, max_pixels=10, where="x").tolist() == [[[1], [2]]]


@pytest.mark.parametrize("name", ["nearest", "bicubic", "box"])
@pytest.mark.parametrize("shape", [(1, 300, 3), (300, 1, 3), (3, 197, 1), (40, 600, 3)])
def test_a_strip_is_cropped_in_pieces_to_the_same_pixels(name: str, shape, monkeypatch: pytest.MonkeyPatch):
    image_HWC = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    chans = shape[2]
    spec = InputSpec(32, chans, (0.5,) * chans, (0.5,) * chans, name, 0.875)
    places = (CENTER, *CORNERS)
    whole = eval_transform(image_HWC, spec, places)
    monkeypatch.setattr(resize, "MOST_RESIZED_PIXELS", 1 << 10)
    assert np.array_equal(eval_transform(image_HWC, spec, places), whole)


def test_the_long_side_of_a_strip_is_never_enlarged_as_a_whole(monkeypatch: pytest.MonkeyPatch):
    made = []
    resized = resize._resize

    def seen(image_HWC, target_hw, spec):
        made.append(target_hw[0] * target_hw[1])
        return resized(image_HWC, target_hw, spec)

    monkeypatch.setattr(resize, "_resize", seen)
    spec = InputSpec(112, 1, (0.5,), (0.5,), "bilinear", 1.0)
    assert eval_transform(np.full((1, 8000, 1), 7, np.uint8), spec).shape == (112, 112, 1)
    assert max(made) <= resize.MOST_RESIZED_PIXELS


def test_a_line_is_no_image():
    with pytest.raises(BadImageError, match=r"1 x 20000 pixels: a line"):
        decode_image(np.zeros((20000, 1), np.uint8), in_chans=3, max_pixels=10**6, where="x")
