"""Define LeNet-5, AlexNet, ZFNet and GoogLeNet, which timm does not have, in timm's registry.

Promise: layers, shapes and parameter counts are those of the papers, or the docstring of the network says where and
why they are not (tests hold the figures). `alexnet` and `googlenet` give the logits of torchvision's networks when
they are given torchvision's weights, under torchvision's names or ours. Images from 28 pixels upwards go through.

Parameter names are those of the papers' layers: `layer3.conv.weight`, `c3.conv.weight`, `fc6.fc.bias`. Weights begin
as He et al. (2015) have it before ReLU, and as its paper has it in LeNet-5; not as the Gaussians of width 0.01 of
Krizhevsky and Zeiler, who trained for 70 epochs and more.

Shapes: B images, O maps out, I maps in, L links.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, register_notrace_module
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import AlexNet_Weights, GoogLeNet_Weights

from tlscale.models.classic.staged import Stage, StagedNet

# The text of these classes, docstrings included, is in the digests of codes (`partition.fingerprint`): after an edit,
# codes of networks that are frozen in part are computed again.

# Maps of S2 that each map of C3 sees: LeCun et al. (1998), table 1.
C3_SEES = (
    *((0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 5), (0, 4, 5), (0, 1, 5)),
    *((0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5), (0, 3, 4, 5), (0, 1, 4, 5), (0, 1, 2, 5)),
    *((0, 1, 3, 4), (1, 2, 4, 5), (0, 2, 3, 5), (0, 1, 2, 3, 4, 5)),
)  # fmt: skip


def _layer(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


@register_notrace_module  # its window depends on the size of the map
class MaxPool(nn.Module):
    """Max pooling over 3 x 3 pixels, every 2; its window shrinks to a map that is smaller, so small images go through.

    Args:
        ceil_mode: whether a window may hang over the far edges of the map.
    """

    def __init__(self, ceil_mode: bool = False) -> None:
        super().__init__()
        self.ceil_mode = ceil_mode

    def forward(self, x: Tensor) -> Tensor:
        window = (min(3, x.shape[-2]), min(3, x.shape[-1]))
        return F.max_pool2d(x, window, 2, ceil_mode=self.ceil_mode)


# -- LeNet-5 ------------------------------------------------------------------------------------------------------


@register_notrace_module  # the margin depends on the size of the image
class Field(nn.Module):
    """Images smaller than `size` pixels in the middle of a field of that size, which their edges go on to fill."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (max(0, self.size - side) for side in x.shape[-2:])
        return F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2), mode="replicate")


class Squash(nn.Module):
    """A tanh(S a), so scaled that f(1) = 1 and f(-1) = -1: LeCun et al. (1998), equation 6 and appendix A."""

    def forward(self, x: Tensor) -> Tensor:
        return 1.7159 * torch.tanh(x * (2 / 3))


class Subsample(nn.Module):
    """The sum of each 2 x 2 pixels times a coefficient plus a bias, both trained, one of each a map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2) * (4 * self.weight[:, None, None]) + self.bias[:, None, None]


class LinkedConv(nn.Module):
    """A convolution in which each map sees only some of the maps below; what it does not see is no parameter.

    Args:
        sees: numbers of the maps in, one tuple a map out.
        kernel_size: pixels along one axis.
    """

    links_L: Tensor

    def __init__(self, sees: Sequence[Sequence[int]], kernel_size: int) -> None:
        super().__init__()
        self.shape_OI = (len(sees), max(itertools.chain(*sees)) + 1)
        self.kernel_size = (kernel_size, kernel_size)  # not asked of the weight, whose shape a tracer does not know
        links = [out * self.shape_OI[1] + seen for out, row in enumerate(sees) for seen in row]
        self.register_buffer("links_L", torch.tensor(links), persistent=False)
        self.weight = nn.Parameter(torch.empty(len(links), kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(len(sees)))

    def fan_ins(self) -> Tensor:
        """Count the inputs of the pixel that each link ends in: (L,)."""
        outs_L = self.links_L // self.shape_OI[1]
        return outs_L.bincount()[outs_L] * self.weight[0].numel()

    def forward(self, x: Tensor) -> Tensor:
        num_out, num_in = self.shape_OI
        nothing = self.weight.new_zeros(num_out * num_in, *self.kernel_size)
        full = nothing.index_copy(0, self.links_L, self.weight)
        return F.conv2d(x, full.view(num_out, num_in, *self.kernel_size), self.bias)


class LeNet5(StagedNet):
    """LeNet-5: LeCun, Bottou, Bengio, Haffner, Gradient-Based Learning Applied to Document Recognition (1998), II.B.

    As in the paper: images of 32 x 32, subsampling with trained coefficients, the links of table 1 between S2 and C3,
    C5 as a 5 x 5 convolution, the scaled tanh after each layer up to F6, initial weights uniform within 2.4 / fan-in;
    60,000 parameters. Instead of the ten fixed radial basis functions over F6 there is a linear classifier: they hold
    drawings of the ten digits. The paper puts digits of 28 pixels into the middle of its field, and so are smaller
    images here. For larger ones C5 has a map, as in the paper, and the map is pooled before F6.
    """

    def __init__(self, in_chans: int = 1, **keys: Any) -> None:
        first = {"field": Field(32), "conv": nn.Conv2d(in_chans, 6, 5), "squash": Squash()}
        stages = [
            Stage({"c1": _layer(**first)}, 6, 1),
            Stage({"s2": _layer(sample=Subsample(6), squash=Squash())}, 6, 2),
            Stage({"c3": _layer(conv=LinkedConv(C3_SEES, 5), squash=Squash())}, 16, 2),
            Stage({"s4": _layer(sample=Subsample(16), squash=Squash())}, 16, 4),
            Stage({"c5": _layer(conv=nn.Conv2d(16, 120, 5), squash=Squash())}, 120, 4),
        ]
        super().__init__(stages, in_chans=in_chans, hidden=84, **keys)

    def _neck(self, width: int) -> dict[str, nn.Module]:
        return {"f6": _layer(fc=nn.Linear(width, self.hidden), squash=Squash())}

    @staticmethod
    def _init_weights(layer: nn.Module) -> None:
        """Uniform within 2.4 / fan-in: appendix A."""
        if isinstance(layer, nn.Conv2d | nn.Linear):
            fan_ins = torch.tensor(float(layer.weight[0].numel()))
        elif isinstance(layer, LinkedConv):
            fan_ins = layer.fan_ins()[:, None, None]
        elif isinstance(layer, Subsample):
            fan_ins = torch.tensor(4.0)
        else:
            return
        with torch.no_grad():
            layer.weight.uniform_(-2.4, 2.4).div_(fan_ins)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


# -- AlexNet and ZFNet --------------------------------------------------------------------------------------------


class AlexNet(StagedNet):
    """AlexNet in one tower: Krizhevsky, One weird trick for parallelizing convolutional neural networks (2014).

    This is the network of torchvision, so its weights load: 61,100,840 parameters at 1000 classes. The paper of 2012
    (Krizhevsky, Sutskever, Hinton) has 60,965,224: filters 96, 256, 384, 384, 256 in two towers that meet at layer 3
    only, against 64, 192, 384, 256, 256 in one, and local response normalisation after layers 1 and 2. Dropout is where
    that paper has it, on the outputs of fc6 and fc7, at 0.5 there and at 0 here unless `drop_rate` says so. The map is
    pooled to 6 x 6 at any image size; at the paper's size it is 6 x 6 already.
    """

    grid = 6

    def __init__(self, in_chans: int = 3, hidden: int = 4096, **keys: Any) -> None:
        super().__init__(self._layers(in_chans), in_chans=in_chans, hidden=hidden, **keys)

    @staticmethod
    def _layers(in_chans: int) -> list[Stage]:
        pools = [MaxPool() for _ in range(3)]
        first = nn.Conv2d(in_chans, 64, 11, stride=4, padding=2)
        return [
            Stage({"layer1": _layer(conv=first, relu=nn.ReLU(), pool=pools[0])}, 64, 8),
            Stage({"layer2": _layer(conv=nn.Conv2d(64, 192, 5, padding=2), relu=nn.ReLU(), pool=pools[1])}, 192, 16),
            Stage({"layer3": _layer(conv=nn.Conv2d(192, 384, 3, padding=1), relu=nn.ReLU())}, 384, 16),
            Stage({"layer4": _layer(conv=nn.Conv2d(384, 256, 3, padding=1), relu=nn.ReLU())}, 256, 16),
            Stage({"layer5": _layer(conv=nn.Conv2d(256, 256, 3, padding=1), relu=nn.ReLU(), pool=pools[2])}, 256, 32),
        ]

    def _neck(self, width: int) -> dict[str, nn.Module]:
        return {
            "fc6": _layer(fc=nn.Linear(width, self.hidden), relu=nn.ReLU(), drop=nn.Dropout(self.drop_rate)),
            "fc7": _layer(fc=nn.Linear(self.hidden, self.hidden), relu=nn.ReLU()),
        }


class ZFNet(AlexNet):
    """ZFNet: Zeiler, Fergus, Visualizing and Understanding Convolutional Networks (2013), figure 3.

    AlexNet with 7 x 7 filters of stride 2 in layer 1 and a stride of 2 in layer 2: 62,357,608 parameters at 1000
    classes. The paper gives the sizes of maps (110, 55, 26, 13, 13, 13, 13, 6) but no paddings: these give those sizes.
    Nor does it give the constants of its contrast normalisation across maps: they are AlexNet's (k 2, n 5, alpha 1e-4,
    beta 0.75), the alpha not divided by n as torch does.
    """

    @staticmethod
    def _layers(in_chans: int) -> list[Stage]:
        pools = [MaxPool(ceil_mode=True) for _ in range(3)]
        norms = [nn.LocalResponseNorm(5, alpha=5 * 1e-4, beta=0.75, k=2.0) for _ in range(2)]
        first, second = nn.Conv2d(in_chans, 96, 7, stride=2, padding=1), nn.Conv2d(96, 256, 5, stride=2)
        return [
            Stage({"layer1": _layer(conv=first, relu=nn.ReLU(), pool=pools[0], norm=norms[0])}, 96, 4),
            Stage({"layer2": _layer(conv=second, relu=nn.ReLU(), pool=pools[1], norm=norms[1])}, 256, 16),
            Stage({"layer3": _layer(conv=nn.Conv2d(256, 384, 3, padding=1), relu=nn.ReLU())}, 384, 16),
            Stage({"layer4": _layer(conv=nn.Conv2d(384, 384, 3, padding=1), relu=nn.ReLU())}, 384, 16),
            Stage({"layer5": _layer(conv=nn.Conv2d(384, 256, 3, padding=1), relu=nn.ReLU(), pool=pools[2])}, 256, 32),
        ]


# -- GoogLeNet ----------------------------------------------------------------------------------------------------

# Filters: 1x1; 1x1 before 3x3, 3x3; 1x1 before 5x5, 5x5; 1x1 after pooling. Szegedy et al. (2014), table 1.
INCEPTIONS = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}


def _conv_bn(channels: int, filters: int, kernel_size: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels, filters, kernel_size, stride, padding=kernel_size // 2, bias=False)
    return _layer(conv=conv, bn=nn.BatchNorm2d(filters, eps=1e-3), relu=nn.ReLU())


class Inception(nn.Module):
    """Four branches side by side, their maps one after the other."""

    def __init__(self, channels: int, filters: tuple[int, int, int, int, int, int]) -> None:
        super().__init__()
        ones, before_threes, threes, before_fives, fives, pooled = filters
        self.branch1 = _conv_bn(channels, ones, 1)
        self.branch2 = nn.Sequential(_conv_bn(channels, before_threes, 1), _conv_bn(before_threes, threes, 3))
        self.branch3 = nn.Sequential(_conv_bn(channels, before_fives, 1), _conv_bn(before_fives, fives, 3))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), _conv_bn(channels, pooled, 1))
        self.num_chs = ones + threes + fives + pooled

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


class GoogLeNet(StagedNet):
    """GoogLeNet: Szegedy et al., Going Deeper with Convolutions (2014), table 1.

    In torchvision's form, so that its weights load: batch normalisation after each convolution in place of the
    paper's local response normalisation and biases, 3 x 3 filters where the paper has 5 x 5 (torchvision issue 906),
    and a last pooling of 2 x 2; 6,624,904 parameters at 1000 classes.

    The two auxiliary classifiers are left out: they were there to bring gradients to the lower layers, which batch
    normalisation does, and a recipe has one loss. A checkpoint's are dropped by `checkpoint_filter_fn`.

    torchvision's weights expect images of mean 0.5 and deviation 0.5 (its network makes such from images normalised as
    usual, by `transform_input`); here that is the mean and std of `pretrained_cfg`, and the network transforms nothing.
    """

    def __init__(self, in_chans: int = 3, **keys: Any) -> None:
        pools = [nn.MaxPool2d(3, stride=2, ceil_mode=True) for _ in range(3)]
        second = {"maxpool1": pools[0], "conv2": _conv_bn(64, 64, 1), "conv3": _conv_bn(64, 192, 3)}
        third, fourth = _inceptions(192, "3a", "3b"), _inceptions(480, "4a", "4b", "4c", "4d", "4e")
        last_pool = nn.MaxPool2d(2, stride=2, ceil_mode=True)
        stages = [
            Stage({"conv1": _conv_bn(in_chans, 64, 7, stride=2)}, 64, 2),
            Stage(second, 192, 4),
            Stage({"maxpool2": pools[1], **third}, 480, 8),
            Stage({"maxpool3": pools[2], **fourth}, 832, 16),
            Stage({"maxpool4": last_pool, **_inceptions(832, "5a", "5b")}, 1024, 32),
        ]
        super().__init__(stages, in_chans=in_chans, **keys)


def _inceptions(channels: int, *names: str) -> dict[str, nn.Module]:
    modules: dict[str, nn.Module] = {}
    for name in names:
        module = Inception(channels, INCEPTIONS[name])
        modules[f"inception{name}"], channels = module, module.num_chs
    return modules


# -- timm's registry ----------------------------------------------------------------------------------------------

_TORCHVISION_ALEXNET = {
    **{f"features.{number}": f"layer{layer}.conv" for layer, number in enumerate((0, 3, 6, 8, 10), start=1)},
    **{"classifier.1": "fc6.fc", "classifier.4": "fc7.fc", "classifier.6": "fc"},
}


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Turn torchvision's names into ours, drop auxiliary classifiers, leave what has our names as it is."""
    renamed = {}
    for name, tensor in state_dict.items():
        owner, _, last = name.rpartition(".")
        if not name.startswith(("aux1.", "aux2.")):
            renamed[f"{_TORCHVISION_ALEXNET[owner]}.{last}" if owner in _TORCHVISION_ALEXNET else name] = tensor
    return renamed


def _cfg(**keys: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (6, 6),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "layer1.conv",
        "classifier": "fc",
        **keys,
    }


_TORCHVISION = {"license": "bsd-3-clause", "origin_url": "https://github.com/pytorch/vision"}
default_cfgs = generate_default_cfgs(
    {
        # Mean and deviation of MNIST's training images: the paper's levels (-0.1 and 1.175) make them nearly 0 and 1.
        "lenet5.untrained": _cfg(
            num_classes=10,
            input_size=(1, 32, 32),
            pool_size=(1, 1),
            crop_pct=1.0,
            mean=(0.1307,),
            std=(0.3081,),
            first_conv="c1.conv",
        ),
        "alexnet.tv_in1k": _cfg(url=AlexNet_Weights.IMAGENET1K_V1.url, **_TORCHVISION),
        "zfnet.untrained": _cfg(),
        "googlenet.tv_in1k": _cfg(
            url=GoogLeNet_Weights.IMAGENET1K_V1.url,
            pool_size=(7, 7),
            mean=IMAGENET_INCEPTION_MEAN,
            std=IMAGENET_INCEPTION_STD,
            first_conv="conv1.conv",
            **_TORCHVISION,
        ),
    }
)


def _create(kind: type[StagedNet], variant: str, pretrained: bool, keys: dict[str, Any]) -> nn.Module:
    model: nn.Module = build_model_with_cfg(
        kind,
        variant,
        pretrained,
        feature_cfg={"out_indices": tuple(range(5)), "feature_cls": "getter"},
        pretrained_filter_fn=checkpoint_filter_fn,
        **keys,
    )
    return model


@register_model
def lenet5(pretrained: bool = False, **keys: Any) -> nn.Module:
    """Build LeNet-5; see `LeNet5`."""
    return _create(LeNet5, "lenet5", pretrained, keys)


@register_model
def alexnet(pretrained: bool = False, **keys: Any) -> nn.Module:
    """Build AlexNet in one tower; see `AlexNet`."""
    return _create(AlexNet, "alexnet", pretrained, keys)


@register_model
def zfnet(pretrained: bool = False, **keys: Any) -> nn.Module:
    """Build ZFNet; see `ZFNet`."""
    return _create(ZFNet, "zfnet", pretrained, keys)


@register_model
def googlenet(pretrained: bool = False, **keys: Any) -> nn.Module:
    """Build GoogLeNet with batch normalisation; see `GoogLeNet`."""
    return _create(GoogLeNet, "googlenet", pretrained, keys)
