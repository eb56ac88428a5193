"""What is left out is told by kind, one line each."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from PIL import Image

from tlscale.commands.new_recipe import describe_left_out
from tlscale.data.survey import survey
from tlscale.errors import DataError


def put_photos(folder):
    draws = np.random.default_rng(0)
    for label in ("ash", "oak"):
        (folder / label).mkdir(parents=True)
        for number in range(3):
            pixels = draws.integers(0, 256, (24, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{number}.png")
    return pixels


def test_reasons_of_one_kind_share_a_line_whatever_their_words(tmp_path):
    pixels = put_photos(tmp_path / "photos")
    whole = (tmp_path / "photos" / "ash" / "0.png").read_bytes()
    (tmp_path / "photos" / "ash" / "cut.png").write_bytes(whole[:-200])
    Image.fromarray(pixels).save(tmp_path / "photos" / "oak" / "cut.jpg")
    cut = tmp_path / "photos" / "oak" / "cut.jpg"
    cut.write_bytes(cut.read_bytes()[:-60])
    for name in ("copy of 1.png", "copy, which has another label.png"):
        (tmp_path / "photos" / "ash" / name).write_bytes((tmp_path / "photos" / "ash" / "1.png").read_bytes())
    lines = describe_left_out(survey(str(tmp_path / "photos"), tmp_path / "out.csv"))
    assert len(lines) == 2, lines
    assert any(line.startswith("left out  2:") and "damaged or cut short" in line for line in lines)
    assert any(line.startswith("left out  2:") and "equal to ash/" in line for line in lines)


@pytest.mark.parametrize("wrong", ["equal to train/ash/0.png", "damaged or cut short"])
def test_a_split_of_which_nothing_is_left_is_named_with_the_reason(tmp_path, wrong):
    put_photos(tmp_path / "photos" / "train")
    shutil.copytree(tmp_path / "photos" / "train", tmp_path / "photos" / "validation")
    if wrong.startswith("damaged"):
        for image in (tmp_path / "photos" / "validation").glob("*/*.png"):
            image.write_bytes(image.read_bytes()[:-200])
    with pytest.raises(DataError, match="none of the 6 validation images can be used") as caught:
        survey(str(tmp_path / "photos"), tmp_path / "out.csv")
    assert wrong in str(caught.value)
    assert "held out" in caught.value.remedy
    assert not (tmp_path / "out.csv").exists()


def test_training_images_that_are_all_in_the_test_are_missed_by_name(tmp_path):
    put_photos(tmp_path / "photos" / "train")
    shutil.copytree(tmp_path / "photos" / "train", tmp_path / "photos" / "test")
    with pytest.raises(DataError, match="none of the 6 train images can be used") as caught:
        survey(str(tmp_path / "photos"), tmp_path / "out.csv")
    assert "held out" not in caught.value.remedy
