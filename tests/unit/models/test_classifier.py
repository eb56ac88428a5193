"""Backbone and head as one: the names and depths that rules see, and gradient checkpointing that is proved to act."""

import pytest
import torch
from torch import nn

from tests.small_models import TINY, classifier, loss_of, noise, section, state_of
from tlscale.errors import ModelError
from tlscale.models.backbone import build_backbone
from tlscale.models.classifier import (
    Classifier,
    CodesClassifier,
    enable_gradient_checkpointing,
    feature_width,
    put_channels_last,
)
from tlscale.models.features import LayerCodes

# -- names and depth ----------------------------------------------------------------------------------------------


def test_names_are_timms_and_the_head_is_head():
    network = classifier(head=[{"linear": 6}, "relu", "linear"])
    names = list(network.rule_names())
    plain = [name for name, _ in build_backbone(section(), image_size=None, seed=0)[0].named_parameters()]
    assert names == [*plain, "head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias"]
    assert all(param is network.rule_names()[name] for name, param in network.backbone.named_parameters())


@pytest.mark.parametrize("name", [*TINY, "resnet10t"])
def test_depth_counts_layers_from_the_head(name):
    network = classifier(name, head=[{"linear": 6}, "linear"])
    depth = network.layer_depth()
    assert depth.keys() == network.rule_names().keys()
    assert {depth[n] for n in ("head.0.weight", "head.1.bias")} == {0}
    # timm counts what its own head has before the linear layer (a norm, a hidden layer) to the head.
    assert all(depth[n] >= 1 or n.startswith("head.") for n, _ in network.backbone.named_parameters())
    assert set(depth.values()) == set(range(max(depth.values()) + 1))
    first = f"{network.backbone.pretrained_cfg['first_conv']}.weight"
    assert depth[first] == max(depth.values())


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("test_resnet", ["conv1.0.weight", "layer1.0.conv1.weight", "layer3.0.conv1.weight", "layer4.0.conv1.weight"]),
        ("test_vit", ["patch_embed.proj.weight", *(f"blocks.{i}.mlp.fc1.weight" for i in range(6))]),
    ],
)
def test_depth_falls_towards_the_head(name, order):
    depth = classifier(name).layer_depth()
    depths = [depth[parameter] for parameter in order]
    assert depths == sorted(depths, reverse=True)
    assert len(set(depths)) == len(depths)


def test_never_decayed_is_by_rule_name():
    network = classifier("test_vit")
    assert network.never_decayed() & network.rule_names().keys() == {"pos_embed", "cls_token"}


def test_width_is_measured():
    for name, width in (("test_resnet", 96), ("mobilenetv3_small_050", 1024)):
        backbone, _ = build_backbone(section(name), image_size=None, seed=0)
        assert feature_width(backbone, in_chans=3, image_size=32) == width
        assert backbone.eval()(noise()).shape == (4, width)


def test_images_that_the_backbone_cannot_take():
    backbone, _ = build_backbone(section("inception_v3"), image_size=None, seed=0)
    wrong = r"InceptionV3 cannot take images of 32 x 32 pixels: .*Set data.image_size to a size"
    with pytest.raises(ModelError, match=wrong):
        feature_width(backbone, in_chans=3, image_size=32)


def test_a_backbone_that_gives_maps():
    with pytest.raises(ModelError, match=r"Conv2d gives \(1, 4, 30, 30\), not one vector an image"):
        feature_width(nn.Conv2d(3, 4, 3), in_chans=3, image_size=32)


# -- codes of any layer -------------------------------------------------------------------------------------------


def test_a_classifier_of_codes_trains_its_head_alone():
    network = classifier(drop_path_rate=0.5)
    codes = LayerCodes(network.backbone.requires_grad_(False), [("layer2", "avg")])
    ours = CodesClassifier(codes, nn.Linear(48, 5)).train()
    assert (ours.layer, ours.pool, ours.backbone) == ("layer2", "avg", network.backbone)
    before = state_of(ours)
    assert ours.head.training
    assert not any(module.training for module in ours.codes.modules())
    loss_of(ours, noise()).backward()
    assert {name for name, param in ours.named_parameters() if param.grad is not None} == {
        "head.0.weight",
        "head.0.bias",
    }
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())
    torch.testing.assert_close(ours(noise()), ours.head(codes(noise())[0]))


# -- gradient checkpointing ---------------------------------------------------------------------------------------


def gradients(network, images):
    torch.manual_seed(9)  # of dropout and stochastic depth
    loss_of(network, images).backward()
    found = {name: param.grad for name, param in network.named_parameters()}
    network.zero_grad(set_to_none=True)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TINY, "resnet10t", "mobilenetv3_small_050"])
@pytest.mark.parametrize("half_frozen", [False, True])
def test_checkpointing_acts_and_changes_nothing(name, half_frozen):
    """Gradients and batch statistics are those of the network without it, stochastic depth included."""
    keys = {"drop_path_rate": 0.3}
    plain, ours = classifier(name, **keys), classifier(name, **keys)
    if half_frozen:
        parameters = list(plain.backbone.named_parameters())
        frozen = {key for key, _ in parameters[: len(parameters) // 3]}
        for network in (plain, ours):
            for key in frozen:
                network.backbone.get_parameter(key).requires_grad_(False)
            network.train()
    enable_gradient_checkpointing(ours, in_chans=3, image_size=32)
    for step in range(2):
        expected, found = gradients(plain, noise(step)), gradients(ours, noise(step))
        for key, gradient in expected.items():
            assert (gradient is None and found[key] is None) or torch.equal(gradient, found[key]), key
    before, after = plain.state_dict(), ours.state_dict()
    for key, tensor in before.items():
        assert torch.equal(tensor, after[key]), key


def test_less_is_kept_for_the_backward_pass():
    def bytes_kept(network):
        kept = {}

        def keep(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        own = {param.untyped_storage().data_ptr() for param in network.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss_of(network, noise(count=8))
        return sum(size for pointer, size in kept.items() if pointer not in own)

    network = classifier("resnet10t")
    before = bytes_kept(network)
    enable_gradient_checkpointing(network, in_chans=3, image_size=32)
    assert bytes_kept(network) < 0.8 * before


@pytest.mark.parametrize("training", [True, False])
def test_the_proof_leaves_no_trace(training):
    network = classifier("resnet10t", drop_path_rate=0.3).train(training)
    before, modes = state_of(network), [module.training for module in network.modules()]
    torch.manual_seed(3)
    generator = torch.get_rng_state()
    enable_gradient_checkpointing(network, in_chans=3, image_size=32)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(param.grad is None for param in network.parameters())
    assert torch.equal(torch.get_rng_state(), generator)
    assert [module.training for module in network.modules()] == modes


def test_evaluation_moves_no_statistics():
    network = classifier("resnet10t")
    enable_gradient_checkpointing(network, in_chans=3, image_size=32)
    before = state_of(network)
    network.eval()(noise())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize(("name", "image_size"), [("inception_v3", 80), ("dla46_c", 32), ("hrnet_w18_small", 32)])
def test_architectures_that_do_not_checkpoint(name, image_size):
    network = classifier(name, image_size=image_size)
    with pytest.raises(ModelError, match=r"compute.gradient_checkpointing: \w+ does not recompute.*resnet.*vit"):
        enable_gradient_checkpointing(network, in_chans=3, image_size=image_size)


class Accepting(nn.Module):
    """An architecture that takes the switch and ignores it (as vgg does under `python -O`), or that asserts."""

    def __init__(self, asserts):
        super().__init__()
        self.asserts = asserts
        self.layer = nn.Linear(3, 4)

    def set_grad_checkpointing(self, enable=True):
        assert not (enable and self.asserts), "gradient checkpointing not supported"

    def forward(self, images):
        return self.layer(images.mean((2, 3)))


@pytest.mark.parametrize("asserts", [True, False])
def test_the_switch_is_not_believed(asserts):
    network = Classifier(Accepting(asserts), nn.Sequential(nn.Linear(4, 2)))
    with pytest.raises(ModelError, match="Accepting does not recompute anything"):
        enable_gradient_checkpointing(network, in_chans=3, image_size=8)


def test_nothing_to_checkpoint_in_a_frozen_backbone():
    network = classifier(freeze=[".*"])
    with pytest.raises(ModelError, match="gradient_checkpointing: has no effect: the whole backbone is frozen"):
        enable_gradient_checkpointing(network, in_chans=3, image_size=32)


def test_a_backbone_that_fails_without_a_word_is_named_with_what_to_change():
    backbone, _ = build_backbone(section("halonet26t"), image_size=None, seed=0)
    wrong = r"data\.image_size: ByobNet cannot take images of 64 x 64 pixels: AssertionError.*'halonet26t'.*such as 256"
    with pytest.raises(ModelError, match=wrong):
        feature_width(backbone, in_chans=3, image_size=64)


class Deep(nn.Module):
    """Has a weight of rank 5, as lambda layers have."""

    def __init__(self, *, in_forward: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1) if in_forward else nn.Conv3d(3, 4, 1)

    def forward(self, images):
        return self.conv(images).view(-1).view(len(images), -1)


@pytest.mark.parametrize("in_forward", [False, True])
def test_a_backbone_without_channels_last_is_named(in_forward):
    classifier = Classifier(Deep(in_forward=in_forward), nn.Sequential(nn.Linear(4, 2)))
    with pytest.raises(ModelError, match=r"^compute.channels_last: Deep cannot take the channels-last order: Runtime"):
        put_channels_last(classifier, in_chans=3, image_size=8)
