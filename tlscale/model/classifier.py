"""Backbone and head as one network; how it is frozen, checkpointed, written and read.

Promise: parameter names that rules see are timm's own for the backbone (`layer1.0.conv1.weight`) and `head.<n>.*`
for the new layers. What `export_model` writes gives the same logits after `load`, and after timm's `create_model`
where the head is a single linear layer; both are tried before the folder is called done.

Shapes: B images, C classes, D features.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import timm
import torch
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn
from torch.utils.module_tracker import ModuleTracker

from tlscale.data.transforms import InputSpec
from tlscale.errors import ModelError, RunFolderError
from tlscale.model.backbone import layer_numbers, no_weight_decay
from tlscale.model.freeze import frozen_modules, is_norm
from tlscale.model.heads import KnnHead, build_head, is_single_linear
from tlscale.model.layers import LayerCodes
from tlscale.recipe.values import HeadLayer

FORMAT = 1
LOGITS_TOLERANCE = 1e-5
_HEAD_FILE = "head.safetensors"
_TRACKER = ModuleTracker()  # only asked whether a backward pass is under way


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
        """As ever, but what is frozen stays in eval mode: its batch statistics are not this task's to move."""
        super().train(mode)
        if mode:
            for module in frozen_modules(self.backbone):
                module.eval()
        return self

    def rule_names(self) -> dict[str, nn.Parameter]:
        """Parameters by the names that rules match."""
        params = {name.removeprefix("backbone."): param for name, param in self.named_parameters()}
        assert len(params) == len(list(self.parameters())), "a backbone with parameters named as our head's"
        return params

    def layer_depth(self) -> dict[str, int]:
        """Layers away from the head by rule name, 0 for the head itself.

        Raises:
            ModelError: timm does not group the layers of this architecture.
        """
        numbers = layer_numbers(self.backbone)
        deepest = max(numbers.values())
        depth = {name: deepest - number + 1 for name, number in numbers.items()}
        return {name: depth.get(name, 0) for name in self.rule_names()}

    def never_decayed(self) -> frozenset[str]:
        """Rule names that the architecture wants without weight decay."""
        return no_weight_decay(self.backbone)


class CodesClassifier(nn.Module):
    """Images (B, in_chans, H, W) to logits (B, C), from the codes of one layer: the model of a probe.

    Args:
        codes: gives one (layer, pool); it stays in eval mode.
        head: codes (B, D) to (B, C); a bare linear layer is kept in a sequence, as the heads of recipes are.
    """

    def __init__(self, codes: LayerCodes, head: KnnHead | nn.Sequential | nn.Linear) -> None:
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


def feature_width(backbone: nn.Module, *, in_chans: int, image_size: int) -> int:
    """D, by one forward pass: what timm says of its models' widths is not always what they give.

    Raises:
        ModelError: the backbone cannot take such images, or does not give one vector an image.
    """
    backbone.eval()
    try:
        with torch.no_grad():
            features = backbone(torch.zeros(1, in_chans, image_size, image_size))
    except Exception as error:  # each architecture complains in its own way about images too small for it
        raise ModelError(
            f"backbone: {type(backbone).__name__} cannot take images of {image_size} x {image_size} pixels: "
            f"{str(error).splitlines()[0]}. Set data.image_size to a size that it takes."
        ) from error
    if not isinstance(features, Tensor) or features.ndim != 2:
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ModelError(f"backbone: {type(backbone).__name__} gives {shape}, not one vector an image")
    return int(features.shape[1])


def enable_gradient_checkpointing(classifier: Classifier, *, in_chans: int, image_size: int) -> None:
    """Switch it on and prove that it acts: some layer must run again in the backward pass.

    timm's switch is accepted and ignored by some architectures and an assertion in others, so it is not believed.

    Raises:
        ModelError: it does not act in this backbone, or has nothing to act on.
    """
    from timm.layers.config import set_reentrant_ckpt

    backbone = classifier.backbone
    if not any(param.requires_grad for param in backbone.parameters()):
        raise ModelError(
            "compute.gradient_checkpointing has no effect: the whole backbone is frozen, so no activation of it is kept"
        )
    set_reentrant_ckpt(False)
    _keep_statistics_when_recomputed(backbone)
    try:
        backbone.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AssertionError, AttributeError, TypeError):
        raise ModelError(_no_checkpointing(backbone)) from None
    if _recomputed_layers(classifier, in_chans, image_size) == 0:
        raise ModelError(_no_checkpointing(backbone))


def _no_checkpointing(backbone: nn.Module) -> str:
    return (
        f"compute.gradient_checkpointing: {type(backbone).__name__} does not recompute anything in the backward pass "
        "(with these layers frozen). timm's resnet, resnext, regnet, efficientnet, mobilenetv3, convnext, "
        "densenet, vit, deit, beit, eva, swin and maxvit families do; vgg, the inceptions, xception, dpn, dla, hrnet, "
        "cspnet, senet, nasnet, pit, coat, crossvit and twins do not. Take the key out, or lower "
        "compute.micro_batch_size."
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
    # The compiler recomputes by itself and moves no buffer twice.
    if torch.compiler.is_compiling() or not (module.training and _TRACKER.is_bw):
        return
    for name in names:
        own[name] = module.get_buffer(name)
        setattr(module, name, own[name].clone())


def _take_back(own: dict[str, Tensor], module: nn.Module, *_: object) -> None:
    for name, buffer in own.items():
        setattr(module, name, buffer)
    own.clear()


def _recomputed_layers(classifier: Classifier, in_chans: int, image_size: int) -> int:
    """How many layers run again in a backward pass; the network is left as it was."""
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    leaves = [module for module in classifier.backbone.modules() if not any(module.children())]
    buffers = {name: buffer.clone() for name, buffer in classifier.named_buffers()}
    handles = [leaf.register_forward_pre_hook(count) for leaf in leaves]
    was_training = classifier.training
    param = next(classifier.parameters())
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            classifier.train()
            images = torch.zeros(2, in_chans, image_size, image_size, device=param.device, dtype=param.dtype)
            loss = classifier(images).sum()
            calls = 0
            loss.backward()
    finally:
        for handle in handles:
            handle.remove()
        classifier.zero_grad(set_to_none=True)
        for name, buffer in classifier.named_buffers():
            buffer.copy_(buffers[name])
        classifier.train(was_training)
    return calls


@dataclass(frozen=True)
class TrainedModel:
    """A model read from a run: `model(images)` gives logits for images prepared as `input_spec` says."""

    model: nn.Module
    classes: tuple[str, ...]
    input_spec: InputSpec


def export_model(
    classifier: Classifier, folder: Path, *, head: Sequence[HeadLayer], classes: Sequence[str], spec: InputSpec
) -> str:
    """Write `config.json` and `model.safetensors` (and `head.safetensors` for a longer head) to `folder`.

    Args:
        classifier: on any device, in any mode; it is left as it is.
        folder: is made; files of the same names are replaced.
        head: the recipe's head.
        classes: names of the C classes in the order of the logits.
        spec: what images the network was trained on.

    Returns:
        How the folder is to be loaded, in words.

    Raises:
        ModelError: what was written does not give the logits of `classifier`.
    """
    plain = _plain_copy(classifier)
    folder.mkdir(parents=True, exist_ok=True)
    as_timm = _as_timm_model(plain, spec) if is_single_linear(head) else None
    whole = as_timm is not None
    body = as_timm if as_timm is not None else plain.backbone
    _write_config(body, folder, head=head, classes=classes, spec=spec, whole=whole)
    _write_tensors(body.state_dict(), folder / "model.safetensors")
    (folder / _HEAD_FILE).unlink(missing_ok=True)
    if not whole:
        _write_tensors(plain.head.state_dict(), folder / _HEAD_FILE)
    difference = _logits_difference(plain, load(folder).model, spec)
    if difference > LOGITS_TOLERANCE:
        raise ModelError(f"the exported model in {folder} gives other logits than the run (by {difference:.2g})")
    return f"timm.create_model('local-dir:{folder}', pretrained=True)" if whole else f"tlscale.load('{folder}')"


def _plain_copy(classifier: Classifier) -> Classifier:
    """A copy in eval mode on the CPU, without what a run wraps its network in (autocast, compiled code, memory order).

    Logits are compared on it: two devices, precisions or memory orders agree less closely than two files must.
    """
    on_cpu: dict[int, Any] = {id(buffer): buffer.detach().cpu().contiguous() for buffer in classifier.buffers()}
    for param in classifier.parameters():
        on_cpu[id(param)] = nn.Parameter(param.detach().cpu().contiguous(), param.requires_grad)
    parts = copy.deepcopy((classifier.backbone, classifier.head), on_cpu)
    # train() first: some transformers keep what they computed from their parameters until then.
    return Classifier(*parts).train().eval()


def _write_tensors(state: Mapping[str, Tensor], path: Path) -> None:
    """Each tensor once, with storage of its own, as safetensors wants it."""
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in state.items()}
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    # safetensors lets nobody else read its files; they are for whoever may read the configuration beside them.
    path.chmod((path.parent / "config.json").stat().st_mode)


def _write_config(
    model: nn.Module, folder: Path, *, head: Sequence[HeadLayer], classes: Sequence[str], spec: InputSpec, whole: bool
) -> None:
    transform = {
        "input_size": [spec.in_chans, spec.image_size, spec.image_size],
        "mean": list(spec.mean),
        "std": list(spec.std),
        "interpolation": spec.interpolation,
        "crop_pct": spec.crop_pct,
        "crop_mode": spec.crop_mode,
    }
    ours = {"format": FORMAT, "classes": list(classes), "head": list(head), "input": spec.to_plain(), "whole": whole}
    path = folder / "config.json"
    save_config_for_hf(
        model,
        str(path),
        model_config={
            "pretrained_cfg": transform,
            "tlscale": ours,
            **({"label_names": list(classes)} if whole else {}),
        },
        model_args={"in_chans": spec.in_chans},
    )
    config = json.loads(path.read_text())
    cfg = config["pretrained_cfg"]
    cfg.update(transform)
    for key in [key for key in cfg if key.startswith("test_")]:
        del cfg[key]  # the size and crop that the pretrained weights are best tested at are not those of this run
    path.write_text(json.dumps(config, indent=2) + "\n")


def _as_timm_model(classifier: Classifier, spec: InputSpec) -> nn.Module | None:
    """timm's own model of this architecture with its classifier set to the head; None where that is another network."""
    linear = cast(nn.Linear, classifier.head[-1])
    backbone = classifier.backbone
    cfg: dict[str, Any] = backbone.pretrained_cfg  # type: ignore[assignment]
    args = {**getattr(backbone, "_model_args", {}), "num_classes": linear.out_features}
    with torch.random.fork_rng(devices=[]):
        model = timm.create_model(cfg["architecture"], pretrained=False, **args)
    model.pretrained_cfg = {**cfg, "num_classes": linear.out_features}  # type: ignore[assignment]
    names = cfg.get("classifier") or ()
    state = backbone.state_dict()
    for name in (names,) if isinstance(names, str) else names:
        own = model.state_dict().get(f"{name}.weight")
        if own is None or own.numel() != linear.weight.numel():
            return None
        state[f"{name}.weight"] = linear.weight.detach().reshape(own.shape)
        state[f"{name}.bias"] = linear.bias.detach()
    if set(state) != set(model.state_dict()):
        return None
    model.to(linear.weight.dtype).eval().load_state_dict(state)
    return model if _logits_difference(classifier, model, spec) <= LOGITS_TOLERANCE else None


def _logits_difference(ours: nn.Module, other: nn.Module, spec: InputSpec) -> float:
    """Largest difference of two networks' logits on random images, as a share of the largest logit (at least 1)."""
    dtype = next(ours.parameters()).dtype
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, spec.in_chans, spec.image_size, spec.image_size, generator=generator).to(dtype)
    with torch.inference_mode():
        logits, others = ours(images), other.to(dtype)(images)
    return float((logits - others).abs().max() / logits.abs().max().clamp(min=1.0))


def load(run: str | Path) -> TrainedModel:
    """The model of a run folder (or of its `model/` folder), in eval mode on the CPU.

    Raises:
        RunFolderError: there is no model there, a damaged one, or one of a newer format.
    """
    folder = Path(run)
    folder = folder / "model" if (folder / "model" / "config.json").is_file() else folder
    path = folder / "config.json"
    if not path.is_file():
        raise RunFolderError(
            f"'{run}' holds no model: there is no '{path}'. Has the run ended? (tlscale run ... --resume)"
        )
    ours = _own_config(path)
    try:
        with torch.random.fork_rng(devices=[]):
            model = timm.create_model(f"local-dir:{folder}", pretrained=True)
            if not ours["whole"]:
                model = _with_head(model, folder, ours)
    except (OSError, RuntimeError, ValueError, safetensors.SafetensorError) as error:
        raise RunFolderError(f"the model in '{folder}' cannot be loaded: {error}") from error
    return TrainedModel(model.eval(), tuple(ours["classes"]), InputSpec.from_plain(ours["input"]))


def _own_config(path: Path) -> dict[str, Any]:
    """What `export_model` noted in `config.json`."""
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise RunFolderError(f"'{path}' is damaged: {error}") from error
    ours = config.get("tlscale") if isinstance(config, dict) else None
    if not isinstance(ours, dict):
        raise RunFolderError(
            f"'{path}' was not written by tlscale; load it with "
            f"timm.create_model('local-dir:{path.parent}', pretrained=True)"
        )
    if ours["format"] > FORMAT:
        raise RunFolderError(f"'{path}' has format {ours['format']}, this tlscale reads up to {FORMAT}; update tlscale")
    return ours


def _with_head(backbone: nn.Module, folder: Path, ours: Mapping[str, Any]) -> Classifier:
    state = safetensors.torch.load_file(folder / _HEAD_FILE)
    spec = InputSpec.from_plain(ours["input"])
    width = feature_width(backbone, in_chans=spec.in_chans, image_size=spec.image_size)
    head = build_head(ours["head"], in_features=width, num_classes=len(ours["classes"]), seed=0)
    head.load_state_dict(state)
    return Classifier(backbone, head)
