"""The classic architectures, ours and timm's, each through a whole run on real images: recipe in, model out."""

import shutil

import pytest
import timm
import torch

import tlscale
import tlscale.models.classic.networks  # noqa: F401 (registers its networks)
from tests.small_runs import result, small_recipe
from tlscale.models.features import LayerCodes, stages

# name: (pixels, what is frozen, least trainable parameters); Inception-v3 takes no less than 75 pixels
NETWORKS = {
    "lenet5": (28, None, 60_000),
    "alexnet": (64, r"layer.*|fc6\..*", 4096 * 4096),
    "zfnet": (64, r"(layer[1-5]|fc[67])\..*", 4096 * 10),
    "googlenet": (32, r"(conv|inception[34]).*", 1_000_000),
    "vgg11_bn": (32, r"features\..*|pre_logits\..*", 4096 * 10),
    "inception_v3": (75, r"(Conv2d|Mixed_[56]).*", 1_000_000),
    "resnet18": (32, None, 11_000_000),
}
# Their fully connected layers take many seconds to hash, to save and to write.
BIG = ("alexnet", "zfnet", "vgg11_bn")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long) if n in BIG else n for n in NETWORKS])
def test_a_recipe_runs_from_end_to_end(name, idx, tmp_path):
    image_size, freeze, least = NETWORKS[name]
    recipe = small_recipe(
        tmp_path / "recipe.yaml",
        idx,
        data={"image_size": image_size, "validation_fraction": 0.0},
        backbone={"name": name},
        **({"freeze": freeze} if freeze else {}),
        duration="2 steps",
        batch_size=8,
        optim={"lr": 1e-4},
    )
    tlscale.run(recipe, tmp_path / "run")
    outcome = result(tmp_path / "run")
    assert (outcome["steps"], outcome["num_images"], outcome["num_classes"]) == (2, 37, 10)
    assert 0 <= outcome["top1"] <= 1
    assert least <= outcome["trainable_params"] <= outcome["total_params"]
    assert (outcome["trainable_params"] == outcome["total_params"]) == (freeze is None)
    trained = tlscale.load(tmp_path / "run")
    assert type(trained.model) is type(timm.create_model(name, in_chans=1, num_classes=0))
    with torch.inference_mode():
        logits = trained.model(torch.zeros(3, 1, image_size, image_size))
    assert logits.shape == (3, 10)
    assert bool(logits.isfinite().all())
    shutil.rmtree(tmp_path / "run")  # half a gigabyte, some of them


@pytest.mark.parametrize("name", NETWORKS)
def test_every_stage_gives_codes(name):
    image_size = NETWORKS[name][0]
    backbone = timm.create_model(name, in_chans=1, num_classes=0)
    names = stages(backbone)
    assert len(names) >= 5
    assert names[-1] == "penultimate"
    module = LayerCodes(backbone, [(stage, "avg") for stage in names])
    with torch.no_grad():
        codes = module(torch.randn(2, 1, image_size, image_size))
    assert all(code.shape[0] == 2 and code.ndim == 2 and bool(code.isfinite().all()) for code in codes)
    assert all(float((code[0] - code[1]).abs().max()) > 0 for code in codes), "two images, two codes"
