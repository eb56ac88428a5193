"""Near duplicates by the cosine of codes: as one product of all images has them, whatever the blocks."""

from __future__ import annotations

import re
import shutil
from pathlib import PurePath

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from tests.scenes import put_scenes
from tests.small_runs import small_recipe
from tlscale.cli import main
from tlscale.codes import near_duplicates as near_module
from tlscale.codes.near_duplicates import near_duplicates, surplus_duplicates
from tlscale.data.sources.excluded import read_excluded
from tlscale.data.sources.folds import Fold
from tlscale.data.sources.open import open_data


class Rows:
    """Codes in memory."""

    def __init__(self, rows_ND):
        self.rows_ND, self.most = rows_ND, 0

    def __len__(self):
        return len(self.rows_ND)

    def take(self, at_B):
        self.most = max(self.most, len(at_B))
        return (self.rows_ND[torch.from_numpy(at_B)],)


@pytest.mark.parametrize("block", [1, 7, 2048])
def test_the_nearest_are_those_of_one_product(block, monkeypatch):
    monkeypatch.setattr(near_module, "_BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    one_ND, other_KD = (torch.randn(count, 6, generator=generator) for count in (23, 40))
    one_ND[5], one_ND[9], one_ND[3] = 3 * other_KD[17], other_KD[30] + 0.02, 0.0
    other_KD[31] = other_KD[17]  # of equally near ones the first
    one, other = Rows(one_ND), Rows(other_KD)
    found = near_duplicates(one, other, 0.9)
    cosines_NK = torch.nn.functional.cosine_similarity(one_ND[:, None], other_KD[None], dim=2)
    best_N, at_N = cosines_NK.max(dim=1)
    expected = [row for row in best_N.argsort(descending=True).tolist() if best_N[row] >= 0.9]
    assert found.positions_M.tolist() == expected
    assert expected[:2] == [5, 9]
    assert found.others_M.tolist() == [17, *at_N[expected[1:]].tolist()]
    assert np.allclose(found.cosines_M, best_N[expected], atol=1e-6)
    assert max(one.most, other.most) <= block
    assert near_duplicates(one, other, 1.0).positions_M.tolist() == [5]


@pytest.mark.parametrize("block", [1, 7, 2048])
def test_without_the_surplus_no_two_of_different_units_look_alike(block, monkeypatch):
    monkeypatch.setattr(near_module, "_BLOCK", block)
    generator = torch.Generator().manual_seed(1)
    rows_ND = torch.randn(9, 8, generator=generator).repeat_interleave(4, 0)[torch.randperm(36, generator=generator)]
    rows_ND += 0.1 * torch.randn(36, 8, generator=generator)
    rows_ND[20] = rows_ND[4]
    units_N, gone_N = np.arange(36) // 2, np.arange(36) == 3
    found = surplus_duplicates(Rows(rows_ND), 0.97, units_N, gone_N)
    cosines_NN = torch.nn.functional.cosine_similarity(rows_ND[:, None], rows_ND[None], dim=2).numpy()
    gone, nearest = {3}, {}
    for row in range(36):  # of those before it that stay
        near = [at for at in range(row) if at not in gone and at // 2 != row // 2 and cosines_NN[row, at] >= 0.97]
        if near and row not in gone:
            gone.add(row)
            nearest[row] = max(near, key=lambda at: cosines_NN[row, at])
    assert len(nearest) > 5
    assert dict(zip(found.positions_M.tolist(), found.others_M.tolist(), strict=True)) == nearest
    assert nearest[20] == 4
    assert found.positions_M[0] == 20
    assert np.allclose(
        found.cosines_M, [cosines_NN[row, nearest[row]] for row in found.positions_M.tolist()], atol=1e-6
    )
    assert gone_N.sum() == 1


@pytest.mark.parametrize("block", [1, 7, 2048])
def test_images_that_are_together_are_not_compared(block, monkeypatch):
    monkeypatch.setattr(near_module, "_BLOCK", block)
    rows_ND = torch.eye(4)[[0, 0, 1, 1, 2, 2, 2]] + 1e-3 * torch.arange(7)[:, None]
    together_N = np.array([0, 0, 0, 1, 1, 1, 0])
    found = near_duplicates(Rows(rows_ND), Rows(rows_ND), 0.9, (together_N, together_N))
    pairs = dict(zip(found.positions_M.tolist(), found.others_M.tolist(), strict=True))
    assert pairs.keys() == {2, 3, 4, 5, 6}
    assert (pairs[2], pairs[3], pairs[4], pairs[5]) == (3, 2, 6, 6)
    assert pairs[6] in (4, 5)


def test_codes_show_photos_of_one_scene_in_two_splits(tmp_path):
    scenes = put_scenes(tmp_path / "data" / "train", num_scenes=6, photos=2)
    first = sorted((scenes / "a").iterdir())[0]
    for name in "ab":
        (tmp_path / "data" / "test" / name).mkdir(parents=True)
        Image.new("L", (32, 32), 9).save(tmp_path / "data" / "test" / name / f"flat_{name}.png")
    photo_HW = np.asarray(Image.open(first)).astype(int) + 1
    Image.fromarray(photo_HW.clip(0, 255).astype(np.uint8)).save(tmp_path / "data" / "test" / "a" / "brighter.png")
    data = {"source": "folder", "path": str(tmp_path / "data"), "validation_fraction": 0.0}
    small_recipe(tmp_path / "r.yaml", tmp_path, data=data, backbone={"name": "resnet10t", "weights": "bundled"})
    done = CliRunner().invoke(main, ["codes", str(tmp_path / "r.yaml"), "--near-duplicates", "0.99"])
    assert done.exit_code == 0, done.output
    shown = " ".join(done.output.split())
    assert "1 of 3 images of test look like one of train: the cosine of their codes" in shown
    assert f"test/a/brighter.png train/a/{first.name}" in shown
    done = CliRunner().invoke(main, ["codes", str(tmp_path / "r.yaml"), "--near-duplicates", "1.5"])
    assert done.exit_code == 2


def test_what_looks_alike_is_written_for_data_exclude(tmp_path):
    scenes, test = put_scenes(tmp_path / "data" / "train", num_scenes=6, photos=2), tmp_path / "data" / "test"
    alike = sorted((scenes / "a").iterdir())[0]
    near_HW = (np.asarray(Image.open(alike)).astype(int) + 1).clip(0, 255).astype(np.uint8)
    for name in "ab":
        (test / name).mkdir(parents=True)
        Image.new("L", (32, 32), 9).save(test / name / "flat.png")
    Image.fromarray(near_HW).save(test / "a" / "brighter.png")
    shutil.copyfile(alike, scenes / "a" / "again.png")  # both of train are near, and one is nearest
    (tmp_path / "before.csv").write_text("path,reason\ntrain/b/none.png,blurred\n")
    keys = {"validation_fraction": 0.0, "exclude": str(tmp_path / "before.csv")}
    data = {"source": "folder", "path": str(tmp_path / "data"), **keys}
    recipe = small_recipe(
        tmp_path / "r.yaml", tmp_path, data=data, backbone={"name": "resnet10t", "weights": "bundled"}
    )
    table = tmp_path / "alike.csv"
    line = ["codes", str(tmp_path / "r.yaml"), "--near-duplicates", "0.99", "--near-duplicates-to"]
    done = CliRunner().invoke(main, [*line, str(table)])
    assert done.exit_code == 0, done.output
    rows = dict(read_excluded(table))
    assert rows.keys() == {f"train/a/{alike.name}", "train/a/again.png", "train/b/none.png"}
    assert rows["train/a/again.png"].startswith("looks like test/a/brighter.png of test (cosine ")
    left = open_data(recipe.data.model_copy(update={"exclude": str(table)}), 0)
    assert len(left.train) == len(open_data(recipe.data, 0).train) - 2
    assert len(left.test) == 3
    other = tmp_path / "r.yaml"
    for words, says in (([*line, str(other)], "no table of data.exclude"), ([*line[:2], line[4], "x"], "no effect")):
        wrong = CliRunner().invoke(main, words)
        assert wrong.exit_code == 2
        assert says in " ".join(wrong.output.split())


def put_pairs(folder, names):
    """Photos of scenes, one of each and a brighter copy of some, in two classes."""
    put_scenes(folder, num_scenes=10, photos=1)
    for name in names:
        photo = next(folder.glob(f"*/{name}_0.png"))
        near_HW = (np.asarray(Image.open(photo)).astype(int) + 1).clip(0, 255).astype(np.uint8)
        Image.fromarray(near_HW).save(photo.with_name(f"{name}_again.png"))
    return folder


def of_folds(tmp_path, folds, **data):
    keys = {"source": "folder", "path": str(tmp_path / "data"), "validation_fraction": 0.0, **data}
    return small_recipe(
        tmp_path / "r.yaml",
        tmp_path,
        data=keys,
        evaluate={"folds": 2, **folds},
        backbone={"name": "resnet10t", "weights": "bundled"},
        probe={"kind": "ridge", "strengths": [1.0]},
    )


def near(tmp_path, *words):
    done = CliRunner().invoke(main, ["codes", str(tmp_path / "r.yaml"), "--near-duplicates", "0.999", *words])
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


def folds_by_name(recipe):
    """The folds of each image of a cross-validation, repeat by repeat."""
    data = open_data(recipe.data, recipe.seed, fold=Fold(recipe.evaluate.folds, recipe.evaluate.repeats, None))
    names = [PurePath(data.train.where(i)).stem for i in range(len(data.train))]
    return dict(zip(names, data.folds.folds_RN.T.tolist(), strict=True))


@pytest.mark.parametrize("repeats", [1, 3])
def test_images_of_two_folds_that_look_alike_are_shown_and_written(repeats, tmp_path):
    scenes = [f"scene{number}" for number in range(8)]
    put_pairs(tmp_path / "data", scenes)
    recipe = of_folds(tmp_path, {"repeats": repeats})
    folds = folds_by_name(recipe)
    apart = [name for name in scenes if folds[f"{name}_0"] != folds[f"{name}_again"]]
    assert apart
    assert repeats == 3 or len(apart) < 8
    shown = near(tmp_path, "--near-duplicates-to", str(tmp_path / "alike.csv"))
    assert f"{2 * len(apart)} of 18 images of the folds look like one in another fold: the cosine of their" in shown
    assert {name for name in scenes if re.search(rf"[01]\.\d+ \w/{name}_\w+.png \w/{name}_\w+.png", shown)} == {*apart}
    assert shown.count("_again.png") == len(apart)  # each pair once
    # Folds are drawn anew without these, so that pairs within one fold are in the table too.
    rows = dict(read_excluded(tmp_path / "alike.csv"))
    assert {PurePath(path).stem for path in rows} == {f"{name}_again" for name in scenes}
    assert all(
        re.fullmatch(r"looks like \w/scene\d_0.png of the folds \(cosine [01]\.\d+\)", why) for why in rows.values()
    )
    of_folds(tmp_path, {"repeats": repeats}, exclude=str(tmp_path / "alike.csv"))
    assert "0 of 10 images of the folds look like one in another fold" in near(tmp_path)
    last = near(tmp_path, "--near-duplicates-to", str(tmp_path / "none.csv"))
    assert "none.csv' is not written: no images of two folds, or of a fold and test, look alike" in last


def test_images_of_one_group_may_look_alike_and_a_given_test_split_is_compared_with_the_folds(tmp_path):
    train = put_pairs(tmp_path / "data" / "train", ["scene0", "scene1", "scene2"])
    for split, scene, seed in (("validation", 3, 1), ("test", 2, 2)):
        for photo in [*put_scenes(tmp_path / split, num_scenes=4, photos=1, seed=seed).glob("*/*.png")]:
            place = tmp_path / "data" / split / photo.parent.name / f"{split}{photo.name}"
            place.parent.mkdir(parents=True, exist_ok=True)
            photo.rename(place)
        photo = next(train.glob(f"*/scene{scene}_0.png"))
        photo_HW = (np.asarray(Image.open(photo)).astype(int) + 2).clip(0, 255).astype(np.uint8)
        Image.fromarray(photo_HW).save(tmp_path / "data" / split / photo.parent.name / f"{split}copy{scene}.png")
    of_folds(tmp_path, {}, group_regex=r"/(scene\d+|validation\w+\d|test\w+\d)")
    shown = near(tmp_path, "--near-duplicates-to", str(tmp_path / "alike.csv"))
    assert "1 of 5 images of test look like one of the folds: the cosine of their codes" in shown
    assert re.search(r" of 18 images of the folds look like one in another fold", shown)
    rows = dict(read_excluded(tmp_path / "alike.csv"))
    assert {PurePath(path).stem for path in rows} == {"scene2_0", "scene2_again", "validationcopy3"}
    whys = {PurePath(path).stem: why for path, why in rows.items()}
    assert "testcopy2.png of test" in whys["scene2_0"]
    assert "scene3_0.png of the folds" in whys["validationcopy3"]
