"""scripts/make_pretraining_images.py on small pictures and a font made or shipped here: no network, no packages."""

from __future__ import annotations

import importlib
import io
import json
import sys
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageChops

from tlscale.data.sources.open import open_data
from tlscale.recipe.schema import DataSection

SCRIPTS = Path(__file__).parents[3] / "scripts"
FONTS = Path(matplotlib.get_data_path()) / "fonts/ttf"
MODULES = ("make_pretraining_images", "pretraining_crops", "pretraining_packages")


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield tuple(importlib.import_module(name) for name in MODULES)
    for name in MODULES:
        sys.modules.pop(name, None)


def noise(seed: int, width: int = 160, height: int = 120, channels: int = 3) -> Image.Image:
    """Coarse blocks, each picture its own."""
    blocks = np.random.default_rng(seed).integers(256, size=(height // 10, width // 10, channels), dtype=np.uint8)
    return Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)


def thing(seed: int) -> Image.Image:
    """A picture cut out of its ground: a disc."""
    image = noise(seed).convert("RGBA")
    y, x = np.ogrid[: image.height, : image.width]
    disc = (x - image.width / 2) ** 2 + (y - image.height / 2) ** 2 < (image.height / 2) ** 2
    image.putalpha(Image.fromarray((disc * 255).astype(np.uint8)))
    return image


FACES = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "cmr10")


@pytest.fixture
def pools(scripts):
    make, crops, _ = scripts
    pictures = [crops.Picture(f"p/{i}.png", "photo", noise(i)) for i in range(30)]
    pictures += [crops.Picture(f"t/{i}.png", "object", thing(i)) for i in range(30, 40)]
    typefaces = [crops.Typeface(f"f{i}/{name}.ttf", FONTS / f"{name}.ttf") for i, name in enumerate(FACES)]
    return make.split_pool(pictures, typefaces, seed=0)


def test_same_crop_for_the_same_generator_and_another_for_another(scripts, pools):
    _, crops, _ = scripts
    pool = pools["train"]
    for picture in (pool.pictures[0], pool.pictures[-1]):
        first, again, other = (crops.picture_crop(picture, 32, np.random.default_rng(seed)) for seed in (1, 1, 2))
        assert (first.size, first.mode) == ((32, 32), "RGB")
        assert first.tobytes() == again.tobytes() != other.tobytes()
    for symbol in (False, True):
        letters = [
            crops.letter_crop(pool.symbolic[0], pool, 32, np.random.default_rng(seed), symbol) for seed in (1, 1, 2)
        ]
        assert (letters[0].size, letters[0].mode) == ((32, 32), "RGB")
        assert letters[0].tobytes() == letters[1].tobytes() != letters[2].tobytes()


def test_a_crop_lies_inside_its_picture(scripts):
    """All of a picture is bright red, so a crop that reaches beyond it, turned or not, would have other pixels."""
    _, crops, _ = scripts
    for seed in range(50):
        crop = crops.resized_crop(Image.new("RGB", (90, 60), (250, 10, 10)), 24, np.random.default_rng(seed))
        assert crop.getcolors() == [(24 * 24, (250, 10, 10))]


def test_most_crops_show_something(scripts):
    _, crops, _ = scripts
    half_flat = Image.new("RGB", (400, 300), (90, 90, 90))
    half_flat.paste(noise(3, 100, 300), (300, 0))
    picture = crops.Picture("p", "photo", half_flat)
    flat = 0
    for seed in range(60):
        crop = crops.picture_crop(picture, 32, np.random.default_rng(seed))
        flat += crops.detail(crops.thumbnail_of(crop)) < crops.LEAST_CROP_DETAIL
    assert flat <= 2


def test_ink_and_ground_differ(scripts, pools):
    _, crops, _ = scripts
    poor = 0
    for seed in range(100):
        ground, ink = crops.ground_and_ink(pools["train"], 16, np.random.default_rng(seed))
        poor += abs(crops.brightness(ground) - crops.brightness(ink)) < crops.LEAST_CONTRAST
    assert poor <= 3


def test_letters_are_whole_where_they_fit(scripts):
    _, crops, _ = scripts
    for seed in range(40):
        place = crops.random_place(10, np.random.default_rng(seed))
        assert 0 <= place <= 10
        assert -7 <= crops.random_place(-7, np.random.default_rng(seed)) <= 0
    mask = Image.new("L", (30, 60), 255)
    for seed in range(40):
        # At most 1.1 of the side and stretched by at most 1.1, half as wide as high.
        box = crops.placed(mask, 64, np.random.default_rng(seed)).getbbox()
        assert box[3] - box[1] >= 64 * 0.35 / 1.1 - 1


def test_digits_are_never_drawn(scripts):
    _, crops, _ = scripts
    assert not any(character.isdigit() or character.isnumeric() for character in crops.LETTERS + crops.SYMBOLS)


@pytest.mark.parametrize("num", [1, 50, 1000])
def test_plan_has_exact_shares(scripts, num):
    make, _, _ = scripts
    counts = Counter(make.plan(num, seed=4))
    num_validation = round(num * 0.02)
    assert sum(counts.values()) == num
    assert counts["validation", True] + counts["validation", False] == num_validation
    assert counts["validation", True] == round(num_validation * 0.6)
    assert counts["train", True] == round((num - num_validation) * 0.6)
    assert make.plan(num, seed=4) == make.plan(num, seed=4)


def test_no_source_is_in_both_splits(scripts, pools):
    make, crops, _ = scripts
    train, validation = pools["train"], pools["validation"]
    assert (len(train.pictures), len(validation.pictures)) == (39, 1)
    assert (len(train.typefaces), len(validation.typefaces)) == (3, 1)
    assert not {picture.name for picture in train.pictures} & {picture.name for picture in validation.pictures}
    # All fonts of a package go together.
    family = [crops.Typeface(f"{package}/{i}.ttf", FONTS / "cmr10.ttf") for package in "abc" for i in range(5)]
    for seed in range(5):
        held = make.split_pool(train.pictures, family, seed)["validation"].typefaces
        assert len(held) == 5
        assert len({typeface.name[0] for typeface in held}) == 1


def test_file_has_the_same_bytes_twice_and_the_manifest_source_opens_it(scripts, pools, tmp_path):
    make, _, _ = scripts
    for name in ("a", "b"):
        make.write_table(pools, tmp_path / f"{name}.parquet", num=150, size=32, seed=7)
    make.write_table(pools, tmp_path / "c.parquet", num=150, size=32, seed=8)
    a, b, c = ((tmp_path / f"{name}.parquet").read_bytes() for name in "abc")
    assert a == b != c
    assert len(list(tmp_path.iterdir())) == 3

    section = DataSection.model_validate({"source": "manifest", "path": str(tmp_path / "a.parquet")})
    data = open_data(section, 0)
    assert set(data.classes) == {"letter", "object", "photo"}
    assert (len(data.train), len(data.validation), data.test) == (147, 3, None)
    images = [Image.open(io.BytesIO(data.train.read(i))) for i in range(len(data.train))]
    assert {(image.format, image.size, image.mode) for image in images} == {("JPEG", (32, 32), "RGB")}
    num_grey = sum(is_grey(image) for image in images)
    assert 0.2 < num_grey / len(images) < 0.65  # a third, and what is grey in itself

    rows = pq.read_table(tmp_path / "a.parquet").to_pylist()
    sources = {split: {row["source"] for row in rows if row["split"] == split} for split in ("train", "validation")}
    assert not sources["train"] & sources["validation"]
    assert Counter(row["label"] == "letter" for row in rows) == {False: 90, True: 60}


def is_grey(image: Image.Image) -> bool:
    red, green, blue = image.convert("RGB").split()
    return all(ImageChops.difference(red, other).getextrema()[1] == 0 for other in (green, blue))


def test_flat_small_and_repeated_pictures_are_left_out(scripts, tmp_path):
    make, _, packages = scripts
    small, large = noise(1, 320, 240), noise(1, 320, 240).resize((640, 480))
    flat = Image.new("RGB", (300, 300), (10, 200, 30))
    named = {
        "a.png": small,
        "b.png": large,
        "c.png": small.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        "d.png": flat,
        "e.png": noise(2, 320, 90),
        "f.png": noise(5, 2000, 1000),
        "g.png": thing(6),
    }
    for name, image in named.items():
        image.save(tmp_path / name)
    package = packages.Package("p", "debian", "CC0", [{"kind": "photo", "files": ["*.png"]}], root=tmp_path)
    pictures = make.load_pictures([package])
    assert [picture.name for picture in pictures] == ["p/a.png", "p/f.png", "p/g.png"]
    assert pictures[1].image.size == (1600, 800)
    assert (pictures[2].image.mode, pictures[2].image.size) == ("RGBA", (119, 119))
    assert set(package.files) == {"a.png", "f.png", "g.png"}
    assert package.files["a.png"] == packages.sha256(tmp_path / "a.png")


def test_fonts_without_letters_are_left_out_and_large_families_thinned(scripts, tmp_path):
    make, _, packages = scripts
    for i in range(6):
        (tmp_path / f"{i}.ttf").write_bytes((FONTS / "DejaVuSans.ttf").read_bytes())
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    group = {"kind": "letter", "files": ["*.ttf"], "most": 3}
    typefaces = make.load_typefaces([packages.Package("f", "debian", "OFL", [group], root=tmp_path)])
    assert [typeface.name for typeface in typefaces] == ["f/0.ttf", "f/2.ttf", "f/5.ttf"]
    assert "♠" in typefaces[0].symbols
    assert not make.has_letters(FONTS / "LastResortHE-Regular.ttf")
    without = packages.Package("broken", "debian", "OFL", [{**group, "files": ["broken.ttf"]}], root=tmp_path)
    with pytest.raises(SystemExit, match=r"broken .* has no font with Latin letters"):
        make.load_typefaces([without])


def test_pattern_that_fits_nothing_is_an_error(scripts, tmp_path):
    _, _, packages = scripts
    package = packages.Package("p", "debian", "CC0", [{"kind": "photo", "files": ["*.webp"]}], root=tmp_path)
    with pytest.raises(SystemExit, match=r"p .* has no file \*\.webp"):
        package.chosen(package.groups[0])


def test_packages_that_cannot_be_had_are_named(scripts, tmp_path, monkeypatch):
    _, _, packages = scripts
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    (bin_dir / "apt-get").write_text("#!/bin/sh\nexit 100\n")
    (bin_dir / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", str(bin_dir))
    wanted = [packages.Package(name, "debian", "CC0", []) for name in ("one-pictures", "two-pictures")]
    with pytest.raises(SystemExit, match=r"cannot be had .*: one-pictures, two-pictures\."):
        packages.fetch(wanted, tmp_path / "cache")


def test_other_files_than_the_recorded_are_told(scripts, monkeypatch, tmp_path, capsys):
    _, _, packages = scripts
    entry = {"version": "1", "copyright_sha256": "c", "files": {"a": "1", "b": "2"}}
    other = {"version": "2", "copyright_sha256": "c", "files": {"a": "0", "d": "4"}}
    assert packages.differences({"p": entry}, {"p": entry}) == []
    assert packages.differences({"p": entry, "q": entry}, {"p": other, "r": entry}) == [
        "p: version 1 -> 2",
        "p/a: changed",
        "p/b: gone",
        "p/d: new",
        "q: recorded, and not used",
        "r: not recorded",
    ]
    monkeypatch.setattr(packages, "RECORDED", tmp_path / "recorded.json")
    (tmp_path / "recorded.json").write_text('{"p": {"version": "1", "copyright_sha256": "c", "files": {}}}')
    packages.warn_of_differences({"p": {"version": "1", "copyright_sha256": "c", "files": {}}})
    assert capsys.readouterr().err == ""
    packages.warn_of_differences({})
    assert "OTHER images than usual" in capsys.readouterr().err


def test_the_list_of_packages_is_whole(scripts):
    """Each package once, with its licences; and the recorded files are those of the listed packages."""
    _, _, packages = scripts
    listed = packages.read_packages()
    names = [package.name for package in listed]
    assert len(names) == len(set(names))
    assert all(package.licences and package.groups for package in listed)
    assert {package.origin for package in listed} == {"debian", "wheel"}
    recorded = json.loads(packages.RECORDED.read_text(encoding="utf-8"))
    assert {name: entry["licences"] for name, entry in recorded.items()} == {p.name: p.licences for p in listed}
    assert all(entry["files"] for entry in recorded.values())
    assert not [path for entry in recorded.values() for path in entry["files"] if "mnist" in path.lower()]
