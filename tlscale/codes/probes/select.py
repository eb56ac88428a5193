"""Probes: classifiers fitted to codes at once, with their one hyper-parameter chosen on held-out training images.

Promise: a pure function of codes, labels and settings; nothing is random. Codes are standardised with mean and
standard deviation of the images that the classifier is fitted to. The held-out images choose (highest top1; among
equals the lowest loss, then the strongest regularisation); the test split is never seen here. What comes out is a
module from raw codes to logits, the standardisation folded in.

| kind | grid | solved by |
|---|---|---|
| `logistic` | `lam` (see `solvers`) | quasi-Newton, all strengths side by side |
| `ridge` | `lam` | one eigendecomposition; scores scaled by those of left-out images: their softmax is a probability |
| `knn` | number of neighbours | the votes of the nearest by cosine of standardised codes |
| `sklearn` | `lam` | scikit-learn's LogisticRegression, once a strength |

Letters: N training images, M held-out images, B images of a batch, D features, C classes, K neighbours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tlscale.codes.probes.linear import LINEAR_KINDS, LinearPath, linear_path
from tlscale.errors import DataError, ModelError, RecipeError, did_you_mean
from tlscale.models.knn import KnnHead

Array: TypeAlias = Tensor | npt.NDArray[Any]

PROBE_KINDS = (*LINEAR_KINDS, "knn")
_STRENGTHS = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
_NEIGHBOURS = (1, 3, 5, 10, 20, 50, 100, 200)


@dataclass(frozen=True)
class PathRow:
    """One value of the grid: what the held-out images say of it (None where there are none)."""

    setting: float
    held_top1: float | None
    held_loss: float | None
    converged: bool

    def rank(self) -> tuple[float, float, float]:
        """The smallest is the best: highest top1, then lowest loss, then strongest regularisation."""
        assert self.held_top1 is not None
        assert self.held_loss is not None
        # A larger lam and more neighbours both mean a smoother classifier.
        return -self.held_top1, self.held_loss, -self.setting


@dataclass(frozen=True, eq=False)
class FittedProbe:
    """A classifier of codes, and how it was chosen."""

    kind: str
    chosen: PathRow
    path: tuple[PathRow, ...]
    """All of the grid, in its order."""
    num_images: int
    """That `head` was fitted to: with `refit`, the held-out ones too."""
    converged: bool  # the last fit
    head: nn.Module
    before_refit: nn.Module
    """Fitted to the training images alone: what the held-out images can score. `head` itself without a refit."""

    @property
    def refitted(self) -> bool:
        """Whether `head` was fitted to the held-out images as well, so that they cannot score it."""
        return self.head is not self.before_refit

    def module(self) -> nn.Module:
        """Raw codes (B, D) -> logits (B, C), in float32: `nn.Linear`, or `KnnHead`. On the device of the codes."""
        return self.head


@dataclass(frozen=True, eq=False)
class Choice:
    """The best of several sets of codes."""

    name: str
    probe: FittedProbe
    table: dict[str, tuple[PathRow, ...]]
    """The path of each set, in the order in which they were tried."""


def default_grid(kind: str, num_images: int) -> tuple[float, ...]:
    """What is tried where the recipe names no grid; for `knn` only as many neighbours as there are images."""
    if kind != "knn":
        return _STRENGTHS
    return tuple(float(k) for k in _NEIGHBOURS if k <= num_images)


def fit_probe(
    kind: str,
    codes_ND: Array,
    labels_N: Array,
    held_codes_MD: Array,
    held_labels_M: Array,
    *,
    num_classes: int,
    grid: Sequence[float] | None = None,
    refit: bool = True,
) -> FittedProbe:
    """Fit one classifier to codes.

    Args:
        kind: logistic, ridge, knn or sklearn.
        codes_ND: of training images; float of any precision, tensor (its device does the work) or array.
        labels_N: int64, 0..C-1. Some class may have no image.
        held_codes_MD: of the part of train that is held out; M may be 0 where the grid has one value.
        held_labels_M: theirs.
        num_classes: C.
        grid: values of the hyper-parameter; None: `default_grid`.
        refit: fit the chosen setting again, to training and held-out images together, standardised by all of them.
            False: keep what was fitted to the training images alone.

    Raises:
        RecipeError: the kind is unknown, the grid is wrong, or there is nothing to choose by.
        ModelError: codes that are not finite, or that are the same for every image.
        DataError: fewer than two classes.
    """
    train, held = _Images.of(codes_ND, labels_N, "training"), _Images.of(held_codes_MD, held_labels_M, "held-out")
    return _finish(_select(kind, train, held, num_classes, grid), train, held, num_classes, refit)


def choose(
    kind: str,
    candidates: Mapping[str, tuple[Array, Array]] | Iterable[tuple[str, tuple[Array, Array]]],
    labels_N: Array,
    held_labels_M: Array,
    *,
    num_classes: int,
    grid: Sequence[float] | None = None,
    refit: bool = True,
) -> Choice:
    """Fit a classifier to each of several sets of codes (layers, poolings) and keep the best by held-out images.

    Among equals the first is kept. Arguments and errors are those of `fit_probe`, except:

    Args:
        candidates: name -> (codes_ND, held_codes_MD); or an iterator of such pairs, of which one at a time is held in
            memory.
    """
    best: Choice | None = None
    table: dict[str, tuple[PathRow, ...]] = {}
    for name, codes in candidates.items() if isinstance(candidates, Mapping) else candidates:
        train, held = _Images.of(codes[0], labels_N, "training"), _Images.of(codes[1], held_labels_M, "held-out")
        if table and not len(held.labels):
            raise cannot_compare(next(iter(table)), name)
        assert name not in table, "names of candidates differ"
        selected = _select(kind, train, held, num_classes, grid)
        table[name] = selected.path
        if best is None or selected.chosen.rank() < best.probe.chosen.rank():
            best = Choice(name, _finish(selected, train, held, num_classes, refit), table)
        del codes, train, held  # before the next ones are made
    assert best is not None, "there is a candidate"
    return best


def cannot_compare(first: str, second: str) -> RecipeError:
    """What to say where there are several sets of codes and no held-out images."""
    return RecipeError(
        f"codes.layer: {first!r} and {second!r} cannot be compared without held-out images. "
        "Set data.validation_fraction above 0 (0.1, say), or name one layer and one pooling"
    )


# -- input ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Images:
    codes: Tensor  # as they came
    labels: Tensor

    @classmethod
    def of(cls, codes: Array, labels: Array, name: str) -> _Images:
        codes, labels = _tensor(codes), _tensor(labels)
        assert codes.ndim == 2, f"codes are (images, features), not {tuple(codes.shape)}"
        assert labels.shape == codes.shape[:1], f"{len(codes)} codes and labels of shape {tuple(labels.shape)}"
        bad = int((~codes.isfinite()).any(dim=1).sum())
        if bad:
            raise ModelError(
                f"the codes of {bad:,} of {len(codes):,} {name} images hold NaN or infinity. Compute them in float32 "
                "(compute.precision: fp32), and look whether the weights are sound"
            )
        return cls(codes, labels.to(codes.device, torch.int64))

    def __add__(self, other: _Images) -> _Images:
        return _Images(torch.cat([self.codes, other.codes]), torch.cat([self.labels, other.labels]))


def _tensor(array: Array) -> Tensor:
    if isinstance(array, Tensor):
        return array.detach()
    # torch warns of arrays that it could write to and must not, such as memory maps of the store.
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def checked_grid(kind: str, grid: Sequence[float] | None, num_images: int, num_held: int) -> tuple[float, ...]:
    """The values that are tried with so many training and held-out images.

    Raises:
        RecipeError: the kind is unknown, a value is wrong, or there is nothing to choose by.
    """
    if kind not in PROBE_KINDS:
        raise RecipeError(
            f"probe.kind: {kind!r} is not a kind of probe.{did_you_mean(kind, PROBE_KINDS)} "
            f"There are {', '.join(PROBE_KINDS)}"
        )
    values = default_grid(kind, num_images) if grid is None else tuple(float(value) for value in grid)
    least, key = (1, "probe.neighbours") if kind == "knn" else (0, "probe.strengths")
    for value in values:
        if kind == "knn" and not (value.is_integer() and 1 <= value <= num_images):
            raise RecipeError(
                f"probe.neighbours: {value:g}: it takes a whole number from 1 to the number of training images, "
                f"here {num_images:,}"
            )
        if not least <= value < float("inf") or value == 0:
            raise RecipeError(f"probe.strengths: {value:g} is no strength of regularisation; it takes a number above 0")
    if not values or len(set(values)) < len(values):
        raise RecipeError(f"{key}: {list(values)} must hold one value or more, all different")
    if len(values) > 1 and not num_held:
        raise RecipeError(
            f"{key}: {len(values)} values, and no held-out images to choose by. Set data.validation_fraction "
            f"above 0 (0.1, say), or name one value, such as {key}=[{values[len(values) // 2]:g}]"
        )
    return values


def _check_training(train: _Images, held: _Images, num_classes: int) -> None:
    assert held.codes.shape[1] == train.codes.shape[1], "training and held-out codes have the same features"
    for images in (train, held):
        assert not len(images.labels) or int(images.labels.min()) >= 0, "labels start at 0"
        assert not len(images.labels) or int(images.labels.max()) < num_classes, f"labels end below {num_classes}"
    classes = torch.unique(train.labels).tolist()
    if len(classes) < 2:
        raise DataError(
            f"the {len(train.labels):,} training images are of {'class ' + str(classes[0]) if classes else 'no class'}"
            " alone; a probe needs two classes or more. Raise data.train_limit, or look at the labels"
        )
    if not (train.codes != train.codes[0]).any():
        raise ModelError(
            f"the codes of all {len(train.labels):,} training images are the same: nothing can be learnt from them. "
            "Name another layer or pooling under codes, and look whether the weights are sound"
        )


# -- selection --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Selected:
    kind: str
    path: tuple[PathRow, ...]
    chosen: PathRow
    head: nn.Module


def _select(kind: str, train: _Images, held: _Images, num_classes: int, grid: Sequence[float] | None) -> _Selected:
    """Fit all of the grid to the training images, and look at the held-out ones."""
    values = checked_grid(kind, grid, len(train.labels), len(held.labels))
    _check_training(train, held, num_classes)
    if kind == "knn":
        head = _knn_head(train, int(max(values)), num_classes)
        rows = _knn_rows(head, held, values)
        chosen = min(rows, key=PathRow.rank) if len(rows) > 1 else rows[0]
        return _Selected(kind, rows, chosen, KnnHead(head.state(), int(chosen.setting), num_classes))
    mean_D, std_D, codes_ND = _standardise(train.codes)
    path = linear_path(kind, codes_ND, train.labels, num_classes, values)
    rows = _linear_rows(path, (held.codes.to(mean_D) - mean_D) / std_D, held.labels, values)
    chosen = min(rows, key=PathRow.rank) if len(rows) > 1 else rows[0]
    return _Selected(kind, rows, chosen, _folded(path, rows.index(chosen), mean_D, std_D))


def _finish(selected: _Selected, train: _Images, held: _Images, num_classes: int, refit: bool) -> FittedProbe:
    before_refit = selected.head.eval()
    head, converged, chosen = before_refit, selected.chosen.converged, selected.chosen
    refit = refit and len(held.labels) > 0
    images = train + held if refit else train
    if refit and selected.kind == "knn":
        head = _knn_head(images, int(chosen.setting), num_classes)
    elif refit:
        mean_D, std_D, codes_ND = _standardise(images.codes)
        linear = linear_path(selected.kind, codes_ND, images.labels, num_classes, (chosen.setting,))
        head, converged = _folded(linear, 0, mean_D, std_D), linear.converged[0]
    return FittedProbe(selected.kind, chosen, selected.path, len(images.labels), converged, head.eval(), before_refit)


def _figures(logits_MC: Tensor, labels_M: Tensor) -> tuple[float | None, float | None]:
    """top1 (fraction) and mean cross-entropy; None without images."""
    if not len(labels_M):
        return None, None
    labels_M = labels_M.to(logits_MC.device)
    loss = F.cross_entropy(logits_MC, labels_M)
    return float((logits_MC.argmax(1) == labels_M).double().mean()), float(loss)


# -- linear -----------------------------------------------------------------------------------------------------------


def _standardise(codes_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, standard deviation (1 where all images agree) and standardised codes: float64, (D,), (D,) and (N, D)."""
    # A device without float64 (mps) leaves the work to the CPU.
    device = torch.device("cpu") if codes_ND.device.type == "mps" else codes_ND.device
    constant_D = (codes_ND == codes_ND[0]).all(dim=0).to(device)
    result_ND = codes_ND.to(device, torch.float64, copy=True)
    mean_D = result_ND.mean(0)
    result_ND -= mean_D
    std_D = torch.where(constant_D, 1.0, result_ND.square().mean(0).sqrt())
    result_ND /= std_D
    # The mean of equal numbers may miss them by a rounding.
    result_ND[:, constant_D] = 0
    return mean_D, std_D, result_ND


def _linear_rows(
    path: LinearPath, codes_MD: Tensor, labels_M: Tensor, values: tuple[float, ...]
) -> tuple[PathRow, ...]:
    figures = [_figures(path.logits(index, codes_MD), labels_M) for index in range(len(values))]
    return tuple(
        PathRow(value, top1, loss, converged)
        for value, (top1, loss), converged in zip(values, figures, path.converged, strict=True)
    )


def _folded(path: LinearPath, index: int, mean_D: Tensor, std_D: Tensor) -> nn.Linear:
    """The layer that gives for raw codes what the classifier gives for standardised ones."""
    weights_DC = path.weights_LDC[index] / std_D[:, None]
    layer = nn.Linear(weights_DC.shape[0], weights_DC.shape[1], device=weights_DC.device)
    with torch.no_grad():
        layer.weight.copy_(weights_DC.T)
        layer.bias.copy_(path.biases_LC[index] - mean_D @ weights_DC)
    return layer


# -- nearest neighbours -----------------------------------------------------------------------------------------------


def _knn_head(images: _Images, k: int, num_classes: int) -> KnnHead:
    mean_D, std_D, codes_ND = _standardise(images.codes)
    state = {
        "codes_ND": F.normalize(codes_ND, dim=1).float(),
        "labels_N": images.labels.to(mean_D.device),
        "mean_D": mean_D.float(),
        "std_D": std_D.float(),
    }
    return KnnHead(state, k, num_classes)


def _knn_rows(head: KnnHead, held: _Images, values: tuple[float, ...]) -> tuple[PathRow, ...]:
    if not len(held.labels):
        return tuple(PathRow(value, None, None, True) for value in values)
    cosines_MK, labels_MK = head.neighbours(held.codes)
    nearest = ((int(value), value) for value in values)
    figures = ((value, head.votes(cosines_MK[:, :k], labels_MK[:, :k])) for k, value in nearest)
    return tuple(PathRow(value, *_figures(votes_MC, held.labels), True) for value, votes_MC in figures)
