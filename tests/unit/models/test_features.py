"""Codes of any layer of any backbone: the module's own output, pooled; what is unclear is an error, not a guess."""

import copy
import pickle

import pytest
import timm
import torch
from torch import nn

from tests.small_models import WrittenNetwork, noise, state_of
from tlscale.errors import ModelError
from tlscale.models.features import PENULTIMATE, LayerCodes, layer_names, stages
from tlscale.recipe.field_types import POOLS

# name -> (image size, keys): several ways to build a network, each small
FAMILIES = {
    "test_resnet": (64, {}),
    "test_vit": (64, {"img_size": 64}),
    "test_efficientnet": (64, {}),
    "test_convnext": (64, {}),
    "test_mambaout": (64, {}),  # channels last, and a first stage that is 16 x 16 x 16
    "swin_tiny_patch4_window7_224": (64, {"img_size": 64, "embed_dim": 24, "depths": (1, 1, 1, 1)}),  # channels last
    "densenet121": (64, {"block_config": (2, 2, 2), "growth_rate": 8}),
    "vgg11": (32, {"mlp_ratio": 1 / 64}),
    "inception_v3": (80, {}),
    "xception41": (64, {}),
    "mobilenetv3_small_050": (64, {}),
    "deit_tiny_distilled_patch16_224": (64, {"img_size": 64, "depth": 2}),  # two prefix tokens
    "xcit_nano_12_p16_224": (64, {"img_size": 64}),  # its class token comes after the blocks
    "levit_128s": (224, {}),
    "mixer_s32_224": (64, {"img_size": 64}),
    "twins_svt_small": (
        64,
        {"img_size": 64, "embed_dims": (16, 16, 16, 16), "num_heads": (1, 1, 1, 1)},
    ),  # lists in lists
    "mvitv2_tiny": (64, {"img_size": 64}),  # timm's list of stages names no modules
    "coat_lite_tiny": (64, {"img_size": 64, "embed_dims": (16, 16, 16, 16), "serial_depths": (1, 1, 1, 1)}),
}
SWIN = "swin_tiny_patch4_window7_224"


def backbone(name) -> nn.Module:
    """With weights and statistics that no fresh network has."""
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=0, **FAMILIES[name][1]).eval()
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.02 * torch.rand(tensor.shape))
    return network


def images_for(name, count=2):
    return noise(count=count, image_size=FAMILIES[name][0])


def codes_of(network, images, *wanted):
    with torch.no_grad():
        return LayerCodes(network, wanted)(images)


# -- the values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext", "test_vit", SWIN])
def test_every_stage_agrees_with_timms_intermediates(name):
    network, images = backbone(name), images_for(name)
    names = [layer.name for layer in layer_names(network)]
    with torch.no_grad():
        maps = network.forward_intermediates(images, intermediates_only=True, output_fmt="NCHW")
    maps = maps[-len(names) :]
    pooled = {
        "avg": lambda x: x.mean((2, 3)),
        "max": lambda x: x.amax((2, 3)),
        "avgmax": lambda x: torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1),
        "none": lambda x: x.flatten(1),
    }
    if name == "test_vit":  # 'none' of tokens is the tokens, in their order
        del pooled["none"]
    wanted = [(layer, pool) for layer in names for pool in pooled]
    found = codes_of(network, images, *wanted)
    assert len(maps) == len(names)
    for (layer, pool), codes in zip(wanted, found, strict=True):
        torch.testing.assert_close(codes, pooled[pool](maps[names.index(layer)]), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_stage_of_every_family(name):
    network, images = backbone(name), images_for(name)
    names = stages(network)
    assert len(names) >= 3
    assert names[-1] == PENULTIMATE
    layer_codes = LayerCodes(network, [(layer, "avg") for layer in names])
    rows = layer_codes.describe(images)
    with torch.no_grad():
        codes = layer_codes(images)
        expected = network(images)
    assert [(row.layer, row.width) for row in rows] == [
        (layer, c.shape[1]) for layer, c in zip(names, codes, strict=True)
    ]
    assert torch.equal(codes[-1], expected)
    assert all(c.shape[0] == 2 and c.dtype == torch.float32 and c.isfinite().all() for c in codes)
    for layer, row in zip(layer_names(network), rows, strict=False):
        assert layer.channels in (None, row.width)
        assert layer.stride in (None, row.stride)


def test_the_stages_of_long_images_agree_with_timms_intermediates():
    torch.manual_seed(0)
    keys = {"img_size": (64, 128)}
    swin = timm.create_model(SWIN, num_classes=0, **(FAMILIES[SWIN][1] | keys)).eval()
    for network in (backbone("test_resnet"), timm.create_model("test_vit", num_classes=0, **keys).eval(), swin):
        images = noise(count=2, image_size=(64, 128))
        names = [layer.name for layer in layer_names(network)]
        codes = LayerCodes(network, [(name, "avg") for name in names])
        with torch.no_grad():
            maps = network.forward_intermediates(images, intermediates_only=True, output_fmt="NCHW")[-len(names) :]
        for found, one, row in zip(codes(images), maps, codes.describe(images), strict=True):
            torch.testing.assert_close(found, one.mean((2, 3)), rtol=1e-5, atol=1e-5)
            assert row.stride == 64 // one.shape[2] == 128 // one.shape[3]


@pytest.mark.parametrize(("height", "width"), [(64, 96), (97, 50), (33, 260), (64, 64)])
def test_which_side_of_a_map_is_the_channels_follows_from_the_proportions(height, width):
    """Of layers that timm does not list; each halves the map and rounds up."""
    body = nn.Sequential(*(nn.Conv2d(3 if i == 0 else 5, 5, 3, stride=2, padding=1) for i in range(3)))

    class Last(nn.Module):
        def forward(self, x):
            return x.permute(0, 2, 3, 1)

    network = WrittenNetwork(lambda self, x: self.last(self.body(x)).mean((1, 2)), body=body, last=Last()).eval()
    images = noise(count=2, image_size=(height, width))
    for found, expected in zip(
        codes_of(network, images, ("body", "avg"), ("last", "avg")), [network(images)] * 2, strict=True
    ):
        torch.testing.assert_close(found, expected.detach())


def test_tokens():
    network, images = backbone("test_vit"), images_for("test_vit")
    with torch.no_grad():
        tokens = network.blocks[:2](network._pos_embed(network.patch_embed(images)))
    wanted = [("blocks.1", pool) for pool in ("token", "avg", "max", "none")]
    token, avg, largest, everything = codes_of(network, images, *wanted)
    assert tokens.shape == (2, 17, 64)
    torch.testing.assert_close(token, tokens[:, 0])
    torch.testing.assert_close(avg, tokens[:, 1:].mean(1))
    torch.testing.assert_close(largest, tokens[:, 1:].amax(1))
    torch.testing.assert_close(everything, tokens.flatten(1))


def test_all_prefix_tokens_are_left_out():
    name = "deit_tiny_distilled_patch16_224"
    network, images = backbone(name), images_for(name)
    avg, token, everything = codes_of(network, images, *(("blocks.1", pool) for pool in ("avg", "token", "none")))
    tokens = everything.view(2, 18, 192)
    torch.testing.assert_close(avg, tokens[:, 2:].mean(1))
    assert torch.equal(token, tokens[:, 0])


def test_prefix_tokens_are_counted_and_not_believed():
    """XCiT declares a class token and has none in its blocks; a patch embedding comes before it."""
    name = "xcit_nano_12_p16_224"
    network, images = backbone(name), images_for(name)
    avg, everything = codes_of(network, images, ("blocks.3", "avg"), ("blocks.3", "none"))
    torch.testing.assert_close(avg, everything.view(2, 16, 128).mean(1))
    with pytest.raises(ModelError, match="'blocks.3' has no class token. Use avg, max, avgmax or none"):
        codes_of(network, images, ("blocks.3", "token"))
    vit = backbone("test_vit")
    assert LayerCodes(vit, [("patch_embed", "none")]).describe(noise(count=2, image_size=64))[0].width == 16 * 64


def test_a_class_token_of_maps_and_vectors():
    for layer in ("layer2", PENULTIMATE):
        network = backbone("test_resnet")
        if layer == PENULTIMATE:  # its own pooling, whatever is asked for
            assert torch.equal(*codes_of(network, noise(), (layer, "token"), (layer, "avg")))
            continue
        with pytest.raises(ModelError, match="codes.pool: 'layer2' has no class token. Use avg"):
            codes_of(network, noise(), (layer, "token"))


def test_penultimate_is_after_the_convolution_behind_the_pool():
    network, images = backbone("mobilenetv3_small_050"), images_for("mobilenetv3_small_050")
    rows = LayerCodes(network, [("blocks.5", "avg"), (PENULTIMATE, "avg")]).describe(images)
    assert [row.width for row in rows] == [288, 1024]
    assert [row.stride for row in rows] == [32, None]


@pytest.mark.parametrize(("name", "layer"), [("test_resnet", "layer1.0.bn1"), ("vgg11", "features.0")])
def test_a_later_layer_that_works_in_place_changes_nothing(name, layer):
    network, images = backbone(name), images_for(name)
    kept = {}
    handle = network.get_submodule(layer).register_forward_hook(lambda m, a, value: kept.update(value=value.clone()))
    with torch.no_grad():
        network(images)
    handle.remove()
    assert kept["value"].min() < 0  # what a ReLU in place takes away
    none, largest = codes_of(network, images, (layer, "none"), (layer, "max"))
    assert torch.equal(none, kept["value"].flatten(1))
    assert torch.equal(largest, kept["value"].amax((2, 3)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_precision(dtype):
    network, images = backbone("test_resnet"), images_for("test_resnet")
    wanted = [("layer2", pool) for pool in ("avg", "max", "avgmax", "none")] + [(PENULTIMATE, "avg")]
    plain = codes_of(network, images, *wanted)
    for low, high in zip(codes_of(network.to(dtype), images.to(dtype), *wanted), plain, strict=True):
        assert low.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert (low - high).norm() < (1e-5 if dtype == torch.float64 else 0.05) * high.norm()


def test_channels_last_in_memory_is_no_other_layout():
    network, images = backbone("test_resnet"), images_for("test_resnet")
    wanted = [("layer2", pool) for pool in ("avg", "max", "none")]
    plain = codes_of(network, images, *wanted)
    network.to(memory_format=torch.channels_last)
    for one, two in zip(codes_of(network, images.to(memory_format=torch.channels_last), *wanted), plain, strict=True):
        torch.testing.assert_close(one, two)


# -- layouts that are not clear -----------------------------------------------------------------------------------


def test_a_map_as_wide_as_it_is_large():
    """test_mambaout's first stage is 16 x 16 x 16 at 64 pixels: timm declares which side is the channels'."""
    network = backbone("test_mambaout")
    kept = {}
    handle = network.stages[0].register_forward_hook(lambda m, a, value: kept.update(value=value.clone()))
    (codes,) = codes_of(network, images_for("test_mambaout"), ("stages.0", "avg"))
    handle.remove()
    assert kept["value"].shape == (2, 16, 16, 16)
    torch.testing.assert_close(codes, kept["value"].mean((1, 2)))
    with pytest.raises(ModelError, match=r"'stages.0.blocks.0' of MambaOut gives \(2, 16, 16, 16\), and which side"):
        codes_of(network, images_for("test_mambaout"), ("stages.0.blocks.0", "avg"))
    assert codes_of(network, noise(count=2), ("stages.0.blocks.0", "avg"))[0].shape == (2, 16)


def test_nothing_in_a_resnet_has_its_channels_last():
    network = backbone("test_resnet")
    images = noise(count=2, image_size=128)
    everything, avg = codes_of(network, images, ("layer1.0", "none"), ("layer1.0", "avg"))
    torch.testing.assert_close(avg, everything.view(2, 32, 32, 32).mean((2, 3)))


def test_windows_are_not_images():
    network, images = backbone(SWIN), images_for(SWIN)
    with pytest.raises(
        ModelError, match=r"'layers.0.blocks.0.attn' of SwinTransformer gives \(\d+, 49, 24\) for 2 ima"
    ):
        codes_of(network, images, ("layers.0.blocks.0.attn", "avg"))


def test_mixed_tokens_are_not_read_across():
    network, images = backbone("mixer_s32_224"), images_for("mixer_s32_224")
    with pytest.raises(ModelError, match=r"gives \(2, 512, 4\); which of these are positions .* is not known"):
        codes_of(network, images, ("blocks.0.mlp_tokens", "avg"))


# -- the pass -----------------------------------------------------------------------------------------------------


def counted(network):
    calls = {}
    for name, module in network.named_modules():
        module.register_forward_pre_hook(lambda m, a, name=name: calls.update({name: calls.get(name, 0) + 1}))
    return calls


def test_later_layers_are_not_computed_and_several_layers_cost_one_pass():
    network = backbone("test_resnet")
    calls = counted(network)
    layer_codes = LayerCodes(network, [("layer2", "avg"), ("layer1", "max"), ("layer2", "max")])
    with torch.no_grad():
        first = layer_codes(noise())
        assert calls[""] == calls["layer4"] == 1  # to the end, once
        second = layer_codes(noise())
    assert calls["layer2"] == calls["layer1"] == calls[""] == 2
    assert calls["layer3"] == calls["layer4"] == calls["global_pool"] == 1
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert [codes.shape[1] for codes in first] == [48, 32, 48]


def test_describe_looks_to_the_end_and_forward_need_not():
    network = backbone("test_resnet")
    layer_codes = LayerCodes(network, [("layer1", "avg"), (PENULTIMATE, "avg")])
    calls = counted(network)
    for _ in range(2):
        layer_codes.describe(noise(count=2))
    assert calls["layer4"] == 2


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_the_backbone_stays_as_it_is(name):
    network = backbone(name)
    before = state_of(network)
    layer_codes = LayerCodes(network, [(stages(network)[1], "avg")])
    with torch.no_grad():
        expected, features = layer_codes(images_for(name)), network(images_for(name))
        for copied in (copy.deepcopy(layer_codes), pickle.loads(pickle.dumps(layer_codes))):
            assert torch.equal(copied(images_for(name))[0], expected[0])
        assert torch.equal(network(images_for(name)), features)
    assert not any(module._forward_hooks for module in network.modules())
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())


def test_hooks_are_gone_after_an_error():
    network = backbone("test_resnet")
    with pytest.raises(RuntimeError):
        codes_of(network, noise(in_chans=1), ("layer2", "avg"))
    with pytest.raises(ModelError):
        codes_of(network, noise(), ("layer2", "token"))
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize("who", ["codes", "backbone"])
def test_always_in_eval_mode(who):
    """Batch statistics do not move, and a batch does not change an image's codes."""
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=0, drop_rate=0.5, drop_path_rate=0.5)
    layer_codes = LayerCodes(network, [("layer3", "avg"), (PENULTIMATE, "avg")])
    before = state_of(network)
    (layer_codes if who == "codes" else network).train()
    with torch.no_grad():
        both, single = layer_codes(noise(count=4)), layer_codes(noise(count=4)[:1])
    assert not any(module.training for module in layer_codes.modules())
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
    for many, one in zip(both, single, strict=True):
        torch.testing.assert_close(many[:1], one, rtol=1e-5, atol=1e-6)


def test_gradients_are_the_callers_affair():
    (codes,) = LayerCodes(backbone("test_resnet"), [("layer2", "avg")])(noise())
    assert codes.requires_grad


# -- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("layer22", r"ResNet has no layer 'layer22'. Did you mean 'layer2'.*Its stages: act1, layer1, .*penultimate"),
        ("layer_3", "Did you mean 'layer3'"),
        ("penultimat", "Did you mean 'penultimate'"),
        ("layer3.0.conv", r"Did you mean .*'layer3.0.conv1'"),
        ("stages.2", "has no layer 'stages.2'. Its stages: act1"),
        ("", "has no layer ''"),
        (
            "layer3.0.conv1.weight",
            r"'layer3.0.conv1.weight' of ResNet is a parameter or value.*module 'layer3.0.conv1'",
        ),
        ("layer3.0.bn1.running_mean", "Name the module 'layer3.0.bn1'"),
    ],
)
def test_a_layer_that_is_not_there(layer, message):
    with pytest.raises(ModelError, match=message):
        LayerCodes(backbone("test_resnet"), [("layer1", "avg"), (layer, "avg")])


def test_a_pool_that_is_not_there():
    with pytest.raises(ModelError, match=f"codes.pool: there is no 'mean'.* There are: {', '.join(POOLS)}"):
        LayerCodes(backbone("test_resnet"), [("layer1", "mean")])


def test_a_list_of_layers_is_not_a_layer():
    with pytest.raises(
        ModelError, match="'serial_blocks1' of CoaT is a list of layers. Name one of 'serial_blocks1.0'"
    ):
        LayerCodes(backbone("coat_lite_tiny"), [("serial_blocks1", "avg")])


class Odd(nn.Module):
    """One layer that runs twice, one that never runs, one that gives a pair, and one of five dimensions."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.act = nn.ReLU()
        self.unused = nn.Linear(4, 4)
        self.pair = Pair()
        self.deep = nn.Unflatten(1, (2, 2))

    def forward(self, images):
        first, second = self.pair(self.act(self.conv(images)))
        return self.act(self.deep(first).flatten(1, 2) + second).mean((2, 3))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Identity()

    def forward(self, x):
        return self.inner(x), x


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("act", "'act' of Odd runs more than once in a pass. Name a module around it"),
        ("unused", "Odd does not run its module 'unused' on its own, so it gives no codes"),
        ("pair", r"'pair' of Odd gives a tuple, not one tensor. Name a module in it \('pair.inner'\), or after it"),
        ("deep", r"'deep' of Odd gives \(4, 2, 2, 30, 30\) for 4 images: neither a map"),
    ],
)
def test_a_layer_without_codes(layer, message):
    with pytest.raises(ModelError, match=message):
        codes_of(Odd(), noise(), (layer, "avg"))
    with pytest.raises(ModelError, match=message):
        LayerCodes(Odd(), [(layer, "avg")]).describe(noise())


def test_a_backbone_without_any_list_of_stages():
    assert stages(Odd()) == ("conv", "unused", PENULTIMATE)
    assert codes_of(Odd(), noise(), ("pair.inner", "avg"))[0].shape == (4, 4)


def test_images_that_the_backbone_cannot_take():
    with pytest.raises(ModelError, match=r"InceptionV3 cannot take images of 16 x 16 pixels: .* Set it to a size"):
        LayerCodes(backbone("inception_v3"), [("Mixed_5d", "avg")]).describe(noise(image_size=16))


def test_a_penultimate_that_is_no_vector():
    with pytest.raises(ModelError, match=r"Conv2d gives \(4, 4, 30, 30\), not one vector an image"):
        codes_of(nn.Conv2d(3, 4, 3), noise(), (PENULTIMATE, "avg"))
