"""For each key of data, codes, loss and evaluate: a recipe in which it would do nothing, or why there is none.

A new key needs a row here. What the recipe alone tells is refused when it is read; what the data or the network tell is
refused before a run begins, by a test of its own.
"""

from __future__ import annotations

import pytest
import yaml

from tlscale.errors import RecipeError
from tlscale.recipe.load import load_recipe
from tlscale.recipe.schema_keys import all_keys

FOLDER = {"source": "folder", "path": "p"}
PROBED = {"probe": {"kind": "logistic"}}
# Key -> sections in which it does nothing.
REFUSED = {
    "data.path": {"data": {"source": "fashion_mnist", "path": "p"}},
    "data.config": {"data": {**FOLDER, "config": "a"}},
    "data.revision": {"data": {**FOLDER, "revision": "a"}},
    "data.image_column": {"data": {**FOLDER, "image_column": "a"}},
    "data.label_column": {"data": {**FOLDER, "label_column": "a"}},
    "data.label_separator": {"data": {"source": "manifest", "path": "p", "label_separator": ";"}},
    "data.label_columns": {"data": {"source": "manifest", "path": "p", "label_columns": ["a", "b"]}},
    "data.class_folder": {"data": {"source": "idx", "path": "p", "class_folder": "top"}},
    "data.group_column": {"data": {**FOLDER, "group_column": "a"}},
    "data.group_regex": {"data": {"source": "hub", "path": "p", "group_regex": "a"}},
    "data.groups_across_splits": {"data": {**FOLDER, "groups_across_splits": "allow"}},
    "data.exclude": {"data": {"source": "idx", "path": "p", "exclude": "a.csv"}},
    "data.fallback": {"data": {**FOLDER, "fallback": "sample"}},
    "data.augment": {"data": {**FOLDER, "augment": ["flip"]}, **PROBED},
    "data.sampling": {"data": {**FOLDER, "sampling": "balanced"}, **PROBED},
    "data.workers": {"data": {**FOLDER, "workers": 2}, **PROBED},
    "codes.keep": {"codes": {"keep": "never"}, **PROBED},
    "codes.pool": {"codes": {"pool": ["max"]}},
    "codes.views": {"codes": {"views": 2}},
    "codes.dtype": {"codes": {"keep": "never", "dtype": "float16"}},
    "codes.disk_gib": {"codes": {"keep": "always", "disk_gib": 1.0}},
    "codes.memory_mib": {"codes": {"keep": "never", "memory_mib": 1}},
    "codes.cache_gib": {"codes": {"keep": "never", "cache_gib": 1.0}},
    "loss.kind": {"loss": {"kind": "focal", "focal_gamma": 0.0}},
    "loss.focal_gamma": {"loss": {"focal_gamma": 1.0}},
    "loss.negative_gamma": {"loss": {"negative_gamma": 1.0}},
    "loss.negative_margin": {"loss": {"negative_margin": 0.1}},
    "loss.logit_adjustment": {"loss": {"logit_adjustment": 1.0}, **PROBED},
    "loss.label_smoothing": {"loss": {"label_smoothing": 0.1}, **PROBED},
    "loss.class_weights": {"loss": {"class_weights": {"a": 2.0, "b": 2.0}}},
    "evaluate.repeats": {"evaluate": {"repeats": 2}},
    "evaluate.every": {"evaluate": {"every": "2 epochs"}, **PROBED},
    "evaluate.batch_size": {"evaluate": {"batch_size": 2}, **PROBED},
    "evaluate.choose": {"evaluate": {"choose": "best"}, **PROBED},
    "evaluate.patience": {"evaluate": {"patience": 2}, **PROBED},
}
WITH_DATA = {
    "data.validation_split": "a name that is not there: test_split_names",
    "data.validation_fraction": "beside a given split: test_splits",
    "data.channels_first": "of images that are no arrays: test_idle",
    "codes.layer": "in training: cache_decision, test_probe_runs",
    "evaluate.select": "without validation images: test_idle",
    "evaluate.views": "crops of images that are shown whole: test_view_checks",
}
PASSES = {
    "data.source": "it is always read",
    "data.train_split": "it is always read",
    "data.test_split": "a name that is not there is no test split, which the result says",
    "data.task": "it says what labels are",
    "data.classes": "it is the order of the logits",
    "data.train_limit": "one size of a comparison may be all images",
    "data.on_bad_image": "it holds for images that may be damaged another time",
    "data.duplicates": "it holds for images that may have copies another time",
    "data.max_megapixels": "a limit, for images that may come",
    "data.image_size": "what is given may be what the backbone has",
    "data.interpolation": "images may be of the backbone's size",
    "data.crop_mode": "images may be square",
    "data.crop_pct": "images may be of the backbone's size",
    "data.range": "images may have 8 bits",
    "data.mean": "what is given may be what the backbone has",
    "data.std": "what is given may be what the backbone has",
    "data.cache_mib": "a limit",
    "evaluate.folds": "it is always read",
}


def written(path, sections):
    base = {"name": "a", "data": {"source": "fashion_mnist"}, "backbone": {"name": "resnet18"}}
    path.write_text(yaml.safe_dump({**base, **sections}))
    return path


@pytest.mark.parametrize("key", REFUSED)
def test_a_key_that_does_nothing_is_refused(key, tmp_path):
    with pytest.raises(RecipeError) as caught:
        load_recipe(written(tmp_path / "r.yaml", REFUSED[key]))
    assert f": {key}: " in str(caught.value)
    assert "no effect" in str(caught.value)


def test_each_key_was_thought_of():
    sections = ("data.", "codes.", "loss.", "evaluate.")
    keys = {key for key in all_keys() if key.startswith(sections)}
    rows = [*REFUSED, *WITH_DATA, *PASSES]
    assert set(rows) == keys
    assert len(rows) == len(set(rows))
