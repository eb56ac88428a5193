"""Mean and deviation of channels that no network knows: of training images alone, and kept by a run that goes on."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import tlscale
from tests.small_runs import result, small_recipe
from tlscale.data.sources.folds import Fold
from tlscale.training.fold_parts import Part
from tlscale.training.setup import set_up

BANDS = {"name": "test_resnet", "weights": "none", "in_chans": 5}


@pytest.fixture(scope="module")
def bands(tmp_path_factory):
    """Two classes of 16 arrays of 5 channels, of very unlike brightness, and a test split that is black."""
    root, draws = tmp_path_factory.mktemp("bands"), np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 4)):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                image_HWC = draws.uniform(0, 1, (32, 32, 5)) * draws.uniform(200, 4000)
                np.save(root / split / name / f"{number}.npy", (image_HWC * (split == "train")).astype(np.uint16))
    return root


@pytest.fixture
def recipe(bands, tmp_path):
    def make(**changes):
        data = {"source": "folder", "range": [0, 4000], "validation_fraction": 0.25, **changes.pop("data", {})}
        keys = {"duration": "3 steps", "batch_size": 8, "backbone": BANDS, **changes}
        return small_recipe(tmp_path / "r.yaml", bands, data=data, **keys)

    return make


def mean_of(split):
    return np.mean([np.load(split.file_of(i)).mean((0, 1)) for i in range(len(split))], axis=0) / 4000


def assert_of_training(setup):
    np.testing.assert_allclose(setup.spec.mean, mean_of(setup.data.train), atol=1e-4)
    return setup.spec.mean


def test_no_image_that_is_held_out_has_a_part_in_them(recipe):
    setup = set_up(recipe(), world_size=1)
    assert len(setup.data.train) == 24
    whole = (24 * mean_of(setup.data.train) + 8 * mean_of(setup.data.validation)) / 32
    assert np.abs(np.subtract(assert_of_training(setup), whole)).min() > 0.002, "else the test could not tell"
    limited = set_up(recipe(data={"train_limit": 16}), world_size=1)
    assert assert_of_training(limited) != setup.spec.mean


def test_each_fold_has_its_own(recipe):
    folds = recipe(evaluate={"folds": 2})
    parts = [set_up(folds, world_size=1, part=Part(Fold(2, 1, number))) for number in (1, 2, None)]
    assert len({assert_of_training(part) for part in parts}) == 3


def test_a_run_that_goes_on_keeps_what_it_measured(recipe, tmp_path):
    """As one of an older version, which measured the held-out images as well; its model is used with the same."""
    out, then = tmp_path / "run", [0.11, 0.12, 0.13, 0.14, 0.15]
    tlscale.run(recipe(), out)
    info = json.loads((out / "run.json").read_text())
    info["input"] |= {"mean": then, "std": [0.2] * 5}
    (out / "run.json").write_text(json.dumps(info))
    (out / "result.json").unlink()
    tlscale.run(recipe(), out, resume=True)
    model = tlscale.load(out)
    assert (list(model.input_spec.mean), list(model.input_spec.std)) == (then, [0.2] * 5)
    again = tlscale.evaluate(out)
    assert (again["loss"], again["top1"]) == (pytest.approx(result(out)["loss"]), result(out)["top1"])
    assert torch.isfinite(torch.tensor(again["loss"]))
