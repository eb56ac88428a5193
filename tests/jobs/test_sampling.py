"""Classes of unequal sizes, drawn as often as is asked: on images and on codes, stopped and resumed."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

import tlscale
from tests.small_runs import When, assert_same_bits, exported, logged, small_recipe
from tlscale.errors import Stopped
from tlscale.training.setup import set_up

FOLDER = {"source": "folder", "image_size": 32, "validation_fraction": 0.2, "sampling": "balanced"}


@pytest.fixture(scope="module")
def unequal(tmp_path_factory):
    """Pictures of noise, darker of the rare class: 90 to 10, and a test split of 20 each."""
    folder, noise = tmp_path_factory.mktemp("unequal") / "pictures", np.random.default_rng(0)
    for role, counts in (("train", {"common": 90, "rare": 10}), ("test", {"common": 20, "rare": 20})):
        for name, count in counts.items():
            (folder / role / name).mkdir(parents=True)
            for number in range(count):
                pixels = noise.integers(0, 200 if name == "rare" else 256, (40, 40), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / role / name / f"{number:03}.png")
    return folder


def recipe_of(path, unequal, **changes):
    defaults = {"data": FOLDER, "batch_size": 16, "duration": "4 epochs", "log_every": "1 steps"}
    return small_recipe(path, unequal, **{**defaults, **changes})


def test_each_epoch_has_as_many_of_each_class(unequal, tmp_path):
    setup = set_up(recipe_of(tmp_path / "r.yaml", unequal), world_size=1)
    labels_N = setup.data.train.labels_N
    assert np.bincount(labels_N).tolist() == [72, 8]
    rows = np.concatenate([setup.order.rows(step) for step in range(setup.order.steps_per_epoch)])
    assert np.bincount(labels_N[rows]).tolist() == [40, 40]


@pytest.mark.parametrize("codes", [False, True])
def test_stopped_and_resumed_it_ends_in_the_same_weights(unequal, tmp_path, codes):
    data = {**FOLDER, "sampling": 0.5, "augment": ["flip", {"crop": 0.5}]}
    changes = {"freeze": ".*", "codes": {"views": 3, "keep": "always"}} if codes else {}
    recipe = recipe_of(tmp_path / "r.yaml", unequal, data=data, **changes)
    tlscale.run(recipe, tmp_path / "whole")
    out = tmp_path / "run"
    with When(logged(out, 7), lambda: os.kill(os.getpid(), signal.SIGTERM)), pytest.raises(Stopped):
        tlscale.run(recipe, out)
    tlscale.run(recipe, out, resume=True)
    assert_same_bits(exported(tmp_path / "whole"), exported(out))


def test_on_codes_an_image_has_the_views_that_it_has_on_images(unequal, tmp_path):
    """Views by an image's own count of uses: the rare ones come several times an epoch, each time otherwise."""
    data = {**FOLDER, "augment": ["flip", {"crop": 0.5}]}
    ends = []
    for keep in ("always", "never"):
        recipe = recipe_of(
            tmp_path / f"{keep}.yaml", unequal, data=data, freeze=".*", codes={"views": 3, "keep": keep},
            compute={"precision": "fp64"},
        )  # fmt: skip
        tlscale.run(recipe, tmp_path / keep)
        assert json.loads((tmp_path / keep / "run.json").read_text())["keeps_codes"]["0"] == (keep == "always")
        ends.append(exported(tmp_path / keep))
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], rtol=0, atol=1e-9, msg=name)
