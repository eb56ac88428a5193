"""Start from the model of a finished run: `backbone.weights: run:PATH`.

Promise: the network is the run's, all of it, or there is an error; images are prepared as that run did it unless the
recipe says otherwise; and what becomes of its head is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from tlscale.errors import ModelError, RunFolderError
from tlscale.models.backbone import build_backbone
from tlscale.models.classifier import Classifier, CodesClassifier
from tlscale.models.features import PENULTIMATE
from tlscale.models.model_folder import TrainedModel, load
from tlscale.models.weights import WeightsReport, state_digest
from tlscale.recipe.image_size import ImageSize
from tlscale.recipe.schema import BackboneSection

_KEY = "backbone.weights"


def start_from_run(
    section: BackboneSection, *, image_size: ImageSize | None, seed: int
) -> tuple[nn.Module, WeightsReport, TrainedModel]:
    """Build a backbone with the weights of a finished run, and return that run's model as well.

    Args:
        section: its `weights` name the run.
        image_size: in pixels; None: the run's.
        seed: as `build_backbone`.

    Raises:
        ModelError: no such run, one without a model, or of another backbone.
    """
    try:
        earlier = load(Path(section.run))
    except RunFolderError as error:
        raise error.recast(ModelError, _KEY) from error
    theirs = _backbone_of(earlier.model)
    cfg = dict(cast(Any, theirs).pretrained_cfg)
    if not section.elsewhere and section.name.split(".")[0] != cfg["architecture"]:
        remedy = f"Write backbone.name: {cfg['architecture']}"
        raise ModelError(f"'{section.run}' has a {cfg['architecture']}, not a {section.name}", key=_KEY, remedy=remedy)
    plain = section.model_copy(update={"weights": "none"})
    model, _ = build_backbone(plain, image_size=image_size or earlier.input_spec.image_size, seed=seed)
    own, state = model.state_dict(), theirs.state_dict()
    wrong = [name for name, tensor in own.items() if name not in state or state[name].shape != tensor.shape]
    if wrong:
        name = wrong[0]
        found = tuple(state[name].shape) if name in state else "nothing"
        raise ModelError(
            f"'{section.run}' has {found} for {name}, where the network has {tuple(own[name].shape)}",
            key=_KEY,
            remedy="Write backbone.in_chans and data.image_size as they are in that run",
        )
    model.load_state_dict({name: state[name] for name in own})
    model.pretrained_cfg = cfg  # type: ignore[assignment]  # how that run prepared its images
    report = WeightsReport(f"the run {section.run}", len(own), len(own), state_digest(model.state_dict()))
    return model, report, earlier


def take_head(
    head: nn.Sequential, earlier: TrainedModel, classes: Sequence[str], report: WeightsReport
) -> WeightsReport:
    """Give a head the weights of the run's, if it is the same one of the same classes; say which in the report."""
    state = _head_state(earlier.model)
    own = head.state_dict()
    if tuple(classes) != earlier.classes:
        why = "new, as the classes are others"
    elif state is None or {name: t.shape for name, t in state.items()} != {name: t.shape for name, t in own.items()}:
        why = "new, as that run's is another one"
    else:
        head.load_state_dict(state)
        why = "of that run, too"
    return replace(report, origin=f"{report.origin}; head {why}")


def _backbone_of(model: nn.Module) -> nn.Module:
    return model.backbone if isinstance(model, Classifier | CodesClassifier) else model


def _head_state(model: nn.Module) -> dict[str, Tensor] | None:
    """Return the tensors of a head on what the backbone gives, by the names of ours; None where there is none."""
    if isinstance(model, CodesClassifier):
        is_plain = model.layer == PENULTIMATE and isinstance(model.head, nn.Sequential)
        return dict(model.head.state_dict()) if is_plain else None
    if isinstance(model, Classifier):
        return dict(model.head.state_dict())
    names: object = cast(Any, model).pretrained_cfg.get("classifier")  # timm's own model, of one linear layer
    layer = model.get_submodule(names) if isinstance(names, str) else None
    if layer is None or not isinstance(layer.weight, Tensor) or not isinstance(layer.bias, Tensor):
        return None
    return {"0.weight": layer.weight.flatten(1), "0.bias": layer.bias}
