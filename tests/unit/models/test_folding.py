"""Norms become part of the convolutions before them, where that changes nothing but the time."""

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from tests.small_models import noise, state_of
from tlscale.errors import ModelError
from tlscale.models.features import LayerCodes, stages
from tlscale.models.folding import fold_norms

# name -> (keys, norms folded, norms left)
FAMILIES = {
    "resnet18": ({}, 20, 0),
    "test_resnet": ({}, 15, 0),
    "test_efficientnet": ({}, 13, 0),
    "mobilenetv3_small_050": ({}, 34, 0),
    # Its first norm and the second of each layer follow a convolution; the first of each layer and transition do not.
    "densenet121": ({"block_config": (2, 2), "growth_rate": 8}, 5, 6),
    "preact": ({}, 1, 2),
    "test_convnext": ({}, 0, 0),
}


class Preact(nn.Module):
    """Norm before convolution; a convolution that two read; and one that is used twice."""

    def __init__(self):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), BatchNormAct2d(4)
        self.conv3, self.norm3 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, images):
        x = self.conv1(self.norm1(images))
        x = self.norm2(self.conv2(x)) + x
        y = self.conv3(x)
        return (y + self.norm3(y)).mean((2, 3))


def backbone(name) -> nn.Module:
    """With statistics and weights that make each norm matter."""
    torch.manual_seed(0)
    network = Preact() if name == "preact" else timm.create_model(name, num_classes=0, **FAMILIES[name][0])
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
    return network.eval()


def norms_in(network):
    return sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())


def difference(one, two):
    return float((one - two).abs().max() / one.abs().max())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_codes_with_fewer_norms(name):
    network, images = backbone(name), noise()
    before = state_of(network)
    folded, names = fold_norms(network)
    assert (len(names), norms_in(folded)) == FAMILIES[name][1:]
    assert not folded.training
    with torch.no_grad():
        assert difference(network(images), folded(images)) < 1e-5
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "densenet121"])
def test_every_layer_keeps_its_name_and_its_codes(name):
    """Stages, norms, and convolutions, which are what folding changes if nobody says that they are wanted."""
    network, images = backbone(name), noise()
    convs = [key for key, module in network.named_modules() if isinstance(module, nn.Conv2d)][:3]
    norms = [key for key, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)][:3]
    wanted = [(layer, "avg") for layer in (*stages(network), *convs, *norms)]
    folded, names = fold_norms(network, keep=[layer for layer, _ in wanted])
    assert 0 < len(names) < FAMILIES[name][1]
    with torch.no_grad():
        plain, ours = LayerCodes(network, wanted)(images), LayerCodes(folded, wanted)(images)
        changed = LayerCodes(fold_norms(network)[0], [(convs[0], "avg")])(images)
    for (layer, _), one, two in zip(wanted, plain, ours, strict=True):
        assert difference(one, two) < 1e-5, layer
    assert difference(plain[len(stages(network))], changed[0]) > 0.01


def test_a_sequence_that_ends_in_the_convolution():
    """test_resnet's stem is a sequence of layers; its norm lies outside of it."""
    network, images = backbone("test_resnet"), noise()
    folded, names = fold_norms(network, keep=["conv1"])
    assert len(names) == FAMILIES["test_resnet"][1] - 1
    with torch.no_grad():
        one, two = (LayerCodes(net, [("conv1", "avg")])(images)[0] for net in (network, folded))
    assert difference(one, two) < 1e-5


def test_weights_that_are_standardised_on_use_are_left_alone():
    network = timm.create_model("test_nfnet", num_classes=0)
    assert fold_norms(network)[1] == ()


class Deciding(nn.Module):
    def forward(self, images):
        return images if images.sum() > 0 else -images


def test_a_network_that_cannot_be_traced():
    with pytest.raises(ModelError, match=r"codes.fold_norm: Deciding cannot be traced \(.*\); set it to false"):
        fold_norms(Deciding())
