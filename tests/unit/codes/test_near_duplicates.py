"""Near duplicates by the cosine of codes: as one product of all images has them, whatever the blocks."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from tests.scenes import put_scenes
from tests.small_runs import small_recipe
from tlscale.cli import main
from tlscale.codes import near_duplicates as near_module
from tlscale.codes.near_duplicates import near_duplicates
from tlscale.data.sources.excluded import read_excluded
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
