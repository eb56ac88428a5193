"""Every wrong data folder gives one message with the place and the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recipes.wrong_data import WRONG_DATA, WrongData
from tlscale.data.decode import BadImageError, decode_image
from tlscale.data.sources.open import ImageData, open_data
from tlscale.errors import EXIT_BAD_INPUT, DataError
from tlscale.recipe.schema import DataSection


def decode_all(data: ImageData, section: DataSection) -> None:
    for split in filter(None, (data.train, data.validation, data.test)):
        for i in range(len(split)):
            cap = int(section.max_megapixels * 1e6)
            decode_image(split.read(i), in_chans=3, max_pixels=cap, where=split.where(i))


@pytest.mark.parametrize("wrong", WRONG_DATA, ids=lambda wrong: wrong.id)
def test_wrong_data_are_named(wrong: WrongData, tmp_path: Path):
    section = DataSection.model_validate(wrong.build(tmp_path))
    if wrong.at_decode:
        data = open_data(section, 0)
        with pytest.raises(BadImageError) as caught:
            decode_all(data, section)
    else:
        with pytest.raises(DataError) as caught:
            open_data(section, 0)
    message = str(caught.value)
    assert [fragment for fragment in wrong.fragments if fragment not in message] == [], message
    assert caught.value.exit_code == EXIT_BAD_INPUT
