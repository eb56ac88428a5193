"""Build a classifier that also predicts a teacher's codes, from any of its layers.

Promise: it is the same backbone and head, by the same parameter names, as without a teacher; what is there for the
teacher's sake is below `projections`, and no exported model has it.

Shapes: B images, C classes, D numbers of the teacher's codes that are predicted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tlscale.errors import ModelError
from tlscale.models.classifier import Classifier
from tlscale.models.features import LayerCodes, features_and_codes
from tlscale.recipe.image_size import ImageSize, height_width


class Student(Classifier):
    """Turn images (B, in_chans, H, W) into logits and predicted codes, side by side: (B, C + D).

    Args:
        backbone: a timm model without classifier.
        head: its features to logits (B, C).
        matches: for each code of the teacher the layers of the student that it is predicted from, by one linear layer
            on their codes (means over positions) side by side, and the code's width.
        image_size, in_chans: of the student's input.
        labels_teach: False: the head's gradient ends at the features, so that the backbone learns nothing of labels.
        seed: of the projections' initial weights; the global generator is left as it was.

    Raises:
        ModelError: the backbone has no such layer, or one that gives no code.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Sequential,
        matches: Sequence[tuple[Sequence[str], int]],
        *,
        image_size: ImageSize,
        in_chans: int,
        labels_teach: bool,
        seed: int,
    ) -> None:
        super().__init__(backbone, head)
        self._layers = [list(layers) for layers, _ in matches]
        self._wanted = list(dict.fromkeys((layer, "avg") for layers in self._layers for layer in layers))
        self._labels_teach = labels_teach
        self.projections = nn.ModuleList()
        if self._wanted:
            with _naming_the_key():
                rows = LayerCodes(backbone, self._wanted).describe(torch.zeros(2, in_chans, *height_width(image_size)))
            width = {row.layer: row.width for row in rows}
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                for layers, wanted in matches:
                    self.projections.append(nn.Linear(sum(width[layer] for layer in layers), wanted))

    def forward(self, images: Tensor) -> Tensor:
        if not self._wanted:
            return super().forward(images)
        with _naming_the_key():
            features, codes = features_and_codes(self.backbone, self._wanted, images)
        code = {layer: codes_BD for (layer, _), codes_BD in zip(self._wanted, codes, strict=True)}
        logits_BC = self.head(features if self._labels_teach else features.detach())
        predicted = [
            projection(torch.cat([code[layer] for layer in layers], 1))
            for projection, layers in zip(self.projections, self._layers, strict=True)
        ]
        return torch.cat([logits_BC, *predicted], 1)


@contextmanager
def _naming_the_key() -> Iterator[None]:
    """Name the key that the layers are from in errors about them."""
    try:
        yield
    except ModelError as error:
        if error.key != "codes.layer":
            raise
        raise error.recast(ModelError, "distill.match", before="student: ") from error
