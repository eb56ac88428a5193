"""Tell of images that are in two splits, byte for byte, whatever their names are."""

from __future__ import annotations

from typing import Any

from tlscale.data.sources.duplicates import Shared, find_shared
from tlscale.data.sources.open import ImageData
from tlscale.training.predictions import image_names

_MOST_EXAMPLES = 5


def shared_images(data: ImageData) -> tuple[list[dict[str, Any]], list[str]]:
    """Return images that are in two splits, as `result.json` has them, and notes on them for people.

    It is for the end of a run: nothing is read for it, and what the run did not see is not compared.
    """
    plain, notes = [], []
    for shared in find_shared(data.splits):
        count, examples = len(shared.positions_M), _examples(shared)
        plain.append({"splits": [shared.one.name, shared.other.name], "num_images": count, "examples": examples})
        if shared.one is (data.test or data.validation):
            word, effect = "LEAK", f"figures on {shared.one.name} are too good"
        else:
            word, effect = "DUPLICATES", "they chose what was trained on them"
        notes.append(
            f"{word}: {count:,} of {len(shared.one):,} images of {shared.one.name} are, byte for byte, in "
            f"{shared.other.name} too: {effect} (such as {' = '.join(examples[0])})"
        )
    return plain, notes


def _examples(shared: Shared) -> list[list[str]]:
    some = slice(0, _MOST_EXAMPLES)
    names = image_names(shared.one, shared.positions_M[some]), image_names(shared.other, shared.others_M[some])
    return [[one, other] for one, other in zip(*names, strict=True)]
