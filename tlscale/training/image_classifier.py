"""Use a finished run's model in Python: give it images, get labels and probabilities, or features.

Promise: images are read as the run read its own, and take the run's own way through the network.

Shapes: N images, C classes, D features.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from tlscale.codes.shards import BLOCK
from tlscale.data.given import Given, InMemory, find_images, name_of
from tlscale.data.input_spec import InputSpec
from tlscale.data.sources.folds import FOLDS
from tlscale.distributed.processes import Processes
from tlscale.errors import DataError, ModelError, TlscaleError, first_few, one_line, option, speaks_python
from tlscale.models import model_folder
from tlscale.models.features import PENULTIMATE
from tlscale.models.model_folder import TrainedModel
from tlscale.recipe.image_size import size_in_words
from tlscale.storage.files import refuse_no_place, replacing, reporting_disk_errors
from tlscale.training.prediction_rows import Answers, Cell, Columns, answer, csv_line, read_blocks
from tlscale.training.predictions import NO_ANSWER, readable
from tlscale.training.run_path import FeaturesPath, RunFacts, RunPath, computing

Images = str | os.PathLike[str] | bytes | InMemory | Iterable["str | os.PathLike[str] | bytes | InMemory"]


@dataclass(frozen=True, repr=False, eq=False)
class Predictions:
    """Hold what a model says of some images, in the order given."""

    classes: tuple[str, ...]
    paths: list[str]
    """Empty for an image in memory."""
    labels: list[Any]
    """The class of each image; of several labels a tuple of classes, which may be empty. None: there is no answer."""
    probabilities: npt.NDArray[np.float32]
    """(N, C), in the order of `classes`; NaN where there is no answer. Of several labels each is by itself."""
    errors: list[str | None]
    """Why there is no answer."""
    _answers: list[Answers]
    _columns: Columns

    @property
    def sets(self) -> list[tuple[str, ...]] | None:
        """Return a set of labels of each image, likeliest first; the true one is in it as often as it says.

        That is 90 % of cases, for images like those of the run. None of a model without a calibration; an empty set
        where there is no answer.
        """
        sets = self._columns.sets
        if sets is None:
            return None
        members = (numbers for some in self._answers for numbers in some.members(sets))
        return [tuple(self.classes[number] for number in numbers) for numbers in members]

    @property
    def unknown(self) -> list[bool | None] | None:
        """Tell which images are unlike those of training; 5 % of images of known classes are taken for such.

        None of a model that cannot tell (where it came with a score that its folder does not suffice for, that is said
        on standard error), and of an image that has no answer.
        """
        if self._columns.unknown_from is None:
            return None
        return [one for some in self._answers for one in self._columns.unknown(some)]

    def __len__(self) -> int:
        return len(self.paths)

    def __repr__(self) -> str:
        failed = sum(why is not None for why in self.errors)
        labels = [label for one in self.labels for label in (one if isinstance(one, tuple) else (one,))]
        counts = {name: labels.count(name) for name in self.classes if name in labels}
        shown = first_few([f"{name!r}: {count:,}" for name, count in sorted(counts.items(), key=lambda one: -one[1])])
        unread = f", {failed:,} without an answer" if failed else ""
        return f"Predictions({len(self):,} image{'s' * (len(self) != 1)}{unread}; {shown or 'no label'})"

    @speaks_python
    def to_pandas(self, *, top_k: int = 1, all_probabilities: bool = False) -> Any:  # noqa: ANN401 (a DataFrame)
        """Make a data frame of the columns that the command writes.

        Raises:
            TlscaleError: pandas is not installed, or more labels are wanted than there are classes.
        """
        try:
            import pandas
        except ImportError:
            raise TlscaleError("pandas is not installed", remedy="Install it: pip install pandas") from None
        columns = checked_columns(self._columns, top_k, all_probabilities=all_probabilities)
        return pandas.DataFrame(list(self._rows(columns)), columns=columns.names)

    @speaks_python
    def to_csv(self, path: str | os.PathLike[str], *, top_k: int = 1, all_probabilities: bool = False) -> None:
        """Write them as the command does: to a file that is complete, or not there.

        Raises:
            TlscaleError: the file cannot be written, or more labels are wanted than there are classes.
        """
        columns = checked_columns(self._columns, top_k, all_probabilities=all_probabilities)
        file_to = Path(path)
        refuse_no_place(file_to, "path")
        with (
            reporting_disk_errors(),
            replacing(file_to) as aside,
            aside.open("w", encoding="utf-8", newline="") as file,
        ):
            file.write(csv_line(columns.names))
            file.writelines(map(csv_line, self._rows(columns)))

    def _rows(self, columns: Columns) -> Iterator[list[Cell]]:
        start = 0
        for answers in self._answers:
            yield from columns.rows([readable(path) for path in self.paths[start : start + len(answers)]], answers)
            start += len(answers)


def checked_columns(plain: Columns, top_k: int, *, all_probabilities: bool) -> Columns:
    """Choose columns, further ones than those of the model.

    Raises:
        DataError: as many labels as are wanted do not exist.
    """
    num_classes = len(plain.classes)
    if plain.several and top_k != 1:
        problem = "the model answers with any number of labels, and the probabilities of all"
        raise DataError(problem, key=option("top-k"), remedy="Take it out")
    if not 1 <= top_k <= num_classes:
        remedy = f"Give 1 to {num_classes:,}"
        raise DataError(
            f"{top_k} labels of a model that has {num_classes:,} classes", key=option("top-k"), remedy=remedy
        )
    return replace(plain, top_k=top_k, all_probabilities=all_probabilities)


class Features(np.ndarray[tuple[int, int], np.dtype[np.float32]]):
    """Features of some images, in the order given: an array (N, D), float32, with two attributes more.

    What is made of it (a row, a slice, a product) is an array like any other, and has neither of them.
    """

    paths: Sequence[str] = ()
    """Empty for an image in memory."""
    errors: Sequence[str | None] = ()
    """Why an image cannot be read, and its row is NaN; else None."""


@dataclass(frozen=True, repr=False)
class ImageClassifier(TrainedModel):
    """The model of a run: `model(images)` gives logits for prepared images, and `predict` takes any images."""

    folder: Path = field(default=Path())
    """The run's."""
    _last: list[Any] = field(default_factory=list, compare=False)

    def __repr__(self) -> str:
        spec = self.input_spec
        name = (getattr(getattr(self.model, "backbone", self.model), "pretrained_cfg", None) or {}).get("architecture")
        size = f"{size_in_words(spec.image_size)} x {spec.in_chans}"
        kind = name or type(self.model).__name__
        score = "; scored by folds, fitted to all images" if self.scored_on == FOLDS else ""
        return f"ImageClassifier({str(self.folder)!r}: {kind}, {len(self.classes):,} classes, images of {size}{score})"

    def columns(self, path: RunPath | None = None) -> Columns:
        """Return the columns of its predictions; not on every path there are codes to tell what is unknown by."""
        sets = None if self.calibration is None else self.calibration.sets
        unknown = self.unknown if path is None else path.unknown
        unknown_from = None if unknown is None else unknown.settings.threshold
        return Columns(self.classes, sets=sets, unknown_from=unknown_from, several=self.thresholds is not None)

    @cached_property
    def facts(self) -> RunFacts:
        """What the run folder tells of the way to logits."""
        return RunFacts.of(self.folder)

    @speaks_python
    def predict(self, images: Images, *, batch_size: int | None = None) -> Predictions:
        """Read images and classify them, on the device and in the precision of the run.

        Args:
            images: paths (of files, or of folders, which are searched through), globs, the bytes of image files, images
                of Pillow's, arrays (H x W or H x W x C, or N of them; uint8, or any numbers where the run has
                `data.range`), mixed as you like; or one of them.
            batch_size: of what was trained; by default the run's own, with which the run's own test images get the
                very bits that they got in the run.

        Raises:
            DataError: nothing was found, or not one image can be read. A single one that cannot has its `errors`.
        """
        given = _checked(images, batch_size, self.input_spec)
        answers: list[Answers] = []
        with computing(self.facts) as processes:
            path = self._path(processes, batch_size)
            for sizes in path.batching.chunks():
                start = sum(map(len, answers))
                if start >= len(given):
                    break
                answers.append(answer(given[start : start + sum(sizes)], sizes, path, processes))
        made = self._predictions(given, answers, path)
        refuse_none_read(len(made), sum(why is None for why in made.errors), made.paths[0], made.errors[0])
        return made

    @speaks_python
    def features(
        self, images: Images, *, layer: str = PENULTIMATE, pool: str = "avg", batch_size: int | None = None
    ) -> Features:
        """Read images and compute features of them (embeddings), on the device and in the precision of the run.

        Args:
            images: as `predict` takes them.
            layer: a module of the backbone by its name, such as `layer3` or `blocks.4`; or `penultimate`, what the
                backbone gives after its own pooling.
            pool: what becomes of the layer's positions: `avg`, `max`, `avgmax`, `token` or `none`.
            batch_size: images that go through the network at once; by default the size in which codes are computed,
                with which the run's own images get the very bits that its probe was fitted to.

        Returns:
            An array (N, D), float32, in the order given, with `paths` and `errors`; NaN where an image cannot be read.

        Raises:
            DataError: nothing was found, or not one image can be read. A single one that cannot has its `errors`.
            ModelError: no such layer or pool, or a layer that gives no one vector an image.
        """
        given = _checked(images, batch_size, self.input_spec)
        errors: list[str | None] = []
        try:
            with computing(self.facts) as processes:
                path = FeaturesPath(self, self.facts, processes, (layer, pool), batch_size or BLOCK)
                blocks = read_blocks(given, path, errors, block=path.block)
                parts = [path(block_BCSS).float().cpu().numpy() for block_BCSS in blocks]
        except ModelError as error:
            key = error.key and error.key.removeprefix("codes.")  # it is a key of recipes, too
            raise error.recast(ModelError, key) from error
        sound_N = np.array([why is None for why in errors], dtype=bool)
        refuse_none_read(len(given), int(sound_N.sum()), name_of(given[0]), errors[0])
        values_ND = np.full((len(given), parts[0].shape[1]), np.nan, np.float32)
        values_ND[sound_N] = np.concatenate(parts)
        made = values_ND.view(Features)
        made.paths, made.errors = [name_of(one) for one in given], errors
        return made

    def _path(self, processes: Processes, batch_size: int | None) -> RunPath:
        """Return the way to logits; that of the last call, where nothing has changed: to find it may take seconds."""
        tensors = (*self.model.parameters(), *self.model.buffers())
        key = batch_size, processes.device, [(id(tensor), tensor._version) for tensor in tensors]
        if not self._last or self._last[0] != key:
            self._last[:] = key, RunPath(self, self.facts, processes, batch_size=batch_size)
            if processes.is_main and self._last[1].note is not None:
                print(f"tlscale: {one_line(self._last[1].note)}", file=sys.stderr)
        path: RunPath = self._last[1]
        return path

    def _predictions(self, given: list[Given], answers: list[Answers], path: RunPath) -> Predictions:
        labels = [label for some in answers for label in self._labels(some)]
        return Predictions(
            self.classes,
            [name_of(one) for one in given],
            labels,
            np.concatenate([some.probabilities_NC for some in answers]).astype(np.float32),
            [why for some in answers for why in some.errors],
            answers,
            self.columns(path),
        )

    def _labels(self, answers: Answers) -> Iterator[str | tuple[str, ...] | None]:
        if self.thresholds is None:
            for number in answers.labels_N.tolist():
                yield None if number == NO_ANSWER else self.classes[number]
            return
        for labels_C, why in zip(answers.labels_N, answers.errors, strict=True):
            yield tuple(self.classes[i] for i in np.flatnonzero(labels_C)) if why is None else None


def _checked(images: Images, batch_size: int | None, spec: InputSpec) -> list[Given]:
    """List images one by one.

    Raises:
        DataError: there are none, or no such batch.
    """
    if batch_size is not None and batch_size < 1:
        raise DataError(f"{batch_size} is no number of images", key="batch_size", remedy="Give 1 or more")
    notes: list[str] = []
    given = list(_each(images, notes, spec))
    if not given:
        raise DataError("; ".join(notes) or "no image was given")
    return given


def refuse_none_read(num_given: int, num_read: int, path: str, why: str | None) -> None:
    """Refuse images of which none has an answer; the first is named.

    Raises:
        DataError: there are none.
    """
    if num_read == 0:
        of = "the image" if num_given == 1 else f"none of the {num_given:,} images"
        problem = f"{of} cannot be read" if num_given == 1 else f"{of} can be read; the first"
        raise DataError(f"{problem}: {f'{path}: ' if path else ''}{why}")


def _each(images: Images, notes: list[str], spec: InputSpec) -> Iterator[Given]:
    if isinstance(images, str | os.PathLike):
        yield from find_images([images], notes.append)
    elif isinstance(images, Image.Image | bytes):
        yield images
    elif isinstance(images, np.ndarray) and images.dtype != object:
        channels = images.shape[0 if spec.channels_first else 2] if images.ndim == 3 else None
        is_one = images.ndim < 3 or channels in (1, 3, spec.in_chans)
        yield from [images] if is_one else images
    elif hasattr(images, "__iter__") and not isinstance(images, torch.Tensor):
        for one in images:
            yield from [one] if isinstance(one, np.ndarray) else _each(one, notes, spec)
    else:
        kind = type(images).__name__
        raise DataError(
            f"a {kind} is no image", key="images", remedy="Give paths, bytes, images of Pillow's, or arrays"
        )


def load(run: str | os.PathLike[str]) -> ImageClassifier:
    """Load the model of a run folder (or of its `model/` folder), in eval mode on the CPU.

    Raises:
        RunFolderError: there is no model there, a damaged one, or one of a newer format.
    """
    loaded = model_folder.load(Path(run))
    return ImageClassifier(**vars(loaded), folder=Path(run))
