"""Build any timm backbone, without its classifier, with the weights that the recipe names.

Promise: the weights are those that the recipe names, or there is an error: never random ones instead, never silently a
file that fits only in part.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import load_model_config_from_hf
from torch import Tensor, nn

import tlscale.models.classic  # noqa: F401 (registers its architectures with timm)
from tlscale.errors import ModelError, first_sentence, sentences, suggestion
from tlscale.models.adapted import interpolated, repeated_filters
from tlscale.models.bundled import bundled
from tlscale.models.foreign import check_model_args, check_model_folder, weights_in
from tlscale.models.hub import cache_only_when_unreachable, hub_weights
from tlscale.models.weights import WeightsReport, load_file, state_digest
from tlscale.recipe.image_size import ImageSize, size_in_words
from tlscale.recipe.schema import BackboneSection
from tlscale.recipe.seeds import derive_seed
from tlscale.storage.files import file_sha256, text_sha256


def build_backbone(
    section: BackboneSection, *, image_size: ImageSize | None, seed: int
) -> tuple[nn.Module, WeightsReport]:
    """Build a backbone that gives pooled features, (B, C, H, W) to (B, D).

    Args:
        image_size: in pixels; matters to architectures that are built for one size (most vision transformers).
        seed: of the initial weights where they are random; the global generator is left as it was.

    Raises:
        ModelError: unknown name, weights that are not available, or weights of another network.
    """
    if section.from_run:
        raise ModelError(
            "weights of a run are for the network that is trained", key="weights", remedy="Use distill.run"
        )
    if not section.elsewhere:
        _check_name(section.name)
    with torch.random.fork_rng(devices=[]):
        size: dict[str, Any] = {}
        if image_size is not None and _is_built_for_one_size(section):
            size = {"img_size": image_size}
        torch.manual_seed(derive_seed(seed, "backbone"))
        # What others put into a folder or on the hub is loaded as a file is, and reported so.
        model = _create(section, size, pretrained=section.weights == "pretrained" and not section.elsewhere)
    if section.weights == "bundled":
        return model, _load_bundled(model, section)
    if section.weights == "pretrained" and section.elsewhere:
        return model, _load_from_elsewhere(model, section)
    if not section.from_file:
        is_random = section.weights == "none"
        origin = "random weights, by seed" if is_random else _pretrained_origin(model)
        notes = () if is_random else repeated_filters(model, section.in_chans)
        notes += () if is_random or not size else interpolated(_tensors_of_own_size(section), model)
        return model, WeightsReport(origin, 0, 0, state_digest(model.state_dict()), notes=notes)
    return model, load_file(model, section)


def _is_built_for_one_size(section: BackboneSection) -> bool:
    """Return whether the architecture takes `img_size`; the others refuse the argument."""
    if section.elsewhere:  # only building it tells
        model = _create(section, {}, pretrained=False)
        return bool(model.pretrained_cfg.get("fixed_input_size", False))  # type: ignore[union-attr, operator]
    cfg = timm.get_pretrained_cfg(section.name)
    return cfg is not None and bool(cfg.fixed_input_size)


def _tensors_of_own_size(section: BackboneSection) -> Mapping[str, Tensor]:
    """Return the parameters of the architecture as it is built for the images that it was pretrained on."""
    with torch.random.fork_rng(devices=[]):
        return dict(_create(section, {}, pretrained=False).named_parameters())


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
            f"timm does not group the layers of {type(model).__name__}", remedy="Use lr_rules", key="optim.layer_decay"
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


def function_digest(model: nn.Module) -> str:
    """Compute SHA-256 of what a timm model is in eval mode: architecture, how it was built, and tensors."""
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    built = {"architecture": cfg.get("architecture"), "class": type(model).__name__, "modules": str(model)}
    args = {key: str(value) for key, value in getattr(model, "_model_args", {}).items()}
    return text_sha256(json.dumps([built, args, state_digest(model.state_dict())], sort_keys=True))


def _check_name(name: str) -> None:
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        known = timm.list_models()
        raise ModelError(
            f"timm {timm.__version__} has no model '{name}'",
            remedy=sentences(
                suggestion(architecture, known),
                f"It has {len(known)}; timm.list_models('*resnet*') lists those with 'resnet' in the name. Names of "
                "other places begin with 'hf-hub:' or 'local-dir:'.",
            ),
            key="backbone.name",
        )
    tags = [full.partition(".")[2] for full in timm.list_pretrained(architecture)]
    tag = name.partition(".")[2]
    if tag and tag not in tags:
        raise ModelError(
            f"'{architecture}' has no weights tagged '{tag}'",
            remedy=sentences(suggestion(tag, tags), f"There are: {', '.join(tags) or 'none'}"),
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
        raise error.recast(ModelError, error.key or "backbone.name") from error
    except TypeError as error:
        if not rates:
            raise
        raise ModelError(f"'{section.name}' does not take {' and '.join(rates)}: {error}", key="backbone") from error
    except Exception as error:
        if size and not _takes(section, size):
            words = size_in_words(size["img_size"])
            problem = f"'{section.name}' cannot be built for images of {words} pixels: {first_sentence(error)}"
            raise ModelError(problem, key="data.image_size", remedy=_other_size(section)) from error
        # Hub, disk and network each raise their own; none of them tells the user what to do.
        if pretrained or section.elsewhere:
            raise _no_weights(section, error) from error
        raise ModelError(f"timm cannot build '{section.name}': {error}", key="backbone") from error


def _takes(section: BackboneSection, size: dict[str, Any]) -> bool:
    """Return whether the architecture can be built for a size, whatever else failed."""
    try:
        timm.create_model(section.name, pretrained=False, num_classes=0, in_chans=section.in_chans, **size)
    except Exception:
        return False
    return True


def _other_size(section: BackboneSection) -> str:
    cfg = timm.get_pretrained_cfg(section.name) if not section.elsewhere else None
    own = f", such as {cfg.input_size[-1]}, which it was made for" if cfg is not None else ""
    return f"Set it to a size that it takes{own}, or choose another backbone.name"


def _check_settings(name: str) -> None:
    """Check that what a model's folder, here or on the hub, has timm build is only a network."""
    source, _, place = name.partition(":")
    if source == "local-dir":
        check_model_folder(Path(place))
    elif source == "hf-hub":
        _, architecture, arguments = load_model_config_from_hf(place)
        check_model_args(architecture, arguments, name)


def _no_weights(section: BackboneSection, error: Exception) -> ModelError:
    from huggingface_hub.constants import HF_HUB_CACHE

    if section.name.startswith("local-dir:"):
        problem = f"'{section.name}' cannot be opened: {type(error).__name__}: {first_sentence(error)}"
        return ModelError(problem, key="backbone.name")
    cfg = timm.get_pretrained_cfg(section.name) if not section.elsewhere else None
    if cfg is not None and not cfg.has_weights:
        tagged = timm.list_pretrained(section.name.split(".")[0])
        remedy = f"There are: {', '.join(tagged)}" if tagged else "Use weights: none, or the path of a file."
        problem = f"timm has no pretrained weights for '{section.name}'"
        return ModelError(problem, key="backbone.weights", remedy=remedy)
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
    return ModelError(
        f"the pretrained weights of '{section.name}' are not in the cache {HF_HUB_CACHE} and cannot be fetched from "
        f"the hub{offline}: {type(error).__name__}: {first_sentence(error)}",
        key="backbone.weights",
        remedy="Run once where the hub can be reached and copy that folder here (HF_HOME is its place); give a file, "
        "backbone.weights=PATH.safetensors; or train from scratch, backbone.weights=none.",
    )


def _pretrained_origin(model: nn.Module) -> str:
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    place = cfg.get("hf_hub_id") or cfg.get("url") or cfg.get("file") or "timm"
    tag = f".{cfg['tag']}" if cfg.get("tag") else ""
    return f"pretrained {cfg.get('architecture', type(model).__name__)}{tag} from {place}"


def _load_from_elsewhere(model: nn.Module, section: BackboneSection) -> WeightsReport:
    """Load the weights of a folder, or of the hub, whose settings the model was built from."""
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    source, _, place = section.name.partition(":")
    try:
        with cache_only_when_unreachable():
            path = weights_in(Path(place)) if source == "local-dir" else hub_weights(place, cfg.get("hf_hub_filename"))
        if cfg.get("custom_load") and path.suffix == ".npz":  # of JAX: arrays only, and timm alone knows their names
            model.load_pretrained(str(path))  # type: ignore[operator]
            return WeightsReport(_pretrained_origin(model), 0, 0, state_digest(model.state_dict()))
    except ModelError as error:
        raise error.recast(ModelError, error.key or "backbone.name") from error
    except Exception as error:
        raise _no_weights(section, error) from error
    report = load_file(model, section.model_copy(update={"weights": str(path)}))
    return replace(report, origin=_pretrained_origin(model))


def _load_bundled(model: nn.Module, section: BackboneSection) -> WeightsReport:
    """Load weights that ship with tlscale, and give the model the settings of the images they were made with."""
    weights = bundled(section.name)
    if (found := file_sha256(weights.path)) != weights.sha256:
        raise ModelError(
            f"'{weights.path}' is not the file that ships with tlscale: its SHA-256 is {found}, not {weights.sha256}",
            remedy="Install tlscale again",
            key="backbone.weights",
        )
    report = load_file(model, section.model_copy(update={"weights": str(weights.path), "min_matched": 1.0}))
    model.pretrained_cfg = {**model.pretrained_cfg, **weights.pretrained_cfg}  # type: ignore[assignment, dict-item]
    return replace(report, origin=f"bundled {section.name} (tlscale/weights/{weights.path.name})")
