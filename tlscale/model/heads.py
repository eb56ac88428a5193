"""What turns the features of a backbone into logits: new layers, always freshly initialised, or the nearest codes.

Shapes: B images, D features, C classes, N codes that are known, K of them nearest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tlscale.errors import ModelError
from tlscale.recipe.values import HeadLayer

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "leaky_relu": nn.LeakyReLU,
    "hardswish": nn.Hardswish,
    "elu": nn.ELU,
}

_KNN_QUERIES, _KNN_CODES = 1024, 16384  # a block of distances is 64 MiB at most


def build_head(layers: Sequence[HeadLayer], *, in_features: int, num_classes: int, seed: int) -> nn.Sequential:
    """The head of the recipe: (B, `in_features`) to (B, `num_classes`).

    Args:
        layers: the recipe's `head`, checked by the schema; the last `linear` has no width.
        in_features: D, what the backbone gives after pooling.
        num_classes: C.
        seed: of the initial weights (PyTorch's default for each layer); the global generator is left as it was.
    """
    head = nn.Sequential()
    width = in_features
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in layers:
            name, number = (layer, None) if isinstance(layer, str) else next(iter(layer.items()))
            out = int(number) if name == "linear" and number is not None else num_classes
            head.append(_build_layer(name, number, width, out))
            width = out if name == "linear" else width
    return head


def _build_layer(name: str, number: float | None, width: int, out: int) -> nn.Module:
    match name:
        case "linear":
            return nn.Linear(width, out)
        case "dropout":
            assert number is not None
            return nn.Dropout(number)
        case "layernorm":
            return nn.LayerNorm(width)
        case "batchnorm":
            return nn.BatchNorm1d(width)
        case _:
            return _ACTIVATIONS[name]()


def is_single_linear(layers: Sequence[HeadLayer]) -> bool:
    """Whether the head is what timm itself would build: at most dropout before one linear layer."""
    return all(isinstance(layer, dict) and "dropout" in layer for layer in layers[:-1])


class KnnHead(nn.Module):
    """Raw codes (B, D) to logits (B, C): the logarithm of the share of votes of the k nearest known codes.

    Distances are Euclidean between codes standardised by `mean_D` and `std_D`. One more vote is spread evenly over the
    classes, so no logit is infinite: log((votes + 1/C) / (k + 1)). Of equally near codes any may vote.

    Args:
        codes_ND: raw codes of the images that are known.
        labels_N: their classes, 0..C-1.
        mean_D, std_D: of the training codes; where `std_D` is 0 the feature is only centred.
        k: how many vote, 1..N.
        num_classes: C.

    Raises:
        ModelError: fewer than k codes are known.
    """

    codes_ND: Tensor
    labels_N: Tensor
    mean_D: Tensor
    std_D: Tensor

    def __init__(
        self, codes_ND: Tensor, labels_N: Tensor, mean_D: Tensor, std_D: Tensor, k: int, num_classes: int
    ) -> None:
        super().__init__()
        if not 1 <= k <= len(codes_ND):
            raise ModelError(f"probe: k = {k} nearest neighbours cannot be found among {len(codes_ND)} codes")
        self.k = k
        self.num_classes = num_classes
        self.register_buffer("mean_D", mean_D.clone())
        self.register_buffer("std_D", torch.where(std_D == 0, torch.ones_like(std_D), std_D))
        self.register_buffer("codes_ND", self._standardised(codes_ND))
        self.register_buffer("labels_N", labels_N.long())

    def forward(self, codes_BD: Tensor) -> Tensor:
        # In full precision under autocast too: a rounded distance is another neighbour.
        with torch.autocast(codes_BD.device.type, enabled=False):
            wanted = self._standardised(codes_BD.to(self.mean_D.dtype))
            return torch.cat([self._logits(block) for block in torch.split(wanted, _KNN_QUERIES)])

    def _standardised(self, codes: Tensor) -> Tensor:
        return (codes - self.mean_D) / self.std_D

    def _logits(self, queries_BD: Tensor) -> Tensor:
        near_BK = self._nearest(queries_BD)
        votes_BC = queries_BD.new_zeros(len(queries_BD), self.num_classes)
        votes_BC.scatter_add_(1, self.labels_N[near_BK], torch.ones_like(near_BK, dtype=votes_BC.dtype))
        return ((votes_BC + 1 / self.num_classes) / (self.k + 1)).log()

    def _nearest(self, queries_BD: Tensor) -> Tensor:
        """Rows of the k nearest codes, block by block: memory does not grow with N."""
        best = queries_BD.new_empty(len(queries_BD), 0)
        rows = self.labels_N.new_empty(len(queries_BD), 0)
        start = 0
        for block in torch.split(self.codes_ND, _KNN_CODES):
            # |q - c|^2 without |q|^2, which is the same for all c.
            distances = (block * block).sum(1) - 2 * queries_BD @ block.T
            numbers = torch.arange(start, start + len(block), device=rows.device).expand(len(queries_BD), -1)
            start += len(block)
            best, rows = torch.cat([best, distances], 1), torch.cat([rows, numbers], 1)
            best, chosen = best.topk(min(self.k, best.shape[1]), dim=1, largest=False)
            rows = rows.gather(1, chosen)
        return rows
