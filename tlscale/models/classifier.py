"""Join backbone and head to one network; set its modes and gradient checkpointing.

Promise: parameter names that rules see are timm's own for the backbone (`layer1.0.conv1.weight`) and `head.<n>.*`
for the new layers.

Shapes: B images, C classes, D features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.module_tracker import ModuleTracker

from tlscale.errors import ModelError, first_sentence
from tlscale.models.backbone import layer_depths, no_weight_decay
from tlscale.models.features import LayerCodes
from tlscale.models.freeze import frozen_modules, is_norm
from tlscale.recipe.image_size import ImageSize, height_width, image_size_of, size_in_words

_TRACKER = ModuleTracker()  # only queried for whether a backward pass is under way


class Classifier(nn.Module):
    """Images (B, in_chans, H, W) to logits (B, C).

    Args:
        backbone: a timm model without classifier, giving (B, D).
        head: (B, D) to (B, C).
    """

    def __init__(self, backbone: nn.Module, head: nn.Sequential) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.head(self.backbone(images)))

    def train(self, mode: bool = True) -> Classifier:
        """Set the mode, but keep what is frozen in eval mode: its batch statistics are not this task's to move."""
        super().train(mode)
        if mode:
            for module in frozen_modules(self.backbone):
                module.eval()
        return self

    def rule_names(self) -> dict[str, nn.Parameter]:
        """Return parameters by the names that rules match."""
        params = {name.removeprefix("backbone."): param for name, param in self.named_parameters()}
        assert len(params) == len(list(self.parameters())), "a backbone with parameters named as our head's"
        return params

    def layer_depth(self) -> dict[str, int]:
        """Count the layers away from the output by rule name, as timm counts them: the head is one of them."""
        depths, of_head = layer_depths(self.backbone)
        return {name: depths.get(name, of_head) for name in self.rule_names()}

    def never_decayed(self) -> frozenset[str]:
        """Return rule names that the architecture wants without weight decay."""
        return no_weight_decay(self.backbone)


class CodesClassifier(nn.Module):
    """Images (B, in_chans, H, W) to logits (B, C), from the codes of one layer: the model of a probe.

    Args:
        codes: gives one (layer, pool); it stays in eval mode.
        head: codes (B, D) to (B, C); a bare linear layer is kept in a sequence, as the heads of recipes are.
    """

    def __init__(self, codes: LayerCodes, head: nn.Module) -> None:
        super().__init__()
        assert len(codes.wanted) == 1, "a classifier takes the codes of one layer"
        self.codes = codes
        self.head = nn.Sequential(head) if isinstance(head, nn.Linear) else head

    @property
    def backbone(self) -> nn.Module:
        return self.codes.backbone

    @property
    def layer(self) -> str:
        return self.codes.wanted[0][0]

    @property
    def pool(self) -> str:
        return self.codes.wanted[0][1]

    def forward(self, images: Tensor) -> Tensor:
        (codes,) = self.codes(images)
        return cast(Tensor, self.head(codes))


def feature_width(backbone: nn.Module, *, in_chans: int, image_size: ImageSize) -> int:
    """Measure D by one forward pass: the widths that timm notes of its models are not always what they give."""
    backbone.eval()
    hw = (getattr(backbone, "pretrained_cfg", None) or {}).get("input_size", ())[1:]
    made_for = image_size_of(*hw) if hw else image_size
    own = f", such as {made_for}, which it was made for" if made_for != image_size else ""
    remedy = f"Set data.image_size to a size that it takes{own}, or choose another backbone.name."
    images = torch.zeros(1, in_chans, *height_width(image_size))
    features = _tried(backbone, images, "data.image_size", f"images of {size_in_words(image_size)} pixels", remedy)
    if not isinstance(features, Tensor) or features.ndim != 2:
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ModelError(f"{type(backbone).__name__} gives {shape}, not one vector an image", key="backbone")
    return int(features.shape[1])


def put_channels_last(classifier: Classifier, *, in_chans: int, image_size: ImageSize) -> None:
    """Put the network's weights in channels-last order, and try it by one pass in eval mode.

    Raises:
        ModelError: the backbone has weights or layers that know no such order.
    """
    key, what = "compute.channels_last", "the channels-last order"
    remedy = "Take the key out, or choose another backbone.name."
    param = next(classifier.parameters())
    images = torch.zeros(1, in_chans, *height_width(image_size), dtype=param.dtype)
    try:
        classifier.to(memory_format=torch.channels_last)
    except RuntimeError as error:
        raise ModelError(_cannot_take(classifier.backbone, what, error), key=key, remedy=remedy) from error
    _tried(classifier.backbone, images.contiguous(memory_format=torch.channels_last), key, what, remedy)


def _tried(backbone: nn.Module, images: Tensor, key: str, what: str, remedy: str) -> object:
    try:
        with torch.no_grad():
            return backbone(images)
    except Exception as error:  # each architecture complains in its own way, some by a bare assertion
        raise ModelError(_cannot_take(backbone, what, error), key=key, remedy=remedy) from error


def _cannot_take(backbone: nn.Module, what: str, error: Exception) -> str:
    name = (getattr(backbone, "pretrained_cfg", None) or {}).get("architecture", "")
    said = f"{type(error).__name__}: {first_sentence(error)}"
    return f"{type(backbone).__name__} cannot take {what}: {said}{f' (backbone {name!r})' if name else ''}"


def enable_gradient_checkpointing(classifier: Classifier, *, in_chans: int, image_size: ImageSize) -> None:
    """Switch it on and prove that it acts: some layer must run again in the backward pass.

    timm's switch is accepted and ignored by some architectures and an assertion in others, so it is not believed.

    Raises:
        ModelError: it does not act in this backbone, or has nothing to act on.
    """
    from timm.layers import set_reentrant_ckpt

    backbone = classifier.backbone
    if not any(param.requires_grad for param in backbone.parameters()):
        raise ModelError(
            "has no effect: the whole backbone is frozen, so no activation of it is stored",
            key="compute.gradient_checkpointing",
            remedy="Take the key out.",
        )
    set_reentrant_ckpt(False)
    _keep_statistics_when_recomputed(backbone)
    try:
        backbone.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AssertionError, AttributeError, TypeError):
        raise _no_checkpointing(backbone) from None
    if _recomputed_layers(classifier, in_chans, image_size) == 0:
        raise _no_checkpointing(backbone)


def _no_checkpointing(backbone: nn.Module) -> ModelError:
    return ModelError(
        f"{type(backbone).__name__} does not recompute anything in the backward pass "
        "(with these layers frozen). timm's resnet, resnext, regnet, efficientnet, mobilenetv3, convnext, "
        "densenet, vit, deit, beit, eva, swin and maxvit families do, and lenet5, alexnet, zfnet and googlenet; vgg, "
        "the inceptions, xception, dpn, dla, hrnet, "
        "cspnet, senet, nasnet, pit, coat, crossvit and twins do not",
        key="compute.gradient_checkpointing",
        remedy="Take the key out, or lower compute.micro_batch_size.",
    )


def _keep_statistics_when_recomputed(backbone: nn.Module) -> None:
    """Let a norm layer that runs again in the backward pass work on copies of its buffers.

    Else each step would move batch statistics twice, and gradient checkpointing would change what is learned.
    """
    for module in backbone.modules():
        names = [name for name, _ in module.named_buffers(recurse=False)]
        if is_norm(module) and names:
            own: dict[str, Tensor] = {}
            module.register_forward_pre_hook(partial(_lend_copies, own, names))
            module.register_forward_hook(partial(_take_back, own), always_call=True)


def _lend_copies(own: dict[str, Tensor], names: Sequence[str], module: nn.Module, _: object) -> None:
    # The compiler recomputes on its own and moves no buffer twice.
    if torch.compiler.is_compiling() or not (module.training and _TRACKER.is_bw):
        return
    for name in names:
        own[name] = module.get_buffer(name)
        setattr(module, name, own[name].clone())


def _take_back(own: dict[str, Tensor], module: nn.Module, *_: object) -> None:
    for name, buffer in own.items():
        setattr(module, name, buffer)
    own.clear()


def _recomputed_layers(classifier: Classifier, in_chans: int, image_size: ImageSize) -> int:
    """Count the layers that run again in a backward pass; the network is left as it was."""
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    leaves = [module for module in classifier.backbone.modules() if not any(module.children())]
    handles = [leaf.register_forward_pre_hook(count) for leaf in leaves]
    try:
        with _on_trial(classifier):
            output = _trial_output(classifier, in_chans, image_size)
            calls = 0
            torch.autograd.backward(output)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def unused_parameters(classifier: Classifier, *, in_chans: int, image_size: ImageSize) -> list[str]:
    """Return rule names of parameters that require a gradient and get none; the network is left as it was."""
    with _on_trial(classifier):
        torch.autograd.backward(_trial_output(classifier, in_chans, image_size))
        return [name for name, param in classifier.rule_names().items() if param.requires_grad and param.grad is None]


def trains_on_one_image(classifier: Classifier, *, in_chans: int, image_size: ImageSize) -> bool:
    """Return whether training mode takes a single image: batch norm of one value a channel does not."""
    with _on_trial(classifier):
        try:
            _trial_output(classifier, in_chans, image_size, count=1)
        except ValueError:
            return False
    return True


@contextmanager
def _on_trial(classifier: Classifier) -> Iterator[None]:
    """Switch to training mode within; restore mode, buffers and random numbers, and drop gradients afterwards."""
    buffers = {name: buffer.clone() for name, buffer in classifier.named_buffers()}
    was_training = classifier.training
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            classifier.train()
            yield
    finally:
        classifier.zero_grad(set_to_none=True)
        for name, buffer in classifier.named_buffers():
            buffer.copy_(buffers[name])
        classifier.train(was_training)


def _trial_output(classifier: Classifier, in_chans: int, image_size: ImageSize, count: int = 2) -> Tensor:
    param = next(classifier.parameters())
    images = torch.zeros(count, in_chans, *height_width(image_size), device=param.device, dtype=param.dtype)
    return cast(Tensor, classifier(images)).sum()
