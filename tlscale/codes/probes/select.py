"""Choose a probe: the codes and the hyper-parameter by held-out images, and fit it.

Promise: a pure function of codes, labels and settings; nothing is random. Codes are standardised with mean and
standard deviation of the images that the classifier is fitted to. The held-out images choose (highest top1, or of
several labels an image mAP; among equals the lowest loss, then the strongest regularisation); the test split is never
seen here. What comes out is a
module from raw codes to logits, the standardisation folded in.

Letters: N training images, M held-out images, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tlscale.codes.parts import layer_name, wanted_layers
from tlscale.codes.probes.class_figures import figure_by, rank_of
from tlscale.codes.probes.kinds import Fit, ProbeKind, kind_of
from tlscale.codes.probes.ranking import mean_average_precision
from tlscale.errors import DataError, ModelError, RecipeError
from tlscale.models.views import mean_of_views
from tlscale.recipe.schema import CodesSection, ProbeSection

Array: TypeAlias = Tensor | npt.NDArray[Any]
Weigh: TypeAlias = Callable[[Tensor], Tensor]
"""From labels (N,) to the weight of each class (C,), of which those of the images have a mean of 1."""


@dataclass(frozen=True)
class PathRow:
    """Hold a value of the hyper-parameter, and its figures on the held-out images.

    They are None where there are no such images, and where the value was rejected on a sample of the training images.
    Of several labels an image `held_top1` is mAP.
    """

    setting: float
    held_top1: float | None
    held_loss: float | None
    converged: bool
    held_figure: float | None = None
    """That which chooses, where it is another one than these two."""

    def rank(self, select: str = "top1") -> tuple[float, float, float]:
        """Return a sort key, the smallest for the best: by what chooses, then the lowest loss, then the smoothest."""
        assert self.held_top1 is not None
        assert self.held_loss is not None
        return *rank_of(select, self.held_top1, self.held_loss, self.held_figure), -self.setting


@dataclass(frozen=True, eq=False)
class FittedProbe:
    """Hold a classifier of codes, and how it was chosen."""

    kind: str
    chosen: PathRow
    path: tuple[PathRow, ...]
    """All values that were tried, in their order."""
    num_images: int
    """That `head` was fitted to: with `refit`, the held-out ones too."""
    converged: bool  # the last fit
    head: nn.Module
    """Raw codes (B, D) to logits (B, C), in float32, on the device of the codes."""
    before_refit: nn.Module
    """Fitted to the training images alone, so that held-out images can score it. `head` itself without a refit."""

    @property
    def refitted(self) -> bool:
        """Report whether `head` was fitted to the held-out images as well, so that they cannot score it."""
        return self.head is not self.before_refit


@dataclass(frozen=True, eq=False)
class Choice:
    """Hold the best of several sets of codes."""

    name: str
    probe: FittedProbe
    table: dict[str, tuple[PathRow, ...]]
    """The path of each set, in the order in which they were tried."""


class Kept(Protocol):
    """Keep what is fitted to each set of codes; see `kept.KeptFits`."""

    def key(
        self, kind: str, values: Sequence[float], refit: bool, arrays: Sequence[Tensor], more: Sequence[Any] = ()
    ) -> str: ...

    def find(self, digest: str) -> tuple[tuple[PathRow, ...], FittedProbe | None] | None: ...

    def keep(self, digest: str, rows: Sequence[PathRow], probe: FittedProbe | None) -> None: ...


def choose(
    kind: str,
    candidates: Iterable[tuple[str, tuple[Array, Array | Sequence[Array]]]],
    labels_N: Array,
    held_labels_M: Array,
    *,
    num_classes: int,
    grid: Sequence[float] | None = None,
    refit: bool = True,
    kept: Kept | None = None,
    weigh: Weigh | None = None,
    select: str = "top1",
) -> Choice:
    """Fit a classifier to each of several sets of codes, and keep the best by held-out images, of equals the first.

    Args:
        candidates: pairs of a name and (codes_ND, held_codes_MD): float of any precision, tensors (whose device does
            the work) or arrays. Of an iterator, one at a time is in memory. M may be 0 where there is one candidate
            and one value to try. Of several views of the held-out images a list of codes, the plain ones first: what
            chooses is the mean over them, and `refit` takes the first.
        labels_N: int64, 0..C-1; of several labels bool (N, C). Some class may have no image.
        grid: values of the hyper-parameter; None: the defaults of the kind.
        refit: fit the chosen setting again, to training and held-out images together, standardised by all of them.
            False: keep what was fitted to the training images alone.
        kept: what an earlier call that was stopped has finished, and what this one does.
        weigh: of the images of each class, by the labels of all images that are fitted; None: all weigh the same.
        select: the held-out figure that chooses, one of `evaluate.select`. None has weights.

    Raises:
        RecipeError: the kind is unknown, the grid is wrong, or there is nothing to choose by.
        ModelError: codes that are not finite, or that are the same for every image.
        DataError: fewer than two classes.
    """
    row, way = kind_of(kind), _Way(weigh, select)
    best: FittedProbe | None = None
    best_name, table = "", dict[str, tuple[PathRow, ...]]()
    for name, codes in candidates:
        train, held = _Images.of([codes[0]], labels_N, "training"), _held_images(codes[1], held_labels_M)
        if table and not len(held.labels):
            raise cannot_compare(next(iter(table)), name)
        assert name not in table, "names of candidates differ"
        values = row.setting.values(grid, len(train.labels), len(held.labels))
        arrays = (train.codes, train.labels, held.codes, held.labels, *held.other_views)
        key = "" if kept is None else kept.key(kind, values, refit, arrays, way.facts(train.labels))
        found = None if kept is None else kept.find(key)
        if found is None:
            path, probe = _fit(kind, train, held, num_classes, values, refit, way, best)
            if kept is not None:
                kept.keep(key, path, probe)
        else:
            path, probe = found
            for head in (probe.head, probe.before_refit) if probe is not None else ():
                head.to(train.codes.device)
        table[name] = path
        if probe is not None:
            best_name, best = name, probe
        del codes, train, held, arrays  # before the next ones are made
    assert best is not None, "there is a candidate"
    return Choice(best_name, best, table)


@dataclass(frozen=True)
class _Way:
    """Tell how images weigh, and what chooses."""

    weigh: Weigh | None
    select: str

    def weights(self, labels_N: Tensor) -> Tensor | None:
        """Return the weight of each class, with a mean of 1 over these images."""
        return None if self.weigh is None else self.weigh(labels_N)

    def facts(self, labels_N: Tensor) -> list[Any]:
        """Return what a fit hangs on beside its numbers; nothing of the usual way."""
        weights_C = self.weights(labels_N)
        given = [] if weights_C is None else [weights_C.tolist()]
        return given if self.select == "top1" else [*given, self.select]


def best_of(path: Sequence[PathRow], select: str = "top1") -> PathRow:
    """Return the best row by held-out images, among those that were not rejected before; the only one as it is."""
    rows = [row for row in path if row.held_top1 is not None]
    return min(rows, key=lambda row: row.rank(select)) if rows else path[0]


def refuse_wrong_probe(probe: ProbeSection, codes: CodesSection, num_train: int, num_held: int) -> None:
    """Refuse a probe that cannot be chosen, before anything is computed for it.

    Raises:
        RecipeError: there are no held-out images to choose by, or values that cannot be tried.
    """
    kind_of(probe.kind).setting.values(given_values(probe), num_train, num_held)
    names = [layer_name(pair) for pair in wanted_layers(codes)]
    if len(names) > 1 and not num_held:
        raise cannot_compare(*names[:2])


def given_values(probe: ProbeSection) -> list[float] | None:
    """Return the values that the recipe names; None: the defaults of the kind."""
    values: list[float] | None = getattr(probe, kind_of(probe.kind).setting.key)
    return values


def cannot_compare(first: str, second: str) -> RecipeError:
    """Make the error for several sets of codes without held-out images."""
    return RecipeError(
        f"{first!r} and {second!r} cannot be compared without held-out images",
        key="codes.layer",
        remedy="Set data.validation_fraction above 0 (such as 0.1), or give one layer and one pooling",
    )


# -- input ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Images:
    codes: Tensor  # as they came
    labels: Tensor
    other_views: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, views: Sequence[Array], labels: Array, name: str) -> _Images:
        labels = _tensor(labels)
        for codes in (tensors := [_tensor(view) for view in views]):
            assert codes.ndim == 2, f"codes are (images, features), not {tuple(codes.shape)}"
            assert labels.shape[:1] == codes.shape[:1], f"{len(codes)} codes and labels of shape {tuple(labels.shape)}"
            bad = int((~codes.isfinite()).any(dim=1).sum())
            if bad:
                raise ModelError(
                    f"the codes of {bad:,} of {len(codes):,} {name} images hold NaN or infinity",
                    remedy="Compute them in float32 (compute.precision: fp32), and check whether the weights are sound",
                )
        codes, *others = tensors
        return cls(codes, labels.to(codes.device, torch.int64 if labels.ndim == 1 else torch.bool), tuple(others))

    def logits(self, fit: Fit) -> Iterator[Tensor | None]:
        """Yield the logits by each classifier, of several views what has their mean probability."""
        several = self.labels.ndim == 2
        for views in zip(*map(fit.logits, (self.codes, *self.other_views)), strict=True):
            known = [logits_MC for logits_MC in views if logits_MC is not None]
            yield mean_of_views(known, several=several) if len(known) == len(views) else None

    def __add__(self, other: _Images) -> _Images:
        return _Images(torch.cat([self.codes, other.codes]), torch.cat([self.labels, other.labels]))


def _held_images(codes: Array | Sequence[Array], labels: Array) -> _Images:
    return _Images.of([codes] if isinstance(codes, Tensor | np.ndarray) else codes, labels, "held-out")


def _tensor(array: Array) -> Tensor:
    if isinstance(array, Tensor):
        return array.detach()
    # torch warns of arrays that it could write to and must not, such as memory maps of the store.
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _check_training(train: _Images, held: _Images, num_classes: int) -> None:
    assert held.codes.shape[1] == train.codes.shape[1], "training and held-out codes have the same features"
    if train.labels.ndim == 1:
        _check_classes(train, held, num_classes)
    elif not (train.labels.any(dim=0) & ~train.labels.all(dim=0)).any():
        problem = f"the {len(train.labels):,} training images all have the same labels: there is nothing to tell apart"
        raise DataError(problem, remedy="Raise data.train_limit, or check the labels")
    if not (train.codes != train.codes[0]).any():
        raise ModelError(
            f"the codes of all {len(train.labels):,} training images are the same: nothing can be learnt from them",
            remedy="Name another layer or pooling under codes, and check whether the weights are sound",
        )


def _check_classes(train: _Images, held: _Images, num_classes: int) -> None:
    for images in (train, held):
        assert not len(images.labels) or int(images.labels.min()) >= 0, "labels start at 0"
        assert not len(images.labels) or int(images.labels.max()) < num_classes, f"labels end below {num_classes}"
    classes = torch.unique(train.labels).tolist()
    if len(classes) < 2:
        raise DataError(
            f"the {len(train.labels):,} training images are of "
            f"{'class ' + str(classes[0]) if classes else 'no class'} alone, and a probe needs two classes or "
            "more",
            remedy="Raise data.train_limit, or check the labels",
        )


# -- selection --------------------------------------------------------------------------------------------------------


def _try_all(
    kind: ProbeKind, train: _Images, held: _Images, num_classes: int, values: tuple[float, ...], way: _Way
) -> tuple[Fit, tuple[PathRow, ...]]:
    """Fit every value to the training images, and score it on the held-out ones."""
    _check_training(train, held, num_classes)
    weights_C = way.weights(train.labels)
    fit = kind.fit_by_size(train.codes, train.labels, num_classes, values, weights_C=weights_C, select=way.select)
    figures: Iterable[tuple[float | None, float | None, float | None]] = [(None, None, None)] * len(values)
    if len(held.labels):
        figures = (
            (None, None, None)
            if logits_MC is None
            else (*_figures(logits_MC, held.labels), figure_by(way.select, logits_MC, held.labels))
            for logits_MC in held.logits(fit)
        )
    scored = zip(values, figures, fit.converged, strict=True)
    return fit, tuple(PathRow(value, top1, loss, done, more) for value, (top1, loss, more), done in scored)


def _fit(
    kind: str,
    train: _Images,
    held: _Images,
    num_classes: int,
    values: tuple[float, ...],
    refit: bool,
    way: _Way,
    best: FittedProbe | None,
) -> tuple[tuple[PathRow, ...], FittedProbe | None]:
    """Try all values; return them, and the classifier where it is better than the best one before."""
    fit, path = _try_all(kind_of(kind), train, held, num_classes, values, way)
    chosen = best_of(path, way.select)
    if best is not None and chosen.rank(way.select) >= best.chosen.rank(way.select):
        return path, None
    head = fit.head(path.index(chosen))
    return path, _finish(kind, head, chosen, path, train, held, num_classes, refit, way)


def _finish(
    kind: str,
    head: nn.Module,
    chosen: PathRow,
    path: tuple[PathRow, ...],
    train: _Images,
    held: _Images,
    num_classes: int,
    refit: bool,
    way: _Way,
) -> FittedProbe:
    before_refit, converged, images = head.eval(), chosen.converged, train
    if refit and len(held.labels):
        images = train + held
        values, weights_C = (chosen.setting,), way.weights(images.labels)
        again = kind_of(kind).fit_by_size(
            images.codes, images.labels, num_classes, values, before_refit, weights_C=weights_C, select=way.select
        )
        head, converged = again.head(0), again.converged[0]
    return FittedProbe(kind, chosen, path, len(images.labels), converged, head.eval(), before_refit)


def _figures(logits_MC: Tensor, labels_M: Tensor) -> tuple[float, float]:
    """Compute top1 (fraction) and mean cross-entropy; of several labels mAP and the mean binary cross-entropy."""
    labels_M = labels_M.to(logits_MC.device)
    if labels_M.ndim == 2:
        figure = mean_average_precision(logits_MC.cpu().numpy(), labels_M.cpu().numpy())
        loss = F.binary_cross_entropy_with_logits(logits_MC, labels_M.to(logits_MC.dtype))
        return figure or 0.0, float(loss)
    loss = F.cross_entropy(logits_MC, labels_M)
    return float((logits_MC.argmax(1) == labels_M).double().mean()), float(loss)
