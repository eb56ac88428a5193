"""New layers as the recipe lists them, initialised by seed and nothing else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.small_models import classifier, noise, state_of
from tlscale.errors import ModelError
from tlscale.models.heads import LAYERS as BUILDERS
from tlscale.models.heads import build_head, is_single_linear
from tlscale.recipe.field_types import HEAD_LAYERS

LAYERS = st.one_of(
    st.builds(lambda width: {"linear": width}, st.integers(1, 9)),
    st.builds(lambda p: {"dropout": p}, st.floats(0, 0.9)),
    st.sampled_from([name for name, kind in HEAD_LAYERS.items() if kind.number is None]),
)
KIND = {"linear": nn.Linear, "dropout": nn.Dropout, "layernorm": nn.LayerNorm, "batchnorm": nn.BatchNorm1d}


@settings(max_examples=50, deadline=None)
@given(
    layers=st.lists(LAYERS, max_size=6),
    in_features=st.integers(1, 12),
    num_classes=st.integers(2, 9),
    seed=st.integers(0, 2**63 - 1),
)
def test_any_list_of_layers_becomes_that_network(layers, in_features, num_classes, seed):
    layers = [*layers, "linear"]
    torch.manual_seed(1)
    head = build_head(layers, in_features=in_features, num_classes=num_classes, seed=seed)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again = build_head(layers, in_features=in_features, num_classes=num_classes, seed=seed)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(head.state_dict().values(), again.state_dict().values(), strict=True))
    assert len(head) == len(layers)
    for module, layer in zip(head, layers, strict=True):
        name, number = (layer, None) if isinstance(layer, str) else next(iter(layer.items()))
        if name in KIND:
            assert type(module) is KIND[name]
        else:
            assert type(module).__name__.lower() == name.replace("_", "")
        if name == "linear":
            assert module.out_features == (number or num_classes)
        if name == "dropout":
            assert module.p == number
    assert head(torch.randn(3, in_features)).shape == (3, num_classes)


def test_each_layer_of_recipes_has_a_builder():
    assert set(BUILDERS) == set(HEAD_LAYERS)


def test_a_layer_that_is_not_there_is_an_error_with_all_that_there_are():
    with pytest.raises(ModelError, match="no layer 'relo'. Did you mean 'relu'.* There are: linear, dropout, "):
        build_head(["relo", "linear"], in_features=4, num_classes=3, seed=0)


def test_another_seed_gives_other_weights():
    one, two = (build_head(["linear"], in_features=4, num_classes=3, seed=seed) for seed in (1, 2))
    assert not torch.equal(one[0].weight, two[0].weight)


def test_weights_are_those_of_plain_pytorch():
    torch.manual_seed(3)
    plain = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Dropout(0.2), nn.Linear(4, 3))
    head = build_head([{"linear": 4}, "relu", {"dropout": 0.2}, "linear"], in_features=6, num_classes=3, seed=3)
    assert str(head) == str(plain)
    assert all(torch.equal(a, b) for a, b in zip(head.state_dict().values(), plain.state_dict().values(), strict=True))


def test_the_head_differs_from_the_backbone_in_seed_and_comes_fresh():
    one, two = classifier(seed=0), classifier(seed=0)
    assert all(torch.equal(a, b) for a, b in zip(state_of(one).values(), state_of(two).values(), strict=True))
    assert one(noise()).shape == (4, 5)


@pytest.mark.parametrize(
    ("layers", "single"),
    [
        (["linear"], True),
        ([{"dropout": 0.1}, "linear"], True),
        ([{"dropout": 0.1}, {"dropout": 0.2}, "linear"], True),
        (["relu", "linear"], False),
        (["layernorm", "linear"], False),
        ([{"linear": 8}, "linear"], False),
        ([{"linear": 8}, {"dropout": 0.1}, "linear"], False),
    ],
)
def test_single_linear_is_what_timm_itself_would_build(layers, single):
    assert is_single_linear(layers) is single
