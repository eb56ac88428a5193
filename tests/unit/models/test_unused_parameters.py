"""Every parameter that is trained gets a gradient, so that no process waits for one; or several processes refuse."""

import copy

import pytest
import torch
from torch import nn

from tests.small_models import classifier
from tests.unit.models.test_partition import FAMILIES, HEAD, vgg
from tlscale.models.classifier import trains_on_one_image, unused_parameters


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "rule", "kept"), FAMILIES, ids=[f"{row[0]}-{len(row[2])}" for row in FAMILIES]
)
def test_every_family_trained_in_part_and_as_a_whole(name, size, rule, kept):
    """Training on codes gives a gradient to what the whole network gives one to: test_frontier.py."""
    network = vgg(rule) if name == "vgg11_bn" else classifier(name, image_size=size, freeze=[rule], head=HEAD)
    assert unused_parameters(network, in_chans=3, image_size=size) == []
    network.requires_grad_(True)
    assert unused_parameters(network, in_chans=3, image_size=size) == []


def test_a_parameter_without_a_part_in_it_is_found_and_the_network_left_as_it_was():
    network = classifier(freeze=[r"layer1\..*"])
    network.backbone.spare = nn.Linear(2, 2)
    network.backbone.frozen_spare = nn.Linear(2, 2).requires_grad_(False)
    before, state = copy.deepcopy(network), torch.get_rng_state()
    assert unused_parameters(network, in_chans=3, image_size=32) == ["spare.weight", "spare.bias"]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(param.grad is None for param in network.parameters())
    for one, other in zip(network.state_dict().values(), before.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_batch_norm_does_not_train_on_one_image_where_it_has_one_value_a_channel():
    assert trains_on_one_image(classifier("test_vit"), in_chans=3, image_size=32)
    assert trains_on_one_image(classifier("test_resnet"), in_chans=3, image_size=64)
    network = classifier("test_vit", head=({"linear": 8}, "batchnorm", "linear"))
    before = copy.deepcopy(network)
    assert not trains_on_one_image(network, in_chans=3, image_size=32)
    assert network.training
    for one, other in zip(network.state_dict().values(), before.state_dict().values(), strict=True):
        assert torch.equal(one, other)
