"""Look at all images of a data set, before there is a recipe: what is in it, and what cannot be read.

Promise: every image is read and decoded as a run would do it. What a run could not use is written to the table that
`data.exclude` names, and the section that is returned opens.

Shape letters: N images that can be read.
"""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from tlscale.data.content import content_digest
from tlscale.data.decode import FORMATS, BadImageError, decode_image
from tlscale.data.folder_layout import lay_out, tables_in
from tlscale.data.formats.arrays import NPY_START
from tlscale.data.formats.dicom import is_dicom
from tlscale.data.formats.tiff import is_tiff
from tlscale.data.formats.unread import Reason
from tlscale.data.group_hint import GroupHint, hint_by_column, hint_by_path
from tlscale.data.sources.excluded import path_below, write_excluded
from tlscale.data.sources.open import read_source, source_of
from tlscale.data.sources.paths import local_path
from tlscale.data.sources.split_names import WHOLE, split_keys
from tlscale.data.sources.stores import FileStore
from tlscale.data.sources.tables import RawStore, Role, Source, SourceSplit, label_text
from tlscale.data.stored_numbers import OTHER_NUMBERS, Numbers, Stored, is_wide_grey, numbers_for, stored_numbers
from tlscale.data.table_layout import column_names, guess_columns, guess_task, name_splits, rows_to_leave_out
from tlscale.data.workers import map_in_threads
from tlscale.errors import DataError, one_line, option
from tlscale.recipe.schema import DataSection
from tlscale.recipe.sources import SOURCES
from tlscale.tracking.progress import Pace

_ALIKE = 0.9  # share of images that have to lie, or to stand, for proportions to be those of all
_GREY_STRIDE = 4  # every so many pixels are looked at for colour


@dataclass(frozen=True)
class Survey:
    """What is in a data set."""

    keys: dict[str, Any]
    """Keys of `data` that read it."""
    counts: dict[Role, dict[str, int]]
    """Split -> class -> number of images, without those of `left_out`."""
    num_images: dict[Role, int]
    """By split; of several labels an image it is of several classes, or of none."""
    formats: Counter[str]
    sizes_N2: npt.NDArray[np.int64]
    """Height and width of each image, upright."""
    num_grey: int
    left_out: dict[str, Reason]
    """By path."""
    num_bad: int
    """Images that cannot be read; part of `left_out` where they are files."""
    equal: list[list[Place]]
    """Images with equal content, two or more each, without those of `left_out`."""
    notes: tuple[str, ...]
    in_chans: int | None = None
    """Channels, where images are neither grey nor RGB."""
    groups: GroupHint | None = None
    """That images may be in, several of one patient or scene."""

    @property
    def median_side_px(self) -> int:
        """Return the median of the shorter sides."""
        return int(np.median(self.sizes_N2.min(axis=1)))

    @property
    def shown_by_centre_crop(self) -> float:
        """Return the share of a typical image that the largest square in its middle shows."""
        return float(np.median(self.sizes_N2.min(axis=1) / self.sizes_N2.max(axis=1)))

    @property
    def proportions(self) -> float | None:
        """Return height by width of a typical image; None where some lie and others stand."""
        ratios_N = self.sizes_N2[:, 0] / self.sizes_N2[:, 1]
        if 1 - _ALIKE < (ratios_N < 1).mean() < _ALIKE:
            return None
        return float(np.median(ratios_N))


@dataclass(frozen=True, slots=True)
class Place:
    """Where an image is."""

    path: str
    role: Role
    label: str


@dataclass(frozen=True, slots=True)
class _Look:
    """What one image is."""

    digest: bytes = b""
    format: str = ""
    size: tuple[int, int] = (0, 0)
    is_grey: bool = False
    problem: Reason | None = None
    stored: Stored | None = None
    """Its own numbers, where they are not plainly of 8 bits."""


@dataclass
class _Seen:
    """What is known of the images so far."""

    formats: Counter[str] = field(default_factory=Counter)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    num_grey: int = 0
    places: dict[bytes, list[Place]] = field(default_factory=lambda: defaultdict(list))
    bad: dict[str, Reason] = field(default_factory=dict)
    num_bad: int = 0
    has_files: bool = False
    others: list[tuple[_Look, Place, bool]] = field(default_factory=list)
    """Images whose numbers are not plainly of 8 bits: how they are read hangs on all of them."""

    def settle(self) -> Numbers | None:
        """Choose how those others are read, and add them."""
        stored = [(look.stored, place) for look, place, _ in self.others if look.stored is not None]
        of_training = [one for one, place in stored if place.role == "train"]
        numbers = numbers_for([one for one, _ in stored], len(self.sizes), of_training)
        for look, place, is_file in self.others:
            assert look.stored is not None
            if numbers is not None:
                look = replace(look, size=numbers.hw_of(look.stored), problem=numbers.why_not(look.stored))
            self.add(replace(look, stored=None), place, is_file=is_file)
        return numbers

    def add(self, look: _Look, place: Place, *, is_file: bool) -> None:
        self.has_files |= is_file
        if look.stored is not None:
            self.others.append((look, place, is_file))
            return
        if look.problem is not None:
            self.num_bad += 1
            if is_file:
                self.bad[place.path] = look.problem
            return
        self.formats[look.format] += 1
        self.sizes.append(look.size)
        self.num_grey += look.is_grey
        self.places[look.digest].append(place)


def survey(place: str, exclude: Path) -> Survey:
    """Look at the images of a folder, a table, or another source that is known by its place.

    Args:
        place: a folder, a table (.csv, .tsv, .parquet), or `fashion_mnist`.
        exclude: the table of what is left out; written only if something is, and not to be there before.

    Raises:
        DataError: not there, no images or labels, or nothing of it can be read.
        Stopped: it was asked to stop.
    """
    if exclude.exists():
        raise DataError(
            f"'{exclude}' is there already", remedy="Name another recipe (" + option("out") + "), or remove that table"
        )
    keys, left_out, notes = _keys_of(place)
    try:
        return _survey(keys, left_out, notes, exclude)
    except BaseException:
        exclude.unlink(missing_ok=True)
        raise


def _survey(keys: dict[str, Any], left_out: dict[str, Reason], notes: tuple[str, ...], exclude: Path) -> Survey:
    def leave_out(more: dict[str, Reason]) -> DataSection:
        left_out.update(more)
        write_excluded(exclude, left_out.items())
        if left_out:
            keys["exclude"] = str(exclude)
        return DataSection(**keys)

    section = leave_out({})
    source = read_source(section)
    notes = (*notes, *source.notes)
    seen = _look_at_all(source, section)
    num_dark = sum(look.problem is None for look, _, _ in seen.others)
    numbers = seen.settle()
    keys |= {} if numbers is None else numbers.keys
    notes = (*notes, *(() if numbers is None else numbers.about))
    if numbers is None and 0 < num_dark < len(seen.sizes):
        notes = (*notes, f"{num_dark:,} images are grey of 16 bits and others of 8: numbers of 16 bits are scaled to 8")
    if not seen.sizes:
        first: tuple[str, str] = next(iter(seen.bad.items()), ("", "no image"))
        raise DataError(f"{source.place}: none of {seen.num_bad:,} images can be read; the first: {': '.join(first)}")
    if seen.num_bad > len(seen.bad):  # not files of their own
        keys["on_bad_image"] = "skip"
        notes = (*notes, f"{seen.num_bad:,} images cannot be read; each run skips and counts them")
    equal = [places for places in seen.places.values() if len(places) > 1]
    copies = _copies(equal) if seen.has_files else {}
    bad = seen.bad | copies
    _refuse_empty_splits(source, bad)
    section = leave_out(bad | _classes_without(source, section, bad))
    splits = read_source(section).splits
    equal = [left for places in equal if len(left := [place for place in places if place.path not in copies]) > 1]
    return Survey(
        keys=keys,
        counts={role: split.counts() for role, split in splits.items()},
        num_images={role: int((~split.unlabelled_N).sum()) for role, split in splits.items()},
        formats=seen.formats,
        sizes_N2=np.array(seen.sizes, dtype=np.int64),
        num_grey=seen.num_grey,
        left_out=left_out,
        num_bad=seen.num_bad,
        equal=equal,
        notes=notes,
        in_chans=None if numbers is None else numbers.in_chans,
        groups=_group_hint(section, splits.values()),
    )


def _group_hint(section: DataSection, splits: Iterable[SourceSplit]) -> GroupHint | None:
    """Return groups that the names of the images, or a column of their table, look like."""
    if section.source == "manifest" and (hint := hint_by_column(column_names(local_path(section)))) is not None:
        return hint
    paths: list[str] = []
    labels: list[str] = []
    for split in splits:
        if not isinstance(split.store, FileStore):
            return None
        paths += split.store.paths_N.to_pylist()
        labels += [label_text(label, split.label_names) for label in split.label_ids_N]
    return hint_by_path(paths, labels)


def _keys_of(place: str) -> tuple[dict[str, Any], dict[str, Reason], tuple[str, ...]]:
    """Return the keys of `data` for a place, what is left out (before an image is read), and notes."""
    kind = source_of(place, remedy="Name a folder, or a table (.csv, .tsv, .parquet), of images")
    if kind == "folder":
        return _keys_of_folder(place)
    if kind == "manifest":
        return _keys_of_table(place)
    return {"source": kind, **({} if SOURCES[kind].path == "none" else {"path": place})}, {}, ()


def _keys_of_folder(place: str) -> tuple[dict[str, Any], dict[str, Reason], tuple[str, ...]]:
    root = Path(place).expanduser()
    try:
        layout = lay_out(root)
    except DataError:
        tables = tables_in(root)
        if len(tables) != 1:
            raise
        return _keys_of_table(str(Path(place) / tables[0]))
    _refuse_to_write_among_classes(root, list(layout.splits.values()))
    keys: dict[str, Any] = {"source": "folder", "path": place, **split_keys(layout.splits)}
    if layout.is_whole:
        keys["train_split"] = WHOLE
    if layout.class_folder is not None:
        keys["class_folder"] = layout.class_folder
    return keys, dict(layout.left_out), layout.notes


def _refuse_to_write_among_classes(root: Path, splits: list[str]) -> None:
    """Refuse a current folder that is among the class folders, where a recipe and `runs` would be taken for data."""
    here = Path().resolve()
    for base in (root / split for split in splits or ["."]):
        if here.is_relative_to(base.resolve()):
            problem = f"the current folder is in '{one_line(base)}', where the runs would lie among the class folders"
            outside = root.resolve()
            remedy = (
                f"Go to another folder, such as '{one_line(outside.parent)}', and name this one: '{one_line(outside)}'"
            )
            raise DataError(problem, remedy=remedy)


def _keys_of_table(place: str) -> tuple[dict[str, Any], dict[str, Reason], tuple[str, ...]]:
    file = Path(place).expanduser()
    keys: dict[str, Any] = {"source": "manifest", "path": place, **guess_columns(file)}
    keys |= guess_task(DataSection(**keys))
    keys |= name_splits(DataSection(**keys))
    return keys, rows_to_leave_out(DataSection(**keys)), ()


def _look_at_all(source: Source, section: DataSection) -> _Seen:
    seen = _Seen()
    max_pixels = round(section.max_megapixels * 1e6)
    total = sum(len(split.store) for split in source.splits.values())
    pace = Pace(total, "looking at images")
    for role, split in source.splits.items():
        store, names = split.store, (*split.label_names, "")  # NO_LABEL is the last one
        look = partial(_look, store, max_pixels)
        for row, seen_one in enumerate(map_in_threads(look, range(len(store)), "looking at images")):
            path = _path_in(store, row, source.place)
            place = Place(path or store.where(row), role, label_text(split.label_ids_N[row], names))
            seen.add(seen_one, place, is_file=path is not None)
            pace.add(1)
    return seen


def _path_in(store: RawStore, row: int, place: str) -> str | None:
    """Return the path of an image below the data, as `data.exclude` names it; None of what is no file of its own."""
    file = store.file_of(row)
    return None if file is None else path_below(file, place)


def _look(store: RawStore, max_pixels: int, row: int) -> _Look:
    where = store.where(row)
    try:
        raw = store.read(row)
        pixels_HWC = decode_image(raw, in_chans=3, max_pixels=max_pixels, where=where)
    except DataError as error:
        problem = error.why if isinstance(error, BadImageError) else Reason(error.problem)
        stored = stored_numbers(raw, max_pixels) if problem.kind in OTHER_NUMBERS else None
        if stored is None:
            return _Look(problem=problem)
        return _Look(content_digest(raw), _format(raw), problem=problem, stored=stored)
    height, width = pixels_HWC.shape[:2]
    few_HWC = pixels_HWC[::_GREY_STRIDE, ::_GREY_STRIDE].astype(np.int16)
    is_grey = bool((np.ptp(few_HWC, axis=2) <= 2).all())
    stored = stored_numbers(raw, max_pixels, is_grey_16=True) if is_wide_grey(raw) else None
    return _Look(content_digest(raw), _format(raw), (height, width), is_grey, stored=stored)


def _format(raw: Any) -> str:  # noqa: ANN401 (bytes or an array)
    if not isinstance(raw, bytes) or raw.startswith(NPY_START):
        return "array"
    if is_dicom(raw):
        return "DICOM"
    try:
        return Image.open(io.BytesIO(raw), formats=FORMATS).format or "?"
    except UnidentifiedImageError:
        return "TIFF" if is_tiff(raw) else "?"  # of many bands


def _copies(equal: list[list[Place]]) -> dict[str, Reason]:
    """Return the images that are copies of another one: with one of them held out, a score would be too high.

    One of each is kept, and all that are to be scored; where they have different labels, none can be trusted.
    """
    copies: dict[str, Reason] = {}
    for places in equal:
        kept = next((place for place in places if place.role == "test"), places[0])
        others = {place.path: place for place in places if place.role != "test" and place.path != kept.path}
        if len({place.label for place in places}) > 1:
            other = next(place for place in places if place.label != kept.label)
            known = {place.path: place.label for place in places}
            copies |= {path: _equal_to(kept.path, _UNDER_ANOTHER, (known[path], kept.label)) for path in others}
            if kept.role != "test":
                copies[kept.path] = _equal_to(other.path, _UNDER_ANOTHER, (kept.label, other.label))
        else:
            copies |= dict.fromkeys(others, _equal_to(kept.path))
    return copies


_UNDER_ANOTHER = ", which has another label"


def _equal_to(path: str, more: str = "", labels: tuple[str, ...] = ()) -> Reason:
    """`labels`: of the image itself and of the other, which are told where they differ."""
    told = f" ({labels[1]!r}, and this one {labels[0]!r})" if len(set(labels)) == 2 else ""
    return Reason(f"equal to {path}{more}{told}", f"equal{more}")


def _refuse_empty_splits(source: Source, left_out: dict[str, Reason]) -> None:
    """Refuse a split of which no image is left, and say which split that is and why."""
    for role, split in source.splits.items():
        paths = [_path_in(split.store, row, source.place) or "" for row in range(len(split.store))]
        if not paths or not all(path in left_out for path in paths):
            continue
        without = ", or move it elsewhere: without it, some of the training images are held out"
        raise DataError(
            f"{source.place}: none of the {len(paths):,} {role} images can be used; the first: {one_line(paths[0])}: "
            f"{one_line(left_out[paths[0]])}",
            remedy=f"Give that split other images{without if role != 'train' else ''}",
        )


def _classes_without(source: Source, section: DataSection, bad: dict[str, Reason]) -> dict[str, Reason]:
    """Return the class folders of which no image is left."""
    if section.source != "folder" or section.class_folder == "parent" or not bad:
        return {}
    empty = {}
    for split in source.splits.values():
        for number, label in enumerate(split.label_names):
            rows = np.flatnonzero(split.label_ids_N == number).tolist()
            if all(_path_in(split.store, row, source.place) in bad for row in rows):
                folder = label if split.name == "." else f"{split.name}/{label}"
                empty[folder] = Reason("a class of which no image is left")
    return empty
