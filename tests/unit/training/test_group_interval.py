"""The interval over groups: wider where images of a group agree, and a function of the counts alone."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tlscale.data.sources.open import ImageSplit
from tlscale.data.sources.stores import ArrayStore
from tlscale.data.sources.tables import LabelledTable
from tlscale.training.group_interval import group_interval
from tlscale.training.metrics import wilson
from tlscale.training.predictions import Predictions, read_predictions, write_predictions

GROUPS = st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6)), min_size=1, max_size=30).map(
    lambda rows: np.array([(min(hits, images), images) for hits, images in rows], dtype=np.int64)
)


@settings(deadline=None, max_examples=50)
@given(GROUPS, st.randoms())
def test_it_holds_the_share_and_no_order_matters(counts_G2, random):
    low, high = group_interval(*counts_G2.T)
    share = counts_G2[:, 0].sum() / counts_G2[:, 1].sum()
    assert 0 <= low <= share <= high <= 1
    order = list(range(len(counts_G2)))
    random.shuffle(order)
    assert group_interval(*counts_G2[order].T) == [low, high]


def test_groups_of_one_image_have_about_wilsons_interval():
    hits_G = np.repeat([1, 0], [160, 40])
    assert group_interval(hits_G, np.ones_like(hits_G)) == pytest.approx(wilson(160, 200), abs=0.01)


def test_groups_that_agree_within_count_as_one_image_each():
    hits_G = np.repeat([6, 0], [80, 20])
    assert group_interval(hits_G, np.full(100, 6)) == pytest.approx(wilson(80, 100), abs=0.015)


def test_the_interval_covers_the_truth_where_wilsons_does_not():
    draws, covered, by_images = np.random.default_rng(0), 0, 0
    for _ in range(100):
        chance_G = draws.choice([0.3, 1.0], 60)  # a group is hard or easy: 0.65 on average
        images_G = draws.integers(2, 10, 60)
        hits_G = draws.binomial(images_G, chance_G)
        low, high = group_interval(hits_G, images_G)
        covered += low <= 0.65 <= high
        plain = wilson(int(hits_G.sum()), int(images_G.sum()))
        by_images += plain[0] <= 0.65 <= plain[1]
    assert covered >= 88  # of 95 that are expected; standard deviation 2.2
    assert by_images < 85


@pytest.mark.parametrize(("hits_G", "as_images"), [([4, 2], (2, 2)), ([0, 0], (0, 2)), ([3], (0.75, 1))])
def test_groups_that_tell_nothing_of_each_other_are_as_few_images(hits_G, as_images):
    images_G = [4, 2][: len(hits_G)]
    assert group_interval(np.array(hits_G), np.array(images_G)) == wilson(*as_images)


def predictions_of(labels, answers, groups):
    table = LabelledTable(
        ArrayStore("x", np.zeros((len(labels), 1, 1), np.uint8), "x"),
        np.array(labels, dtype=np.int64),
        pa.array(groups, pa.large_string()),
    )
    rows_N = np.arange(2, len(labels), dtype=np.int64)  # not the whole table
    predictions = Predictions(ImageSplit("test", table, rows_N), ["a", "b"])
    logits_NC = torch.nn.functional.one_hot(torch.tensor(answers[2:]), 2).float()
    for positions_B in torch.tensor_split(torch.arange(len(rows_N)).flip(0), 3):
        predictions.add(positions_B, logits_NC[positions_B])
    return predictions


def test_predictions_count_by_group_and_name_the_groups(tmp_path):
    groups = ["x", "x", "x", "y", None, "y", "z", None]
    predictions = predictions_of([0, 0, 0, 1, 1, 0, 1, 0], [0, 0, 0, 1, 0, 1, 1, 0], groups)
    plain = {"top1": 0.8, "per_class": {name: {"accuracy_interval95": wilson(1, 2), "f1": 0.5} for name in "ab"}}
    figures = predictions.over_groups(plain)
    assert figures["top1"] == 0.8
    # x 1 of 1, y 1 of 2, z 1 of 1, and two alone: 0 and 1 of 1
    assert figures["top1_interval95"] == group_interval(np.array([1, 1, 1, 0, 1]), np.array([1, 2, 1, 1, 1]))
    assert figures["top1_interval95_by"] == {"groups": 5}
    # Of a x 1 of 1, y 0 of 1, and 1 of 1 alone; of b the others.
    of_a, of_b = (figures["per_class"][name] for name in "ab")
    assert of_a == {"accuracy_interval95": group_interval(np.array([1, 0, 1]), np.ones(3, np.int64)), "f1": 0.5}
    assert of_b["accuracy_interval95"] == group_interval(np.array([1, 1, 0]), np.ones(3, np.int64))
    assert plain["per_class"]["a"]["accuracy_interval95"] == wilson(1, 2), "left as it was"
    write_predictions(tmp_path / "p.parquet", predictions)
    assert read_predictions(tmp_path / "p.parquet")["group"].to_pylist() == groups[2:]
    assert read_predictions(tmp_path / "p.parquet", ("row",), if_there=("group", "none")).column_names == [
        "row",
        "group",
    ]
