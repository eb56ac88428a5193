"""Build any timm backbone, without its classifier, with the weights that the recipe names.

Promise: the weights are those that the recipe names, or there is an error: never random ones instead, never silently a
file that fits only in part.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.models import adapt_input_conv, load_model_config_from_hf
from torch import Tensor, nn

import tlscale.models.classic  # noqa: F401 (registers its architectures with timm)
from tlscale.errors import ModelError, did_you_mean
from tlscale.models.bundled import bundled
from tlscale.models.foreign import check_model_args, check_model_folder, check_tensors, check_unpacked_size, is_pickle
from tlscale.models.hub import cache_only_when_unreachable
from tlscale.recipe.schema import BackboneSection
from tlscale.recipe.seeds import derive_seed
from tlscale.storage.files import file_sha256, text_sha256

_PREFIXES = ("hf-hub:", "local-dir:")


@dataclass(frozen=True)
class WeightsReport:
    """Where the weights came from, for `run.json` and the screen."""

    origin: str
    num_matched: int
    num_tensors: int
    sha256: str

    def __str__(self) -> str:
        if self.num_tensors == 0:
            return self.origin
        share = self.num_matched / self.num_tensors
        return f"{self.origin}: {self.num_matched} of {self.num_tensors} tensors matched ({share:.1%})"


def build_backbone(section: BackboneSection, *, image_size: int | None, seed: int) -> tuple[nn.Module, WeightsReport]:
    """Build a backbone that gives pooled features, (B, C, H, W) to (B, D).

    Args:
        image_size: pixels; matters to architectures that are built for one size (most vision transformers).
        seed: of the initial weights where they are random; the global generator is left as it was.

    Raises:
        ModelError: unknown name, weights that are not available, or weights of another network.
    """
    _check_name(section.name)
    with torch.random.fork_rng(devices=[]):
        size = {"img_size": image_size} if image_size is not None and _is_built_for_one_size(section) else {}
        torch.manual_seed(derive_seed(seed, "backbone"))
        model = _create(section, size, pretrained=section.weights == "pretrained")
    if section.weights == "bundled":
        return model, _load_bundled(model, section)
    if not section.from_file:
        origin = "random weights, by seed"
        if section.weights == "pretrained":
            cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
            place = cfg.get("hf_hub_id") or cfg.get("url") or cfg.get("file") or "timm"
            tag = f".{cfg['tag']}" if cfg.get("tag") else ""
            origin = f"pretrained {cfg.get('architecture', type(model).__name__)}{tag} from {place}"
        return model, WeightsReport(origin, 0, 0, state_digest(model.state_dict()))
    return model, _load_file(model, section)


def _is_built_for_one_size(section: BackboneSection) -> bool:
    """Return whether the architecture takes `img_size`; the others refuse the argument."""
    if section.name.startswith(_PREFIXES):  # only building it tells
        model = _create(section, {}, pretrained=False)
        return bool(model.pretrained_cfg.get("fixed_input_size", False))  # type: ignore[union-attr, operator]
    cfg = timm.get_pretrained_cfg(section.name)
    return cfg is not None and bool(cfg.fixed_input_size)


def no_weight_decay(model: nn.Module) -> frozenset[str]:
    """Return the names that the architecture wants without weight decay, such as position embeddings."""
    names = getattr(model, "no_weight_decay", None)
    return frozenset(names()) if callable(names) else frozenset()


def layer_depths(model: nn.Module) -> tuple[dict[str, int], int]:
    """Count the layers between each parameter and the output, by timm's own grouping of the whole model.

    timm puts what none of its patterns names (a last norm, say) into one layer with the classifier. A backbone has no
    classifier any more, so its names are put back for the count.

    Returns:
        By name, 0 for the last layer; and the same for the classifier, which is the last layer in nearly all models.

    Raises:
        ModelError: the architecture has no grouping.
    """
    # Private, as timm offers only `group_modules`, which sees no parameters of the network's own (class token, position
    # embedding). tests/unit/models/test_backbone.py compares with timm's public `param_groups_layer_decay`.
    from timm.models._manipulate import group_with_matcher

    matcher = getattr(model, "group_matcher", None)
    if not callable(matcher):
        raise ModelError(
            f"timm does not group the layers of {type(model).__name__}; use lr_rules", key="optim.layer_decay"
        )
    cfg: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    named = cfg.get("classifier") or "head.fc"
    classifiers = [f"{name}.weight" for name in ((named,) if isinstance(named, str) else named)]
    objects = [*model.named_parameters(), *((name, None) for name in classifiers)]
    numbers: dict[str, int] = group_with_matcher(iter(objects), matcher(coarse=False), reverse=True)
    deepest = max(numbers.values())
    depths = {name: deepest - number for name, number in numbers.items()}
    of_classifier = min(depths[name] for name in classifiers)
    return {name: depths[name] for name, _ in model.named_parameters()}, of_classifier


def state_digest(state: Mapping[str, Tensor]) -> str:
    """Compute SHA-256 over names, types, shapes and bytes: networks with the same digest have the same state."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def function_digest(model: nn.Module) -> str:
    """Compute SHA-256 of what a timm model is in eval mode: architecture, how it was built, and tensors."""
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    built = {"architecture": cfg.get("architecture"), "class": type(model).__name__, "modules": str(model)}
    args = {key: str(value) for key, value in getattr(model, "_model_args", {}).items()}
    return text_sha256(json.dumps([built, args, state_digest(model.state_dict())], sort_keys=True))


def _check_name(name: str) -> None:
    if name.startswith(_PREFIXES):
        return
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        known = timm.list_models()
        raise ModelError(
            f"timm {timm.__version__} has no model '{name}'.{did_you_mean(architecture, known)} "
            f"It has {len(known)}; timm.list_models('*resnet*') lists those with 'resnet' in the name. Names of other "
            "places begin with 'hf-hub:' or 'local-dir:'.",
            key="backbone.name",
        )
    tags = [full.partition(".")[2] for full in timm.list_pretrained(architecture)]
    tag = name.partition(".")[2]
    if tag and tag not in tags:
        raise ModelError(
            f"'{architecture}' has no weights tagged '{tag}'.{did_you_mean(tag, tags)} "
            f"There are: {', '.join(tags) or 'none'}",
            key="backbone.name",
        )


def _create(section: BackboneSection, size: dict[str, Any], *, pretrained: bool) -> nn.Module:
    rates: dict[str, Any] = {
        key: getattr(section, key) for key in ("drop_rate", "drop_path_rate") if getattr(section, key) > 0
    }
    try:
        with cache_only_when_unreachable():
            _check_settings(section.name)
            return timm.create_model(
                section.name, pretrained=pretrained, num_classes=0, in_chans=section.in_chans, **size, **rates
            )
    except ModelError as error:
        raise ModelError(f"{error}", key="backbone.name") from error
    except TypeError as error:
        if not rates:
            raise
        raise ModelError(f"'{section.name}' does not take {' and '.join(rates)}: {error}", key="backbone") from error
    except Exception as error:
        # Hub, disk and network each raise their own; none of them tells the user what to do.
        if pretrained or section.name.startswith(_PREFIXES):
            raise ModelError(_no_weights(section, error)) from error
        raise ModelError(f"timm cannot build '{section.name}': {error}", key="backbone") from error


def _check_settings(name: str) -> None:
    """Check that what a model's folder, here or on the hub, has timm build is only a network."""
    source, _, place = name.partition(":")
    if source == "local-dir":
        check_model_folder(Path(place))
    elif source == "hf-hub":
        _, architecture, arguments = load_model_config_from_hf(place)
        check_model_args(architecture, arguments, name)


def _no_weights(section: BackboneSection, error: Exception) -> str:
    from huggingface_hub.constants import HF_HUB_CACHE

    if section.name.startswith("local-dir:"):
        return f"backbone.name: '{section.name}' cannot be opened: {type(error).__name__}: {_first_line(error)}"
    cfg = timm.get_pretrained_cfg(section.name) if not section.name.startswith(_PREFIXES) else None
    if cfg is not None and not cfg.has_weights:
        tagged = timm.list_pretrained(section.name.split(".")[0])
        return (
            f"backbone.weights: timm has no pretrained weights for '{section.name}'. "
            f"{'There are: ' + ', '.join(tagged) if tagged else 'Use weights: none, or the path of a file.'}"
        )
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
    return (
        f"backbone.weights: the pretrained weights of '{section.name}' are not in the cache {HF_HUB_CACHE} and cannot "
        f"be fetched from the hub{offline}: {type(error).__name__}: {_first_line(error)}\n"
        "  Ways out: run once where the hub can be reached and copy that folder here (HF_HOME is its place); give "
        "a file, backbone.weights=PATH.safetensors; or train from scratch, backbone.weights=none."
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].split(". ")[0][:200] if lines else "no message"


def _load_file(model: nn.Module, section: BackboneSection) -> WeightsReport:
    path = Path(section.weights)
    state = _best_fit(_read_state(path, section), model)
    own = model.state_dict()
    matched = {name: tensor for name, tensor in state.items() if name in own and tensor.shape == own[name].shape}
    report = WeightsReport(str(path), len(matched), len(own), "")
    if len(matched) < section.min_matched * len(own):
        raise ModelError(_mismatch(report, section, state, own))
    model.load_state_dict(matched, strict=False)
    return replace(report, sha256=state_digest(model.state_dict()))


def _load_bundled(model: nn.Module, section: BackboneSection) -> WeightsReport:
    """Load weights that ship with tlscale, and give the model the settings of the images they were made with."""
    weights = bundled(section.name)
    if (found := file_sha256(weights.path)) != weights.sha256:
        raise ModelError(
            f"'{weights.path}' is not the file that ships with tlscale: its SHA-256 is {found}, not {weights.sha256}",
            remedy="Install tlscale again",
            key="backbone.weights",
        )
    report = _load_file(model, section.model_copy(update={"weights": str(weights.path), "min_matched": 1.0}))
    model.pretrained_cfg = {**model.pretrained_cfg, **weights.pretrained_cfg}  # type: ignore[assignment, dict-item]
    return replace(report, origin=f"bundled {section.name} (tlscale/weights/{weights.path.name})")


def _read_state(path: Path, section: BackboneSection) -> dict[str, Tensor]:
    """Read the tensors of a file without running anything that the file holds."""
    if not path.is_file():
        raise ModelError(
            f"there is no file '{path}'",
            remedy="Give 'pretrained', 'none' or the path of a .safetensors.",
            key="backbone.weights",
        )
    if section.sha256 is not None and (found := file_sha256(path)) != section.sha256:
        raise ModelError(f"backbone.sha256: '{path}' has the SHA-256 {found}, not {section.sha256}; it is another file")
    pickled = is_pickle(path)
    if not pickled and path.suffix != ".safetensors":
        raise ModelError(f"'{path}' is not a .safetensors file (nor .pth, .pt, .bin)", key="backbone.weights")
    if pickled and not section.allow_pickle:
        raise ModelError(
            f"'{path}' is a pickle, which can run code when it is read",
            remedy="Convert it to "
            "safetensors, or set backbone.allow_pickle=true to have torch's restricted unpickler read it.",
            key="backbone.weights",
        )
    try:
        if not pickled:
            return _without_wrappers(safetensors.torch.load_file(path))
        check_unpacked_size(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except ModelError as error:
        raise ModelError(f"{error}", key="backbone.weights") from error
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"'{path}' holds more than tensors, so it is not read: {_first_line(error)}", key="backbone.weights"
        ) from error
    except Exception as error:  # bytes that are no pickle break the unpickler in many ways
        raise ModelError(
            f"'{path}' cannot be read: {type(error).__name__}: {_first_line(error)}", key="backbone.weights"
        ) from error
    return _state_of(loaded, path)


def _state_of(loaded: object, path: Path) -> dict[str, Tensor]:
    """Find the state dict, bare or under the keys that training scripts use."""
    for key in ("state_dict_ema", "model_ema", "state_dict", "model", "module"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    if not isinstance(loaded, dict) or not any(isinstance(value, Tensor) for value in loaded.values()):
        raise ModelError(f"'{path}' holds no state dict", key="backbone.weights")
    tensors = {name: value for name, value in loaded.items() if isinstance(value, Tensor)}
    try:
        check_tensors(tensors, path)
    except ModelError as error:
        raise ModelError(f"{error}", key="backbone.weights") from error
    return _without_wrappers(tensors)


def _without_wrappers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes of DDP and torch.compile, whichever was around the other."""
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _best_fit(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Choose `state` as it is, or as the architecture's own filter makes it from a checkpoint of its authors."""
    own = model.state_dict()

    def fit(candidate: Mapping[str, Tensor]) -> int:
        return sum(1 for name, tensor in candidate.items() if name in own and tensor.shape == own[name].shape)

    candidates = [_fit_channels(dict(state), model)]
    if fit(candidates[0]) < len(own):
        filter_fn = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        if callable(filter_fn):
            # A file of another architecture breaks its filter somehow; the share that matches tells the user.
            with contextlib.suppress(Exception):
                candidates.append(_fit_channels(dict(filter_fn(dict(state), model)), model))
    return max(candidates, key=fit)


def _fit_channels(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Turn first filters made for 3 channels into filters for the model's channels (summed for 1)."""
    first = model.pretrained_cfg.get("first_conv")  # type: ignore[union-attr, operator]
    for name in (first,) if isinstance(first, str) else first or ():
        key, own = f"{name}.weight", model.state_dict().get(f"{name}.weight")
        if key in state and own is not None and state[key].ndim == 4 and state[key].shape != own.shape:
            state[key] = adapt_input_conv(own.shape[1], state[key], base_chans=state[key].shape[1])
    return state


def _mismatch(
    report: WeightsReport, section: BackboneSection, state: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> str:
    missing = [name for name in own if name not in state]
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    lines = [
        f"backbone.weights: {report} for '{section.name}'; at least {section.min_matched:.0%} must "
        "(backbone.min_matched). Is it a file of another architecture?"
    ]
    if missing:
        lines.append(f"  missing: {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''} ({len(missing)})")
    if shapes:
        lines.append(f"  of another shape: {', '.join(shapes[:3])}{' ...' if len(shapes) > 3 else ''} ({len(shapes)})")
    lines.append(f"  the file has: {', '.join(list(state)[:3])} ... ({len(state)} tensors)")
    return "\n".join(lines)
