"""The test of a difference of mean average precision: no difference is found where there is none, and one is found."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tlscale.commands.paired_label_sets import difference_of_maps
from tlscale.commands.paired_tests import paired_test, read_scored
from tlscale.training.label_set_metrics import LabelFigures

CLASSES = ["a", "b", "c"]


def made(draws, num_images=60, *, noise=(1.5, 1.5), shared=1.0, photos=1):
    """Labels, and the scores of two runs that err alike: by noise of the image, and by noise of their own."""
    num_units = num_images // photos
    labels_NC = np.repeat(draws.random((num_units, 3)) < (0.5, 0.3, 0.2), photos, axis=0)
    of_image_NC = np.repeat(draws.normal(size=(num_units, 3)), photos, axis=0) * shared
    own = [np.repeat(draws.normal(size=(num_units, 3)), photos, axis=0) * size for size in noise]
    return labels_NC, [1 / (1 + np.exp(-(2.0 * labels_NC + of_image_NC + one_NC))) for one_NC in own]


def figures_of(labels_NC, scores_NC):
    return LabelFigures(scores_NC, labels_NC, np.zeros(len(labels_NC)))


def difference_of(labels_NC, scores, units_N=None):
    units_N = np.arange(len(labels_NC)) if units_N is None else units_N
    one, other = (figures_of(labels_NC, scores_NC) for scores_NC in scores)
    return difference_of_maps([(one, other)], [units_N], int(units_N.max()) + 1)


def put(folder, labels_NC, scores_NC, *, groups=None, offset=0, repeats=1):
    folder.mkdir(parents=True, exist_ok=True)
    count = len(labels_NC) // repeats
    logits = np.log(scores_NC / (1 - scores_NC)).astype(np.float32)
    names = [[name for name, has in zip(CLASSES, row, strict=True) if has] for row in labels_NC]
    columns = {
        "path": [f"{number}.png" for number in range(offset, offset + count)] * repeats,
        "row": [*range(offset, offset + count)] * repeats,
        "true_labels": names,
        "labels": names,
        "logits": logits.tolist(),
        **({} if groups is None else {"group": pa.array(groups, pa.string())}),
        **({} if repeats == 1 else {"repeat": np.repeat(np.arange(1, repeats + 1), count)}),
    }
    table = pa.table(columns).replace_schema_metadata({"tlscale": json.dumps({"classes": CLASSES})})
    pq.write_table(table, folder / "predictions.parquet")
    return read_scored(folder)


def test_the_standard_error_of_equally_good_runs_is_that_of_many_data_sets():
    """And so a difference of theirs is rarely called more than chance."""
    draws, found = np.random.default_rng(0), []
    for _ in range(25):
        found.append(difference_of(*made(draws, 40)))
    rejected = np.mean([one.p < 0.05 for one in found])
    assert rejected <= 0.2  # of 25 with p 0.05: at most 5 in 999 of 1,000 cases
    spread = np.std([one.value for one in found])
    errors = [(one.interval95[1] - one.interval95[0]) / 2 / 2.02 for one in found]  # 2.02: Student's t of 39
    assert 0.65 < np.mean(errors) / spread < 1.5


def test_a_better_run_is_found_and_the_same_run_is_not():
    draws = np.random.default_rng(1)
    labels_NC, scores = made(draws, 150, noise=(0.5, 4.0))
    found = difference_of(labels_NC, scores)
    assert found.value > 0.1
    assert found.p < 1e-3
    low, high = found.interval95
    assert 0 < low < found.value < high
    other = difference_of(labels_NC, scores[::-1])
    assert (other.value, other.p) == (-found.value, pytest.approx(found.p))
    same = difference_of(labels_NC, [scores[0], scores[0]])
    assert (same.value, same.interval95, same.p) == (0.0, None, 1.0)


def test_photos_of_one_patient_are_no_further_evidence():
    draws = np.random.default_rng(2)
    labels_NC, scores = made(draws, 40, noise=(1.0, 2.0))
    alone = difference_of(labels_NC, scores)
    labels_M3, scores_M3 = (np.repeat(part, 3, axis=0) for part in (labels_NC, np.stack(scores, axis=1)))
    tripled = labels_M3, [scores_M3[:, 0], scores_M3[:, 1]]
    grouped = difference_of(*tripled, np.repeat(np.arange(40), 3))
    assert grouped.value == pytest.approx(alone.value)
    assert grouped.p == pytest.approx(alone.p)
    assert difference_of(*tripled).p < alone.p  # as if each photo were another patient


def test_the_files_of_runs_are_paired_over_groups_seeds_and_repeats(tmp_path):
    labels_NC, scores = made(np.random.default_rng(3), 30, noise=(1.0, 2.0))
    one, other = (put(tmp_path / str(at), labels_NC, scores_NC) for at, scores_NC in enumerate(scores))
    pair = paired_test(30, "x", "y", [(one, other)])
    plain = difference_of(labels_NC, scores)
    assert (pair.num_images, pair.num_groups, pair.num_first_only) == (30, None, None)
    assert pair.difference == pytest.approx(plain.value, abs=1e-6)
    assert pair.p == pytest.approx(plain.p, rel=1e-3)
    assert paired_test(30, "x", "y", [(one, put(tmp_path / "b", ~labels_NC, scores[1]))]) is None
    # Groups that one of the two runs names are those of both.
    groups = [f"p{number // 3}" for number in range(30)]
    named = put(tmp_path / "c", labels_NC, scores[0], groups=groups)
    assert paired_test(30, "x", "y", [(named, other)]).num_groups == 10
    # Two seeds that hold out other images: those of both are drawn in both, or in none.
    labels_NC, scores = made(np.random.default_rng(5), 45, noise=(1.0, 2.0))
    seeds = [
        [
            put(tmp_path / f"{start}{at}", labels_NC[start:][:30], s[start:][:30], offset=start)
            for at, s in enumerate(scores)
        ]
        for start in (0, 15)
    ]
    both = paired_test(30, "x", "y", [tuple(runs) for runs in seeds])
    assert both.num_images == 45
    alone = [paired_test(30, "x", "y", [tuple(runs)]).difference for runs in seeds]
    assert both.difference == pytest.approx(np.mean(alone))
    # Answers of two repeats to the same images are no more images.
    labels_NC, scores = made(np.random.default_rng(3), 30, noise=(1.0, 2.0))
    twice = [
        put(tmp_path / f"r{at}", np.tile(labels_NC, (2, 1)), np.tile(s, (2, 1)), repeats=2)
        for at, s in enumerate(scores)
    ]
    repeated = paired_test(30, "x", "y", [(twice[0], twice[1])])
    assert (repeated.num_images, repeated.p) == (30, pytest.approx(pair.p, rel=1e-6))
    assert paired_test(30, "x", "y", [(twice[0], other)]) is None


def test_one_patient_tells_nothing_of_others_and_no_label_nothing_at_all():
    labels_NC, scores = made(np.random.default_rng(4), 12, noise=(0.1, 3.0))
    found = difference_of(labels_NC, scores, np.zeros(12, dtype=np.int64))
    assert (found.interval95, found.p) == (None, 1.0)
    assert difference_of(np.zeros_like(labels_NC), scores) is None
