"""Figures of all folds: copies that a fold's model was fitted to are counted, and repeats are no new images."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from tlscale.data.content import DIGEST
from tlscale.training.calibration import calibration_interval
from tlscale.training.out_of_fold import count_copies_outside
from tlscale.training.prediction_figures import ScoredImages


def test_copies_in_other_folds_of_the_repeat_are_counted_once():
    digests_N = np.array([bytes([content] * 16) for content in (1, 1, 1, 2, 2, 3)], dtype=DIGEST)
    table = pa.table({"fold": [1, 1, 2, 1, 1, 2, 3, 4, 4, 3, 4, 4]})
    assert count_copies_outside(table, digests_N, 2) == 3 + 5
    assert count_copies_outside(table.slice(0, 6), digests_N, 1) == 3


@pytest.mark.parametrize("groups", [None, [None, "a", None, "a", "b", "b", None, None]])
def test_answers_on_an_image_in_several_repeats_are_no_further_images(groups):
    rng = np.random.default_rng(0)
    answers = rng.integers(0, 2, 8).tolist()
    columns = {
        "true_label": [*"abababab"],
        "label": ["ab"[answer] for answer in answers],
        "probability": rng.uniform(0.5, 1, 8).tolist(),
        "row": [*range(8)],
        **({} if groups is None else {"group": groups}),
    }
    once = pa.table(columns).replace_schema_metadata({"tlscale": '{"classes": ["a", "b"]}'})
    repeats = [once.append_column("repeat", pa.array([number] * 8)) for number in (1, 2, 3)]
    one, all_three = ScoredImages.of(once), ScoredImages.of(pa.concat_tables(repeats))
    assert len(set(all_three.groups_N.tolist())) == (8 if groups is None else 6)
    intervals = [calibration_interval(s.confidence_N, s.is_hit_N, s.groups_N) for s in (one, all_three)]
    assert intervals[1] == pytest.approx(intervals[0], abs=0.02)
