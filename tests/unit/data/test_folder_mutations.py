"""Random damage to a folder of images: it is read, or refused by an error of ours with exit code 2."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tlscale.data.decode import decode_image
from tlscale.data.sources.open import open_data
from tlscale.errors import EXIT_BAD_INPUT, TlscaleError
from tlscale.recipe.schema import DataSection

ENDINGS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "bmp": "BMP", "tif": "TIFF", "gif": "GIF"}
NAMES = ["\udce9.png", "a\nb.png", ".hidden.png", "x" * 250 + ".png", "nul.PNG", "train", "..png", "-rf.png"]
NAMES += ["\u202egnp.png", "cafe\u0301", "Thumbs.db", "x.txt", "\x1b[31m.jpg"]
CONTENTS = [b"", b"RIFF\x10\0\0\0WAVE", b"<html>", b"text\n" * 99, b"\0\0\0\x18ftypheic", bytes(range(256)) * 9]
SMALL = 10**6  # bytes; the holes are larger


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sound")
    rng = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (root / "train" / label).mkdir(parents=True)
        for ending, kind in ENDINGS.items():
            image = Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8))
            image.save(root / "train" / label / f"0.{ending}", kind)
    return root


def flip(path: Path, rng: random.Random) -> None:
    raw = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 9)):
        raw[rng.randrange(len(raw))] = rng.randrange(256)
    path.write_bytes(raw)


def splice(path: Path, rng: random.Random) -> None:
    raw = path.read_bytes()
    at = rng.randrange(len(raw) + 1)
    path.write_bytes(raw[:at] + rng.randbytes(rng.randint(1, 40)) + raw[at + rng.choice((0, 8)) :])


def replace(path: Path, rng: random.Random) -> None:
    path.unlink()
    kind = rng.randrange(3)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    else:
        path.symlink_to(rng.choice([path.name, "/dev/zero", "/nowhere", "..", "../.."]))


DAMAGE: list[Callable[[Path, random.Random], object]] = [
    flip,
    splice,
    replace,
    lambda path, rng: path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size + 1)]),
    lambda path, rng: path.write_bytes(rng.choice(CONTENTS)),
    lambda path, rng: os.truncate(path, rng.choice([300 << 30, 2 * SMALL])),
    lambda path, rng: path.rename(path.parent / rng.choice(NAMES)),
    lambda path, rng: path.parent.rename(path.parent.parent / rng.choice(NAMES)),
    lambda path, rng: shutil.copy(path, path.parent.parent / path.name),
    lambda path, rng: (path.parent / "deep" / "er").mkdir(parents=True),
]


def mutate(root: Path, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 3)):
        files = [path for path in sorted(root.rglob("*")) if path.is_file() and 0 < path.lstat().st_size < SMALL]
        try:
            rng.choice(DAMAGE)(rng.choice(files), rng)
        except FileExistsError:  # two folders of one name
            continue


def read_all(root: Path, on_bad_image: str) -> None:
    section = DataSection.model_validate({"source": "folder", "path": str(root), "on_bad_image": on_bad_image})
    data = open_data(section, 0)
    for split in filter(None, (data.train, data.validation)):
        for i in range(len(split)):
            decode_image(split.read(i), in_chans=3, max_pixels=10**6, where=split.where(i))


@pytest.mark.filterwarnings("ignore")  # Pillow warns of what it then refuses
@pytest.mark.parametrize("seeds", [range(40), pytest.param(range(40, 500), marks=pytest.mark.long)], ids=["40", "460"])
def test_a_damaged_folder_is_read_or_refused(seeds: range, sound: Path, tmp_path: Path):
    refused: list[TlscaleError] = []
    for seed in seeds:
        rng, root = random.Random(seed), tmp_path / str(seed)
        shutil.copytree(sound, root)
        mutate(root, rng)
        try:
            read_all(root, rng.choice(["error", "skip"]))
        except TlscaleError as error:
            refused.append(error)
    assert len(refused) > len(seeds) // 3
    assert {error.exit_code for error in refused} == {EXIT_BAD_INPUT}
    for said in map(str, refused):
        assert all(line.startswith("  ") for line in said.split("\n")[1:])
        assert "\x1b" not in said
