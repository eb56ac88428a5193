"""Export the trained model to files, which `model_folder` loads back.

Promise: what `export_model` writes gives the same logits after `load`, and after timm's `create_model` where the head
is a single linear layer on what the backbone itself gives; both are checked before the folder counts as done.

Shapes: B images, C classes, D features.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import timm
import torch
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from tlscale.data.input_spec import InputSpec
from tlscale.errors import ModelError
from tlscale.models.calibration import Calibration
from tlscale.models.classifier import Classifier, CodesClassifier
from tlscale.models.features import PENULTIMATE, LayerCodes
from tlscale.models.heads import is_single_linear
from tlscale.models.knn import KnnHead
from tlscale.models.model_copy import how_to_load
from tlscale.models.model_folder import CONFIG_FILE, HEAD_FILE, MODEL_FILE, config_digest, format_of
from tlscale.models.model_folder import TrainedModel as TrainedModel  # what is exported is found where it is exported
from tlscale.models.model_folder import load as load
from tlscale.models.unknown import UNKNOWN_FILE, UnknownScore
from tlscale.recipe.field_types import HeadLayer
from tlscale.storage import faults
from tlscale.storage.files import file_sha256, make_folder, remove_left_overs, replacing

LOGITS_TOLERANCE = 1e-5


@dataclass(frozen=True)
class DecisionRules:
    """Hold what validation images chose for a model: how probabilities, labels and unknown images follow from it."""

    calibration: Calibration | None = None
    unknown: UnknownScore | str = "none was fitted"
    """What tells images that are like none of training; or why there is nothing."""
    thresholds: Sequence[float] | None = None
    """Of several labels: the probability of each class from which on an image has it."""


_NONE_CHOSEN = DecisionRules()


def export_model(
    classifier: Classifier | CodesClassifier,
    folder: Path,
    *,
    head: Sequence[HeadLayer] = ("linear",),
    classes: Sequence[str],
    spec: InputSpec,
    fitted: Mapping[str, Any] | None = None,
    rules: DecisionRules = _NONE_CHOSEN,
    views: Sequence[str] = (),
) -> str:
    """Write `config.json` and `model.safetensors` (and `head.safetensors` for any but a linear head) to `folder`.

    Args:
        classifier: on any device, in any mode; it is left as it is. Its whole backbone is written, also the layers
            behind those whose codes it takes.
        folder: is made; files of the same names are replaced.
        head: the recipe's head, where the classifier's is made of such layers.
        classes: names of the C classes in the order of the logits.
        spec: what images the network was trained on.
        fitted: for `config.json`: `fitted_on`, the splits that it learned from, and `scored_on`, the split that its
            score in `result.json` is of; None where it has no score of its own.
        rules: chosen on images that the network was not fitted to; `unknown.safetensors` has what unknown images take.
        views: `evaluate.views`, under which all of this was chosen.

    Returns:
        How the folder is to be loaded, in words.

    Raises:
        ModelError: what was written does not give the logits of `classifier`.
    """
    plain = _plain_copy(classifier)
    as_timm = _as_timm_model(plain, spec) if isinstance(plain, Classifier) and is_single_linear(head) else None
    whole = as_timm is not None
    body = as_timm if as_timm is not None else plain.backbone
    ours = {**_own_config(plain, head), "classes": list(classes), "input": spec.to_plain(), "whole": whole}
    ours |= fitted or {}
    unknown = rules.unknown if isinstance(rules.unknown, UnknownScore) else None
    ours |= {} if rules.thresholds is None else {"task": "multi_label", "thresholds": list(rules.thresholds)}
    ours |= {} if unknown is None else {"unknown": unknown.settings.model_dump(exclude_none=True)}
    ours |= {} if not views else {"views": list(views)}
    ours |= {} if rules.calibration is None else {"calibration": rules.calibration.model_dump()}
    ours = {"format": format_of(ours), **ours}
    files = {MODEL_FILE: body.state_dict(), **({} if whole else {HEAD_FILE: plain.head.state_dict()})}
    files |= {} if unknown is None else {UNKNOWN_FILE: unknown.state()}
    _write_files(folder, files, body, ours, spec)
    difference = _difference(plain, load(folder).model, spec)
    if not difference <= LOGITS_TOLERANCE:
        raise ModelError(f"the exported model in {folder} gives other logits than the run (by {difference:.2g})")
    return how_to_load(folder, whole=whole)


def _write_files(
    folder: Path, files: Mapping[str, Mapping[str, Tensor]], model: nn.Module, ours: Mapping[str, Any], spec: InputSpec
) -> None:
    make_folder(folder)
    for file in (CONFIG_FILE, MODEL_FILE, HEAD_FILE, UNKNOWN_FILE):
        remove_left_overs(folder / file)
    # The configuration gets its name last: it says what the others hold.
    with replacing(folder / CONFIG_FILE) as path:
        _write_config(model, path, ours, spec)
        faults.at("export")
        for file in (MODEL_FILE, HEAD_FILE, UNKNOWN_FILE):
            (folder / file).unlink(missing_ok=True)
            if file in files:
                _write_tensors(files[file], folder / file)
        # Checksums show corruption that no format would: of the files of tensors, and of these settings themselves.
        config = json.loads(path.read_text())
        config["tlscale"]["sha256"] = {file: file_sha256(folder / file) for file in files}
        config["tlscale"]["config_sha256"] = config_digest(config)
        path.write_text(json.dumps(config, indent=2) + "\n")


def _plain_copy(classifier: Classifier | CodesClassifier) -> Classifier | CodesClassifier:
    """Copy to the CPU, in eval mode, without what a run wraps its network in (autocast, compiled code, memory order).

    Logits are compared on it: two devices, precisions or memory orders agree less closely than two files must.
    """
    on_cpu: dict[int, Any] = {id(buffer): buffer.detach().cpu().contiguous() for buffer in classifier.buffers()}
    for param in classifier.parameters():
        on_cpu[id(param)] = nn.Parameter(param.detach().cpu().contiguous(), param.requires_grad)
    backbone, head = copy.deepcopy((classifier.backbone, classifier.head), on_cpu)
    backbone.train().eval()  # some transformers keep what they computed from their parameters until train()
    # Layers on the penultimate codes are a plain classifier, which timm may know.
    if isinstance(head, nn.Sequential) and getattr(classifier, "layer", PENULTIMATE) == PENULTIMATE:
        return Classifier(backbone, head).eval()
    assert isinstance(classifier, CodesClassifier)
    return CodesClassifier(LayerCodes(backbone, [(classifier.layer, classifier.pool)]), head).eval()


def _own_config(plain: Classifier | CodesClassifier, head: Sequence[HeadLayer]) -> dict[str, Any]:
    if isinstance(plain, Classifier):
        return {"head": list(head)}
    layers = {"knn": {"k": plain.head.k}} if isinstance(plain.head, KnnHead) else list(head)
    return {"layer": plain.layer, "pool": plain.pool, "head": layers}


def _write_tensors(state: Mapping[str, Tensor], path: Path) -> None:
    """Write each tensor once, with storage of its own, as safetensors wants it."""
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in state.items()}
    with replacing(path) as aside:
        aside.touch()
        mode = aside.stat().st_mode  # as the umask says, where safetensors lets nobody else read its files
        safetensors.torch.save_file(tensors, aside, metadata={"format": "pt"})
        aside.chmod(mode)


def _write_config(model: nn.Module, path: Path, ours: Mapping[str, Any], spec: InputSpec) -> None:
    keys = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
    transform: dict[str, Any] = {"input_size": list(spec.shape_CHW)}
    transform |= {key: spec.to_plain()[key] for key in keys}
    # Private, as timm's public `save_for_hf` writes the tensors too, and those that share memory not at all.
    save_config_for_hf(
        model,
        str(path),
        model_config={
            "pretrained_cfg": transform,
            "tlscale": ours,
            **({"label_names": ours["classes"]} if ours["whole"] else {}),
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
    """Build timm's own model with its classifier set to the head; return None where that is another network."""
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
    return model if _difference(classifier, model, spec) <= LOGITS_TOLERANCE else None


def _difference(ours: nn.Module, other: nn.Module, spec: InputSpec) -> float:
    """Return the largest difference of logits on random images, as a share of the largest logit (at least 1).

    Votes of neighbours jump where two are equally near; there it is that of the codes, and of the stored neighbours.
    """
    dtype = next(ours.parameters()).dtype
    other.to(dtype)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, *spec.shape_CHW, generator=generator).to(dtype)
    pairs = [(ours, other)]
    stored: list[tuple[Tensor, Tensor]] = []
    if isinstance(ours, CodesClassifier) and isinstance(ours.head, KnnHead) and isinstance(other, CodesClassifier):
        pairs = [(ours.codes, other.codes)]
        stored = list(zip(ours.head.buffers(), other.head.buffers(), strict=True))
    with torch.inference_mode():
        values = stored + [(_first(one(images)), _first(two(images))) for one, two in pairs]
    shares = [(one - two).abs().max() / one.abs().max().clamp(min=1.0) for one, two in values]
    return float(torch.stack(shares).max())  # NaN if any is


def _first(value: Tensor | tuple[Tensor, ...]) -> Tensor:
    return value if isinstance(value, Tensor) else value[0]
