"""What is left out is told by kind, one line each."""

from __future__ import annotations

import numpy as np
from PIL import Image

from tlscale.commands.new_recipe import describe_left_out
from tlscale.data.survey import survey


def test_reasons_of_one_kind_share_a_line_whatever_their_words(tmp_path):
    draws = np.random.default_rng(0)
    for label in ("ash", "oak"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(3):
            pixels = draws.integers(0, 256, (24, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / label / f"{number}.png")
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
