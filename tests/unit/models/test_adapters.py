"""LoRA: new adapters change nothing, and trained ones are merged to what they computed."""

import copy
import signal
from functools import partial

import pytest
import timm
import torch
from torch import nn

from tests.forked import exit_code_of
from tlscale.errors import ModelError, RecipeError
from tlscale.models.adapters import LoraConv2d, LoraLinear, add_adapters, freezing_beside, merged, merged_weight
from tlscale.models.freeze import freeze_parameters
from tlscale.recipe.rules import Rule
from tlscale.recipe.sections.network import LoraSection

IMAGES = torch.linspace(-2, 2, 2 * 3 * 64 * 64).reshape(2, 3, 64, 64).sin()


def network(name):
    torch.manual_seed(3)
    size = {"img_size": 64} if name == "test_vit" else {}
    return timm.create_model(name, num_classes=0, **size).eval()


def adapted(name, layers=".*", **more):
    """The network, and a copy with adapters that have learned something."""
    plain = network(name)
    other = copy.deepcopy(plain)
    names = add_adapters(other, LoraSection(layers=layers, **{"rank": 2, **more}), [()], seed=0)
    return plain, other, names


def fill(model):
    """Give the adapters what they may have learned."""
    torch.manual_seed(4)
    for param_name, param in model.named_parameters():
        if param_name.endswith("lora_B"):
            nn.init.normal_(param, std=0.1)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_resnet", "test_efficientnet"])
def test_new_adapters_change_nothing_and_learned_ones_are_merged(name):
    plain, model, names = adapted(name)
    assert names
    with torch.no_grad():
        assert torch.equal(model(IMAGES), plain(IMAGES))
        assert torch.equal(model.train()(IMAGES), plain.train()(IMAGES))
        plain, model = plain.double().eval(), model.double()
        fill(model)
        before = copy.deepcopy(model.state_dict())
        for module in model.modules():  # each alone in training mode, beside norm layers that are not
            module.training = isinstance(module, LoraLinear | LoraConv2d)
        beside = model(IMAGES.double())
        in_eval = model.eval()(IMAGES.double())
        with merged(model):
            assert list(model.state_dict()) == list(plain.state_dict())
            assert {type(module) for module in model.modules()} == {type(module) for module in plain.modules()}
            whole = model(IMAGES.double())
    assert torch.equal(in_eval, whole)
    assert not torch.allclose(whole, plain(IMAGES.double()))
    torch.testing.assert_close(beside, whole, rtol=1e-9, atol=1e-9)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_a_failed_export_leaves_the_adapters():
    _, model, names = adapted("test_vit")
    with pytest.raises(OSError, match="full"), merged(model):
        raise OSError("full")
    assert all(isinstance(model.get_submodule(name), LoraLinear | LoraConv2d) for name in names)


def test_the_scale_is_alpha_over_the_rank():
    layer = nn.Sequential(nn.Linear(6, 5))
    add_adapters(layer, LoraSection(layers="0", rank=4, alpha=2.0), [()], seed=0)
    nn.init.ones_(layer[0].lora_B)
    by_hand = layer[0].weight + 0.5 * torch.ones(5, 4) @ layer[0].lora_A
    torch.testing.assert_close(merged_weight(layer[0]), by_hand)
    assert layer[0].lora_A.shape == (4, 6)


def test_a_only_the_seed_tells_apart():
    first, again, other = (nn.Sequential(nn.Conv2d(3, 8, 3)) for _ in range(3))
    for layers, seed in ((first, 1), (again, 1), (other, 2)):
        torch.rand(seed)  # whatever the global generator has given
        add_adapters(layers, LoraSection(layers="0"), [()], seed=seed)
    assert torch.equal(first[0].lora_A, again[0].lora_A)
    assert not torch.equal(first[0].lora_A, other[0].lora_A)
    assert not first[0].lora_B.any()


def test_what_is_frozen_in_all_stages_gets_none():
    model = network("test_vit")
    early, later = Rule(r"blocks\.0\..*", True), Rule(r"blocks\.[0-3]\..*", True)
    names = add_adapters(model, LoraSection(layers=r"blocks\..*qkv", rank=2), [[early], [later]], seed=0)
    assert names == [f"blocks.{number}.attn.qkv" for number in (1, 2, 3, 4, 5)]


def test_all_but_adapters_is_frozen_save_for_what_rules_exempt():
    _, model, _ = adapted("test_vit", r"blocks\.5\..*")
    rules = [Rule(r"norm\..*", False)]
    freeze_parameters(model, freezing_beside(model, rules))
    trained = {name for name, param in model.named_parameters() if param.requires_grad}
    assert {name for name in trained if "lora" not in name} == {"norm.weight", "norm.bias"}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert trained - {"norm.weight", "norm.bias"} == {
        f"blocks.5.{layer}.lora_{part}" for layer in layers for part in "AB"
    }
    assert freezing_beside(network("test_vit"), rules) == rules


@pytest.mark.parametrize(
    ("layers", "rank", "freeze", "message"),
    [
        ("blocks", 2, None, "'blocks' names no layer that takes an adapter, but 'blocks' (Sequential)"),
        (r"blocks\.0\.norm1", 2, None, "'blocks.0.norm1' (LayerNorm)"),
        (r"block\..*", 2, None, "names no layer (it has to match whole names)"),
        (r"blocks\.0\..*", 2, "blocks.*", "all of which 'freeze' freezes"),
        (r"blocks\.0\..*", 65, None, "65 is more than 'blocks.0.attn.qkv' has, whose weight is 192 x 64"),
    ],
)
def test_wrong_layers_are_named(layers, rank, freeze, message):
    rules = [Rule(freeze, True)] if freeze else []
    with pytest.raises(ModelError) as error:
        add_adapters(network("test_vit"), LoraSection(layers=layers, rank=rank), [rules], seed=0)
    assert message in str(error.value)


def test_a_depthwise_convolution_is_left_alone():
    _, model, names = adapted("test_convnext")
    left = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d) and module.groups > 1]
    assert left
    assert not set(left) & set(names)


@pytest.mark.parametrize("kind", [nn.Linear(6, 5), nn.Conv2d(4, 6, 3, stride=2, padding=1)])
def test_the_numbers_are_pefts(kind):
    peft = pytest.importorskip("peft")  # in no extra: it brings all of transformers along
    torch.manual_seed(0)
    mine = nn.Sequential(copy.deepcopy(kind))
    add_adapters(mine, LoraSection(layers="0", rank=3, alpha=6.0), [()], seed=0)
    fill(mine)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"])
    theirs = peft.inject_adapter_in_model(config, nn.Sequential(copy.deepcopy(kind)))
    with torch.no_grad():
        for part in "AB":
            getattr(theirs[0], f"lora_{part}")["default"].weight.copy_(getattr(mine[0], f"lora_{part}"))
        images = torch.randn(3, *([6] if isinstance(kind, nn.Linear) else [4, 9, 9]))
        torch.testing.assert_close(mine.train()(images), theirs(images), rtol=1e-5, atol=1e-6)


ENDLESS = r"((?:[a-z0-9_]+\.?)+)+#"


def refuse_endless(what: str) -> None:
    model = network("test_vit")
    layers, rules = (ENDLESS, []) if what == "layers" else (r"blocks\..*", [Rule(ENDLESS, True)])
    section = LoraSection(layers=layers, rank=2)
    if what == "freeze beside adapters":
        add_adapters(model, section, [[]], seed=0)
    match = freezing_beside if what == "freeze beside adapters" else partial(add_adapters, section=section, seed=0)
    with pytest.raises(RecipeError, match="takes more than 0.5 s"):
        match(model, rules) if match is freezing_beside else match(model, freezing=[rules])


@pytest.mark.parametrize("what", ["layers", "freeze beside layers", "freeze beside adapters"])
def test_an_expression_that_takes_for_ever_is_refused(what, monkeypatch):
    monkeypatch.setattr("tlscale.recipe.matching.LIMIT_S", 0.5)
    assert exit_code_of(lambda: refuse_endless(what), before=lambda: signal.alarm(60)) == 0


def test_rules_are_not_matched_where_there_are_no_adapters():
    """Whoever matches them later says that one takes for ever."""
    model = network("test_vit")
    rules = [Rule(ENDLESS, True)]
    assert exit_code_of(lambda: freezing_beside(model, rules), before=lambda: signal.alarm(30)) == 0
