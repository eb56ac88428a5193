"""`tlscale new`: from a folder of own pictures to a recipe that runs."""

import csv
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

import tlscale
from examples.messy_photos import COUNTS, make_messy_folder
from tests.scenes import put_scenes, scene_of
from tests.small_runs import result
from tlscale.cli import main
from tlscale.commands.new import new
from tlscale.data.sources.open import open_data
from tlscale.errors import DataError, ModelError, RecipeError
from tlscale.recipe.schema import DataSection


def listed(place) -> dict[str, str]:
    with open(place, newline="", encoding="utf-8") as file:
        return {row["path"]: row["reason"] for row in csv.DictReader(file)}


@pytest.fixture(scope="module")
def messy(tmp_path_factory):
    return make_messy_folder(tmp_path_factory.mktemp("messy") / "photos")


def pictures(folder, labels=("ash", "oak"), count=6, size=16):
    rng = np.random.default_rng(3)
    for label in labels:
        for number in range(count):
            path = folder / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(path)
    return folder


def test_a_messy_folder_becomes_a_recipe_that_runs(messy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = CliRunner().invoke(main, ["new", str(messy)], catch_exceptions=False)
    said = ran.output
    assert ran.exit_code == 0, said
    assert "85 images in 3 classes: temple 40, flower 33, portrait 12" in said
    assert "next      tlscale run photos.yaml" in said
    left_out = listed("photos.exclude.csv")
    assert set(left_out) == {
        *("portrait/IMG_0100.jpg", "temple/IMG_0101.png", "temple/notes.txt", "IMG_0102.jpg", "to sort"),
        *("temple/copy of IMG_0008.JPG", "flower/IMG_0103.jpg", "temple/IMG_0009.JPG"),
    }
    assert "cut short" in left_out["portrait/IMG_0100.jpg"]
    assert left_out["temple/copy of IMG_0008.JPG"] == "equal to temple/IMG_0008.JPG"
    assert "another label" in left_out["flower/IMG_0103.jpg"]
    recipe = tlscale.load_recipe("photos.yaml")
    assert recipe.probe is not None
    data = open_data(recipe.data, recipe.seed)
    assert len(data.train) + len(data.validation) == sum(COUNTS.values()) - 1
    assert recipe.evaluate.folds == 5
    assert "no test split: 5 folds, so that each image is scored" in said
    assert "each image is scored by the one of 5 models" in (tmp_path / "photos.yaml").read_text()
    tlscale.run(recipe.with_(**{"evaluate.folds": 2}), tmp_path / "run")
    assert result(tmp_path / "run")["split"] == "folds"
    assert not any("LEAK" in note for note in result(tmp_path / "run")["notes"])
    assert result(tmp_path / "run")["top1"] > 0.5


def test_nothing_is_written_over_and_a_failure_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos = pictures(tmp_path / "photos")
    (photos / "notes.txt").write_text("x")
    new(photos, out="photos.yaml")
    with pytest.raises(RecipeError, match="is there already"):
        new(photos, out="photos.yaml")
    with pytest.raises(DataError, match="is there already"):
        new(photos, out="photos.yml")  # whose table would be the same
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ModelError):
        new(photos, out="other.yaml", backbone="resnet10000")
    (tmp_path / "one" / "ash").mkdir(parents=True)
    (tmp_path / "one" / "ash" / "1.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match="none of 1 images can be read"):
        new("one", out="one.yaml")
    assert sorted(set(tmp_path.iterdir()) - {tmp_path / "one"}) == before


def test_names_cannot_change_the_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evil = ("a\nname: evil", "=cmd()", "<img src=x onerror=alert(1)>", "b: [c", "\x1b[31mred", "# d")
    recipe = tlscale.new(pictures(tmp_path / "x: {y}\n", evil, count=5), out="r.yaml")
    assert recipe.name == "r"
    assert tlscale.load_recipe("r.yaml") == recipe
    assert open_data(recipe.data, 0).classes == tuple(sorted(evil))
    assert "\x1b" not in (tmp_path / "r.yaml").read_text()


def test_a_table_and_splits_and_many_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos = pictures(tmp_path / "photos" / "train")
    Image.open(photos / "ash" / "1.png").save(photos / "ash" / "2.png")  # a copy within train
    test = pictures(tmp_path / "photos" / "Test", count=2, size=17)
    Image.open(photos / "oak" / "3.png").save(test / "oak" / "9.png")  # one that is to be scored
    recipe = new("photos")
    assert recipe.data.test_split == "Test"
    assert listed("photos.exclude.csv") == {
        "train/ash/2.png": "equal to train/ash/1.png",
        "train/oak/3.png": "equal to Test/oak/9.png",
    }
    assert recipe.data.validation_fraction == 0.2
    assert recipe.evaluate.folds is None  # there are images to score
    rows = [f"photos/train/ash/{i}.png,ash" for i in range(6)] + [f"photos/train/oak/{i}.png,oak" for i in range(6)]
    (tmp_path / "mine.csv").write_text("\n".join(["photo,species", *rows, "gone.png,oak"]) + "\n")
    recipe = new("mine.csv")
    assert (recipe.data.image_column, recipe.data.label_column) == ("photo", "species")
    assert listed("mine.exclude.csv")["gone.png"].startswith("it cannot be read")
    assert recipe.evaluate.folds == 5
    (tmp_path / "few.csv").write_text("\n".join(["photo,species", *rows[1:5], *rows[6:]]) + "\n")
    assert new("few.csv").evaluate.folds is None  # four of ash: a fold would have none
    monkeypatch.setattr("tlscale.commands.new_recipe.MOST_PROBED", {"bundled": 5, "other": 500})
    recipe = new("mine.csv", out="tuned.yaml")
    assert recipe.probe is None
    assert recipe.freeze
    assert (recipe.evaluate.folds, recipe.data.validation_fraction) == (5, 0.2)  # few enough to be scored by folds
    monkeypatch.setattr("tlscale.commands.new_recipe.FEW_IMAGES", 5)
    recipe = new("mine.csv", out="held_out.yaml")
    assert (recipe.evaluate.folds, recipe.data.validation_fraction) == (None, 0.1)


OTHERS = [pytest.param(name, marks=pytest.mark.long) for name in ("vit_tiny_patch16_224", "convnext_atto")]


@pytest.mark.parametrize("backbone", ["resnet18", *OTHERS])
def test_another_backbone_has_its_own_layers_and_freezing(backbone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos = pictures(tmp_path / "photos")
    recipe = new(photos, backbone=backbone)
    assert recipe.backbone.weights == "pretrained"
    assert len(recipe.codes.layer) > 2
    monkeypatch.setattr("tlscale.commands.new_recipe.FEW_IMAGES", 5)
    monkeypatch.setattr("tlscale.commands.new_recipe.MOST_PROBED", {"bundled": 500, "other": 5})
    recipe = new(photos, backbone=backbone, out="tuned.yaml")
    small = {"backbone.weights": "none", "duration": "1 steps", "data.image_size": 224 if "vit" in backbone else 32}
    tuned = tlscale.load_recipe("tuned.yaml", [f"{key}={value}" for key, value in small.items()])
    tlscale.run(tuned, tmp_path / "run")
    figures = result(tmp_path / "run")
    assert 0.2 < figures["trainable_params"] / figures["total_params"] < 0.999


def test_images_that_a_table_names_by_absolute_paths_are_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos = pictures(tmp_path / "photos")
    (photos / "ash" / "1.png").write_bytes(b"no image")
    rows = [f"{photos}/{label}/{i}.png,{label}" for label in ("ash", "oak") for i in range(6)]
    for folder in ("photos", "elsewhere"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "mine.csv").write_text("\n".join(["path,label", *rows, "/no/such.png,oak"]) + "\n")
        recipe = new(f"{folder}/mine.csv", out=f"recipes/{folder}/r.yaml")  # folders that are not there yet
        assert len(listed(recipe.data.exclude)) == 2
        data = open_data(recipe.data, recipe.seed)
        assert len(data.train) + len(data.validation) == 11


def test_runs_are_kept_out_of_the_class_folders(tmp_path, monkeypatch):
    photos = pictures(tmp_path / "photos")
    for place, data in ((photos, "."), (photos / "ash", "..")):
        monkeypatch.chdir(place)
        before = sorted(photos.rglob("*"))
        with pytest.raises(DataError, match=re.escape(f"Go to another folder, such as '{tmp_path}'")):
            new(data, out="r.yaml")
        assert sorted(photos.rglob("*")) == before
    with pytest.raises(DataError, match="'' does not exist"):
        new("")


@pytest.mark.parametrize("name", ["train", "Test", "val", "test_images", "Training"])
def test_a_class_that_is_called_like_a_split(name, tmp_path, monkeypatch):
    """`new` says so in the recipe, which reads it as a class; without that key the error says what to write."""
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "photos", ("ash", "oak", name))
    new("photos", out="photos.yaml")
    assert f"# {name!r} is a class here, and no split" in (tmp_path / "photos.yaml").read_text()
    recipe = tlscale.load_recipe("photos.yaml")
    assert set(open_data(recipe.data, 0).classes) == {"ash", "oak", name}
    usual = recipe.data.model_copy(update={"train_split": "train"})
    with pytest.raises(DataError, match=rf"data.train_split: .*\('{name}'\).*\('ash', 'oak'\).*train_split: \. if"):
        open_data(usual, 0)


def test_folders_that_are_all_called_like_splits_are_no_classes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "photos", ("train", "test"))
    with pytest.raises(DataError, match="'test', 'train' are called like splits, and hold no class folders"):
        new("photos", out="photos.yaml")


def test_a_split_by_name_where_all_folders_are_classes_is_refused(tmp_path):
    section = DataSection(
        source="folder",
        path=str(pictures(tmp_path / "photos", ("ash", "val"))),
        train_split=".",
        validation_split="val",
    )
    with pytest.raises(DataError, match="data.validation_split: 'val' is a class where data.train_split is '.'"):
        open_data(section, 0)


def test_what_is_noted_of_the_data_is_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "photos")
    rows = [f"photos/{label}/{i}.png,{label},{'train' if i else 'test'}" for label in ("ash", "oak") for i in range(6)]
    (tmp_path / "t.csv").write_text("\n".join(["path,label,subset", *rows]) + "\n")
    said = CliRunner().invoke(main, ["new", "t.csv"], catch_exceptions=False).output
    assert "SPLITS IGNORED" in said
    raw = [(tmp_path / row.split(",")[0]).read_bytes() for row in rows]
    pq.write_table(pa.table({"image": [*raw, b"junk"], "label": [*("ash",) * 6, *("oak",) * 7]}), "b.parquet")
    said = CliRunner().invoke(main, ["new", "b.parquet"], catch_exceptions=False).output
    assert "1 images cannot be read" in said


def test_long_pictures_are_shown_whole(tmp_path, monkeypatch, capsys):
    """Of 240 x 80 pixels, with what tells the classes apart at one end: a crop from the middle does not see it."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for label, color in (("blue", (40, 40, 220)), ("red", (220, 40, 40))):
        (tmp_path / "long" / label).mkdir(parents=True)
        for number in range(30):
            pixels = rng.integers(0, 256, (80, 240, 3), dtype=np.uint8)
            left = int(rng.choice([8, 192]))
            pixels[20:60, left : left + 40] = color
            Image.fromarray(pixels).save(tmp_path / "long" / label / f"{number}.png")
    new("long", out="long.yaml")
    assert "33% of a typical image" in (tmp_path / "long.yaml").read_text()
    assert tlscale.load_recipe("long.yaml").data.image_size == (48, 144)
    once = "evaluate.folds=null"
    whole = tlscale.run(tlscale.load_recipe("long.yaml", [once]), tmp_path / "whole")
    assert "in the middle" not in capsys.readouterr().out
    cropped = tlscale.run(
        tlscale.load_recipe("long.yaml", [once, "data.image_size=80", "data.crop_mode=center"]), tmp_path / "cropped"
    )
    said = " ".join(capsys.readouterr().out.split())
    assert "the network is shown 33%, in the middle; data.crop_mode=squash or border shows all of it" in said
    assert whole["top1"] == 1.0
    assert cropped["top1"] < 0.85


def test_names_that_look_like_groups_are_a_hint_and_no_more(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put_scenes(tmp_path / "photos", num_scenes=12, photos=3)
    ran = CliRunner().invoke(main, ["new", "photos"], catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    assert re.search(r"groups\? +names such as \S+scene\d+_0.png look like 12 groups of 3 images", ran.output)
    text = (tmp_path / "photos.yaml").read_text()
    assert tlscale.load_recipe("photos.yaml").data.group_regex is None
    assert text.count("  # group_regex: ") == 1
    (tmp_path / "grouped.yaml").write_text(text.replace("  # group_regex: ", "  group_regex: "))
    recipe = tlscale.load_recipe("grouped.yaml")
    data = open_data(recipe.data, recipe.seed)
    scenes = [{scene_of(split.where(at)) for at in range(len(split))} for split in (data.train, data.validation)]
    assert not scenes[0] & scenes[1]
    rows = [
        f"{path.relative_to(tmp_path)},{path.parent.name},{scene_of(path)}"
        for path in (tmp_path / "photos").glob("*/*")
    ]
    (tmp_path / "list.csv").write_text("\n".join(["path,label,scene_id", *rows]))
    assert CliRunner().invoke(main, ["new", "list.csv"], catch_exceptions=False).exit_code == 0
    assert "  # group_column: scene_id\n" in (tmp_path / "list.yaml").read_text()
