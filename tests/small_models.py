"""timm's tiny networks under a new head, and steps of training on noise."""

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

from tlscale.models.backbone import build_backbone
from tlscale.models.classifier import Classifier, feature_width
from tlscale.models.freeze import freeze_parameters
from tlscale.models.heads import build_head
from tlscale.recipe.image_size import height_width
from tlscale.recipe.schema import BackboneSection, Recipe

# Seven ways to build a network, each a few hundred thousand parameters; all take 32 pixels.
TINY = ("test_resnet", "test_vit", "test_efficientnet", "test_convnext", "test_nfnet", "test_byobnet", "test_mambaout")


_CFG = {"num_classes": 1000, "first_conv": "conv1", "classifier": "fc"}
default_cfgs = generate_default_cfgs({"per_image_resnet.untrained": _CFG, "spare_resnet.untrained": _CFG})
_SHAPE = {"block": BasicBlock, "layers": (1, 1, 1, 1), "channels": (16, 16, 24, 32)}


class PerImageResNet(ResNet):
    """A ResNet that brings each image to mean 0 and standard deviation 1; an image of one colour becomes NaN."""

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        std, mean = torch.std_mean(x, dim=(1, 2, 3), keepdim=True)
        return super().forward_features((x - mean) / std)


@register_model
def per_image_resnet(pretrained=False, **keys) -> nn.Module:
    """A tiny one, known to timm wherever this module is imported."""
    return build_model_with_cfg(PerImageResNet, "per_image_resnet", pretrained, **_SHAPE, **keys)


class SpareResNet(ResNet):
    """A ResNet with a layer that has no part in what it computes."""

    def __init__(self, *args, **keys) -> None:
        super().__init__(*args, **keys)
        self.spare = nn.Linear(2, 2)


@register_model
def spare_resnet(pretrained=False, **keys) -> nn.Module:
    """Another tiny one."""
    return build_model_with_cfg(SpareResNet, "spare_resnet", pretrained, **_SHAPE, **keys)


class WrittenNetwork(nn.Module):
    """A small network whose forward pass a test writes."""

    def __init__(self, forward, **parts) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self._forward = forward

    def forward(self, images):
        return self._forward(self, images)


def section(name="test_resnet", weights="none", **keys) -> BackboneSection:
    return BackboneSection(name=name, weights=weights, **keys)


def recipe_rules(freeze):
    """The recipe's `freeze` as the schema reads it."""
    plain = {"name": "x", "data": {"source": "fashion_mnist"}, "backbone": {"name": "x"}, "freeze": freeze}
    return Recipe.model_validate(plain).freeze


def classifier(
    name="test_resnet", *, image_size=32, head=("linear",), num_classes=5, in_chans=3, freeze=(), seed=0, **keys
) -> Classifier:
    backbone, _ = build_backbone(section(name, in_chans=in_chans, **keys), image_size=image_size, seed=seed)
    width = feature_width(backbone, in_chans=in_chans, image_size=image_size)
    freeze_parameters(backbone, recipe_rules(list(freeze)))
    new_head = build_head(head, in_features=width, num_classes=num_classes, seed=seed + 1)
    return Classifier(backbone, new_head).train()


def noise(seed=0, count=4, in_chans=3, image_size=32) -> torch.Tensor:
    return torch.randn(count, in_chans, *height_width(image_size), generator=torch.Generator().manual_seed(seed))


def loss_of(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    logits = network(images)
    return nn.functional.cross_entropy(logits, torch.arange(len(images)) % logits.shape[1])


def state_of(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def train(network: nn.Module, steps=3, lr=0.1) -> None:
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=lr)
    network.train()
    for step in range(steps):
        loss_of(network, noise(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
