"""Runs with LoRA: what lies before the first adapter is computed once, and the model has no adapters in the end."""

import pytest
import timm
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import tlscale
from tests.small_runs import as_after, assert_same_bits, exported, put_small_idx, small_recipe, tensors
from tlscale.errors import ModelError, RecipeError
from tlscale.recipe.strategies import derive, strategies_of

LORA = {
    "adapters": {"lora": {"layers": r"blocks\..*", "rank": 2}},
    "freeze": r"blocks\.[0123]\..*",
    "codes": {"keep": "always"},
    "evaluate": {"every": "1 epochs"},
    "checkpoint": {"every": "3 steps"},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return put_small_idx(tmp_path_factory.mktemp("data"))


@pytest.mark.slow
def test_a_run_ends_in_a_model_without_adapters_and_resumes_exactly(data, tmp_path):
    recipe = small_recipe(tmp_path / "lora.yaml", data, **LORA)
    whole = tmp_path / "whole"
    made = tlscale.run(recipe, whole)
    assert made["strategy"] == "lora"
    assert made["trainable_params"] < made["total_params"] / 10
    assert made["codes"], "what lies before the first adapter is computed once"
    model = timm.create_model(f"local-dir:{whole / 'model'}", pretrained=True)
    assert not [name for name in model.state_dict() if "lora" in name]
    start = timm.create_model("test_vit", num_classes=10, in_chans=1, img_size=32).state_dict()
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        name: tensor.shape for name, tensor in start.items()
    }
    saved = tensors(whole / "checkpoints" / "step_00000009" / "model.safetensors")
    assert {name.rpartition(".")[2] for name in saved if name.startswith("backbone.")} == {"lora_A", "lora_B"}
    again = as_after(3, whole, tmp_path / "again")
    tlscale.run(recipe, again, resume=True)
    assert_same_bits(exported(again), exported(whole))
    # A run that starts from it has its weights, and adapters of its own.
    changes = {**LORA, "backbone": {"weights": f"run:{whole}"}, "duration": "1 steps"}
    further = tlscale.run(small_recipe(tmp_path / "further.yaml", data, **changes), tmp_path / "further")
    assert further["strategy"] == "lora"


class PastItsLayer(VisionTransformer):
    """Reads the weight of a layer without calling it, as the attention of some networks does."""

    def __init__(self, **keys):
        super().__init__(**keys)
        self.mix = nn.Linear(self.embed_dim, self.embed_dim)

    def forward_features(self, x, **keys):
        return nn.functional.linear(super().forward_features(x, **keys), self.mix.weight)


default_cfgs = generate_default_cfgs({"past_its_layer.untrained": {"num_classes": 1000, "fixed_input_size": True}})


@register_model
def past_its_layer(pretrained=False, **keys):
    shape = {"embed_dim": 16, "depth": 2, "num_heads": 2}
    return build_model_with_cfg(PastItsLayer, "past_its_layer", pretrained, **shape, **keys)


def test_an_adapter_that_would_have_no_part_is_refused(data, tmp_path):
    changes = {"backbone": {"name": "past_its_layer"}, "adapters": {"lora": {"layers": "blocks.*|mix", "rank": 2}}}
    recipe = small_recipe(tmp_path / "r.yaml", data, **changes)
    with pytest.raises(ModelError, match="reads the weight of 'mix' without calling the layer") as error:
        tlscale.run(recipe, tmp_path / "run")
    assert error.value.key == "adapters.lora.layers"


def test_compare_has_it_beside_the_others(data, tmp_path):
    weights = {"name": "test_vit", "weights": "pretrained"}
    recipe = small_recipe(tmp_path / "lora.yaml", data, **LORA, backbone=weights)
    kept = {name: derive(recipe, name, early_layers=["blocks.2"]) for name in strategies_of(recipe)}
    assert [name for name, one in kept.items() if one.adapters is not None] == ["lora"]
    assert list(kept).index("lora") == list(kept).index("finetune") - 1
    plain = small_recipe(tmp_path / "plain.yaml", data, backbone=weights)
    assert "lora" not in strategies_of(plain)
    with pytest.raises(RecipeError, match="has none, which the strategy 'lora' is about"):
        derive(plain, "lora")
