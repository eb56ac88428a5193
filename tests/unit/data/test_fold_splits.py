"""Each image is held once a repeat, and then has no other part; no group is cut, within a fold too."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tlscale.data.sources.folds import Fold
from tlscale.data.sources.splits import choose_splits, number_source
from tlscale.data.sources.stores import ArrayStore, FileStore
from tlscale.data.sources.tables import Source, SourceSplit
from tlscale.errors import DataError
from tlscale.recipe.schema import DataSection
from tlscale.training.predictions import image_names

SECTION = {"source": "folder", "path": "p"}


def split_of(name, labels, groups=None) -> SourceSplit:
    paths_N = pa.array([f"{name}{row}.png" for row in range(len(labels))], pa.large_string())
    store = FileStore("data", paths_N, name, np.zeros((len(labels), 5), np.int64), 0)
    groups_N = None if groups is None else pa.array(groups, pa.large_string())
    return SourceSplit(name, store, ("a", "b"), np.array(labels, dtype=np.int64), None, groups_N)


def opened(splits, fold, seed=0, **keys):
    section = DataSection.model_validate({**SECTION, **keys})
    return choose_splits(section, number_source(section, Source("p", splits)), seed, fold=fold)


def rows(split) -> list[int]:
    return [] if split is None else split.rows_N.tolist()


groups_of = st.lists(st.tuples(st.integers(0, 1), st.integers(1, 4)), min_size=2, max_size=10)


@settings(deadline=None, max_examples=20)
@given(groups_of, st.booleans(), st.booleans(), st.integers(0, 2**40), st.integers(2, 4), st.integers(1, 2))
def test_parts_of_a_cross_validation(groups, has_groups, has_validation, seed, num_folds, num_repeats):
    groups = [*[(0, 2), (1, 2)] * 4, *groups]
    labels = [label for label, size in groups for _ in range(size)]
    names = [f"patient{number}" for number, (_, size) in enumerate(groups) for _ in range(size)]
    cut = len(labels) // 2 if has_validation else len(labels)
    while has_validation and names[cut] == names[cut - 1]:
        cut += 1  # no group in two splits of the source
    parts = {"train": slice(0, cut), **({"validation": slice(cut, None)} if has_validation else {})}
    splits = {role: split_of(role, labels[at], names[at] if has_groups else None) for role, at in parts.items()}
    splits["test"] = split_of("test", [0, 1], ["x", "y"] if has_groups else None)
    keys = {"group_regex": "a"} if has_groups else {}
    whole = Fold(num_folds, num_repeats, None)
    found = opened(splits, whole, seed, **keys).splits
    assert rows(found["train"]) == list(range(len(labels)))
    assert found["train"].labels_N.tolist() == labels
    assert len(found["test"]) == 2
    assert "validation" not in found
    held = Counter()
    for fold in whole.folds:
        found = opened(splits, fold, seed, **keys).splits
        own, inner, out = (rows(found[role]) for role in ("train", "validation", "test"))
        assert sorted(own + inner + out) == list(range(len(labels)))
        assert own
        assert inner
        assert found["test"].labels_N.tolist() == [labels[row] for row in out]
        if has_groups:
            assert sum(len({names[row] for row in part}) for part in (own, inner, out)) == len(set(names))
        held.update((fold.repeat, row) for row in out)
    assert held == Counter((repeat, row) for repeat in range(1, num_repeats + 1) for row in range(len(labels)))


def test_the_first_repeat_is_the_same_however_many_there_are():
    splits = {"train": split_of("train", [0, 1] * 10)}
    once, twice = (opened(splits, Fold(3, repeats, 2)).splits for repeats in (1, 2))
    assert rows(once["test"]) == rows(twice["test"])
    assert rows(once["validation"]) == rows(twice["validation"])
    assert rows(opened(splits, Fold(3, 2, 5)).splits["test"]) != rows(once["test"])


def test_a_limit_is_drawn_before_the_folds():
    splits = {"train": split_of("train", [0, 1] * 20)}
    limited = rows(opened(splits, Fold(3, 1, None), train_limit=12).splits["train"])
    assert len(limited) == 12
    held = [rows(opened(splits, Fold(3, 1, number), train_limit=12).splits["test"]) for number in (1, 2, 3)]
    assert sorted(sum(held, [])) == limited


def test_equal_images_of_train_and_validation_are_in_one_fold():
    splits = {role: split_of(role, [0, 1] * 6) for role in ("train", "validation")}
    contents = {"train": np.arange(12), "validation": np.arange(12)}
    section = DataSection.model_validate(SECTION)
    for number in (1, 2, 3):
        source = number_source(section, Source("p", splits))
        chosen = choose_splits(section, source, 0, contents=contents, fold=Fold(3, 1, number))
        of = {role: {row % 12 for row in rows(split)} for role, split in chosen.splits.items()}
        assert not of["test"] & (of["train"] | of["validation"])
        assert not of["validation"] & of["train"]


def test_nothing_is_held_out_within_a_fold_where_nothing_is_to_be_chosen():
    splits = {"train": split_of("train", [0, 1] * 6)}
    chosen = opened(splits, Fold(3, 1, 1), validation_fraction=0.0)
    assert set(chosen.splits) == {"train", "test"}
    assert "no validation split is held out within the fold" in chosen.notes[-1]


def test_images_of_pooled_splits_keep_their_names():
    splits = {"train": split_of("train", [0, 1, 0, 1]), "validation": split_of("val", [0, 1])}
    pool = opened(splits, Fold(2, 1, None)).splits["train"]
    assert image_names(pool, np.array([1, 4, 5, 0])) == ["train1.png", "val0.png", "val1.png", "train0.png"]
    labels_N = np.array([0, 1] * 2)
    in_memory = {
        role: SourceSplit(role, ArrayStore(f"{role}.idx", np.zeros((4, 2, 2), np.uint8), role), ("a", "b"), labels_N)
        for role in ("train", "validation")
    }
    pool = opened(in_memory, Fold(2, 1, None)).splits["train"]
    assert image_names(pool, np.array([3, 4])) == ["train.idx image 3", "validation.idx image 0"]
    assert pool.places() == ["0", "1", "2", "3"] * 2


def test_folds_that_cannot_be_drawn():
    splits = {"train": split_of("train", [0, 0, 0, 1])}
    for number in (None, 1):
        with pytest.raises(DataError, match="is in one of the images alone") as caught:
            opened(splits, Fold(2, 1, number))
        assert caught.value.key == "evaluate.folds"
    with pytest.raises(DataError, match="7 is more than the 4 images there are"):
        opened({"train": split_of("train", [0, 0, 1, 1])}, Fold(7, 1, None))


def test_what_train_and_validation_share_is_no_leak_where_they_are_pooled():
    splits = {role: split_of(role, [0, 1] * 6, list("aabbccddeeff")) for role in ("train", "validation")}
    splits = {role: replace(split, files_N=np.arange(12)) for role, split in splits.items()}
    splits["test"] = split_of("test", [0, 1], ["x", "y"])
    found = opened(splits, Fold(2, 1, 1), group_regex="a")
    assert found.groups.shared == ()
    assert not any("LEAK" in note for note in found.notes)
    names = [set(split.groups_N.to_pylist()) for split in found.splits.values()]
    assert sum(map(len, names)) == len(set.union(*names)) == 6
    with pytest.raises(DataError, match="6 groups are in both train and validation"):
        opened(splits, None, group_regex="a", validation_fraction=0.0)
    splits["test"] = split_of("test", [0, 1], ["x", "a"])
    with pytest.raises(DataError, match="1 group is in both train and test"):
        opened(splits, Fold(2, 1, 1), group_regex="a")
