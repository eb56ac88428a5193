"""Open the teacher of a distillation: a network that is only asked, and what of its answers is learned.

Promise: it is in eval mode and never trained; what it says of an image depends on its weights, its input and nothing
else, and so is computed once.

Shapes: B images, C classes, D numbers of a code.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from tlscale.data.input_spec import InputSpec, resolve_input
from tlscale.errors import ModelError, RecipeError, Text, first_line
from tlscale.models.backbone import build_backbone, function_digest
from tlscale.models.classifier import Classifier, CodesClassifier
from tlscale.models.export import load
from tlscale.models.features import LayerCodes
from tlscale.models.weights import named, state_digest
from tlscale.recipe.image_size import pixels_in_words
from tlscale.recipe.schema import DataSection, DistillSection
from tlscale.recipe.sections.network import MIN_MATCHED
from tlscale.storage.files import text_sha256

_MOST_OFF = 0.05  # of proportions: sizes are multiples of a patch
LOGITS = "logits"
"""The name of the teacher's logits among its codes."""


@dataclass(frozen=True)
class Teacher:
    """Hold a network that is asked, and what is asked of it."""

    module: nn.Module
    """Images (B, in_chans, H, W) to a code (B, D) of each of `layers` and, where they are asked for, logits (B, C)."""
    backbone: nn.Module
    spec: InputSpec
    layers: tuple[str, ...]
    """Whose codes are asked for, in the recipe's order."""
    widths: dict[str, int]
    """D of each layer."""
    class_order_C: Tensor | None
    """The place of each class of the run among the teacher's logits; None where they are not asked for."""
    origin: str
    digest: str
    """SHA-256 of what it computes."""

    @property
    def asks_logits(self) -> bool:
        return self.class_order_C is not None

    def __str__(self) -> str:
        asked = [*self.layers, *([LOGITS] if self.asks_logits else [])]
        px = pixels_in_words(self.spec.image_size)
        return f"{self.origin}; at {px}; {', '.join(asked)}"

    def to_plain(self) -> dict[str, Any]:
        """For `run.json`."""
        return {"origin": self.origin, "sha256": self.digest, "input": self.spec.to_plain(), "layers": self.widths}


def open_teacher(
    section: DistillSection, seed: int, classes: Sequence[str], student: InputSpec, *, crops: bool
) -> Teacher:
    """Open the teacher that the recipe names; it sees the same part of an image as the student, at its own size.

    `crops`: training images are cropped at random (`crop` in `data.augment`).

    Raises:
        ModelError: weights that are not available, layers that are not there, an input that the teacher cannot take.
        RecipeError: a run with other classes, or with several labels an image.
        RunFolderError: no run there that has ended.
    """
    if section.run is None:
        assert section.teacher is not None
        backbone, report = build_backbone(section.teacher, image_size=section.image_size, seed=seed)
        if report.missing and section.teacher.min_matched >= MIN_MATCHED:
            raise ModelError(
                f"the teacher's file lacks tensors, or has them in another shape: {named(report.missing)}",
                remedy="Give a file of the whole network",
                key="distill.teacher.weights",
            )
        cfg: dict[str, Any] = backbone.pretrained_cfg  # type: ignore[assignment]
        # Of these only what is there is read; the mean and so on are the teacher's own.
        data = DataSection(
            source="fashion_mnist",
            image_size=section.image_size,
            crop_pct=student.crop_pct,
            range=None if student.range is None else list(student.range),
            channels_first=student.channels_first,
        )
        sizes, in_chans = [student.image_hw], section.teacher.in_chans
        _refuse_other_channels(in_chans, student, "distill.teacher.in_chans")
        measured = student.mean, student.std
        spec = resolve_input(data, in_chans=in_chans, pretrained_cfg=cfg, sizes=sizes, measure=lambda: measured)
        spec = replace(spec, crop_mode=student.crop_mode)
        _refuse_other_part(spec, student, crops=crops)
        return _asked(section, backbone, None, spec, None, f"{section.teacher.name}, {report}")
    trained = load(section.run)
    if trained.thresholds is not None and section.logits > 0:
        raise RecipeError(
            f"the run in '{section.run}' answers with several labels an image, and these data have one",
            key="distill.logits",
            remedy="Set it to 0, and learn its codes (distill.codes)",
        )
    spec = replace(
        trained.input_spec,
        image_size=section.image_size or trained.input_spec.image_size,
        crop_pct=student.crop_pct,
        crop_mode=student.crop_mode,
    )
    _refuse_other_channels(spec.in_chans, student, "distill.run")
    _refuse_other_part(spec, student, crops=crops)
    order_C = _class_order(section, trained.classes, classes) if section.logits > 0 else None
    whole = trained.model if section.logits > 0 else None
    return _asked(section, _backbone(trained.model), whole, spec, order_C, f"the run in '{section.run}'")


def _refuse_other_channels(in_chans: int, student: InputSpec, key: Text) -> None:
    """Refuse a teacher that no image of the student's could be shown to: only grey becomes RGB, and RGB grey."""
    if in_chans != student.in_chans and not {in_chans, student.in_chans} <= {1, 3}:
        problem = f"the teacher takes {in_chans} channels, and backbone.in_chans is {student.in_chans}"
        raise RecipeError(problem, key=key, remedy="Both are asked about the same images: take a teacher of as many")


def _refuse_other_part(spec: InputSpec, student: InputSpec, *, crops: bool) -> None:
    """Refuse a teacher that would be asked about another part of an image than the student sees."""
    (height, width), (student_height, student_width) = spec.image_hw, student.image_hw
    shows_all = student.crop_mode == "squash"  # whatever the proportions, which random crops have all the same
    if shows_all and not crops:
        return
    if abs(math.log(height * student_width / (width * student_height))) > _MOST_OFF:
        other = "or take crop out of data.augment" if shows_all else "or set data.crop_mode: squash, which shows all"
        raise RecipeError(
            f"the teacher sees images of {pixels_in_words(spec.image_size)}, and the student of "
            f"{pixels_in_words(student.image_size)}: other proportions, and so another part of each image",
            key="distill.image_size",
            remedy=f"Give it the student's proportions, {other}{'' if shows_all else ' of an image'}",
        )


def _asked(
    section: DistillSection,
    backbone: nn.Module,
    whole: nn.Module | None,
    spec: InputSpec,
    class_order_C: Tensor | None,
    origin: str,
) -> Teacher:
    layers = tuple(section.match)
    images_BCHW = torch.zeros(2, *spec.shape_CHW)
    try:
        codes = LayerCodes(backbone, [(layer, "avg") for layer in layers]) if layers else None
        rows = codes.describe(images_BCHW) if codes is not None else []
        if whole is not None:
            with torch.no_grad():
                whole(images_BCHW)
    except ModelError as error:  # with the key that means the same of the teacher
        keys = {"codes.layer": "distill.match", "data.image_size": "distill.image_size"}
        key = keys.get(error.key or "", error.key)
        raise error.recast(ModelError, key, before="teacher: ") from error
    except Exception as error:  # each architecture complains in its own way about images too small for it
        problem = f"the teacher cannot take images of {pixels_in_words(spec.image_size)}: {first_line(error)}"
        raise ModelError(problem, key="distill.image_size") from error
    digest = function_digest(backbone)
    if whole is not None:
        digest = text_sha256(f"{digest} {state_digest(whole.state_dict())} {whole}")
    widths = {row.layer: row.width for row in rows}
    return Teacher(_Answers(codes, whole), backbone, spec, layers, widths, class_order_C, origin, digest)


class _Answers(nn.Module):
    """Compute codes of some layers, and logits, of each image; always in eval mode."""

    def __init__(self, codes: LayerCodes | None, whole: nn.Module | None) -> None:
        super().__init__()
        self.codes, self.whole = codes, whole
        self.eval()

    def train(self, mode: bool = True) -> _Answers:
        return super().train(False)

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, ...]:
        answers: tuple[Tensor, ...] = self.codes(images_BCHW) if self.codes is not None else ()
        return answers if self.whole is None else (*answers, self.whole(images_BCHW))


def _backbone(model: nn.Module) -> nn.Module:
    """Return the backbone of an exported model, without its classifier."""
    if isinstance(model, Classifier | CodesClassifier):
        return model.backbone
    backbone = copy.deepcopy(model)
    cast(Any, backbone).reset_classifier(0)
    return backbone.eval()


def _class_order(section: DistillSection, known: Sequence[str], classes: Sequence[str]) -> Tensor:
    if set(known) != set(classes):
        other = sorted(set(known) ^ set(classes))
        raise RecipeError(
            f"the run in '{section.run}' knows other classes than the data have: "
            f"{', '.join(other[:5])}{' ...' if len(other) > 5 else ''} are in one of them only",
            key="distill.run",
            remedy="Its codes can be learned all the same (distill.match; distill.logits: 0)",
        )
    return torch.tensor([list(known).index(name) for name in classes])
