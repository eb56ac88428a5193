"""Read a folder per class: `path/train/CLASS/IMAGE`, with validation and test next to train, or `path/CLASS/IMAGE`.

Promise: every file below a class folder is either an image of the split or an error; nothing is skipped silently,
except hidden files and what desktops leave behind. Symbolic links are followed. A class folder holds images only: with
folders inside it, it is not clear which level is the class; use a manifest.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path, PurePosixPath
from stat import S_ISDIR, S_ISREG

import numpy as np
import pyarrow as pa

from tlscale.data.content import digest_of_parts, file_stamp
from tlscale.data.decode import EXTENSIONS
from tlscale.data.sources.labels import sort_labels
from tlscale.data.sources.paths import local_folder
from tlscale.data.sources.same_files import number_files
from tlscale.data.sources.split_names import (
    VALIDATION_NAMES,
    ScoredSection,
    are_splits,
    pick_splits,
    role_of,
    role_within,
)
from tlscale.data.sources.stores import FileStore, kind_of_file
from tlscale.data.sources.tables import Ints, Role, Source, SourceSplit
from tlscale.distributed.signals import check_stop
from tlscale.errors import DataError, first_few, is_unicode, one_line, quoted, quoted_list, sentences, suggestion
from tlscale.recipe.schema import DataSection
from tlscale.tracking.console import Pace, visible

LEFT_BY_DESKTOPS = frozenset(("Thumbs.db", "desktop.ini", "__MACOSX"))


def is_folder_source(data: str) -> bool:
    """Return whether `data` is a folder, with anything in it; sources that know theirs by a file come first."""
    return Path(data).expanduser().is_dir()


def read_folder_source(section: DataSection) -> Source:
    """Read all splits of a folder.

    Raises:
        DataError: no folder, no classes, an empty class, files that are no images, a split that is not there.
    """
    root = local_folder(section)
    picked = _pick(section, root)
    notes = []
    if picked:
        used = {PurePosixPath(name).parts[0] for name in picked.values()}
        rest = [entry.name for entry in _visible(root) if _is_dir(entry) and entry.name not in used]
        notes = [f"{root}: not used, as no split has their name: {first_few(quoted(rest))}"] if rest else []
    splits: dict[Role, SourceSplit] = {}
    stamps: list[Ints] = []
    for role, name in (picked or {"train": "."}).items():
        splits[role], stats_N5, strangers = _read_split(root, name)
        stamps.append(stats_N5)
        notes.extend(strangers)
    numbers = number_files(stamps)
    if numbers is not None:
        splits = {role: replace(splits[role], files_N=files_N) for role, files_N in zip(splits, numbers, strict=True)}
    return Source(str(root), splits, notes=tuple(notes))


def _pick(section: DataSection, root: Path) -> dict[Role, str] | None:
    """Pick a folder for each role; None where the class folders are directly in `root`."""
    named = [section.train_split, section.validation_split, section.test_split, *VALIDATION_NAMES]
    for name in filter(None, named):
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise DataError(f"split {name!r} is outside {root}; a split is a folder inside data.path")
    visible = _visible(root)
    _refuse_lost_links(entry for entry in visible if role_within(entry.name) is not None)
    top = [entry.name for entry in visible if _is_dir(entry)]
    nested = [name for name in filter(None, named) if "/" in name and (root / name).is_dir()]
    wanted = [section.train_split]
    if isinstance(section, ScoredSection):
        wanted += [section.test_split, section.validation_split or "", *VALIDATION_NAMES]
    if any(name in (*top, *nested) for name in wanted):
        return pick_splits(section, _available(root, section.train_split, top, nested), str(root), any_word=True)
    # A folder can hardly be a class: 'Test' and 'val' are no classes, but 'trains' may be.
    certain = [name for name in top if role_of(name) in ("validation", "test") or name.lower() in ("train", "training")]
    telling = top if are_splits(top) else certain
    if isinstance(section, ScoredSection) and not telling:
        return None
    if telling or section.train_split != "train" or section.validation_split or section.test_split != "test":
        raise DataError(
            f"{root} has no folder {section.train_split!r}",
            key="data.train_split",
            remedy=sentences(f"Its folders are {quoted_list(top)}.", suggestion(section.train_split, top)),
        )
    return None


def _available(root: Path, train: str, top: list[str], nested: list[str]) -> list[str]:
    """Return the folders that may be splits: at the top, those named in the recipe below it, those next to train."""
    holders = {PurePosixPath(name).parts[0] for name in nested}  # their first part alone is no split
    parent = PurePosixPath(train).parent
    beside = [] if parent.name == "" else [str(parent / e.name) for e in _visible(root / parent) if _is_dir(e)]
    return list(dict.fromkeys([*(name for name in top if name not in holders or name == train), *nested, *beside]))


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            kept = [e for e in entries if not e.name.startswith(".") and e.name not in LEFT_BY_DESKTOPS]
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed: {error.strerror or error}") from None
    return sorted(kept, key=lambda entry: entry.name)


def _read_split(root: Path, name: str) -> tuple[SourceSplit, Ints, list[str]]:
    """Read a split, the `file_stamp` of each of its images, and notes on files that are in no class folder."""
    folder = root / name
    entries = _visible(folder)
    _refuse_lost_links(entries)
    classes = [entry.name for entry in entries if _is_dir(entry)]
    beside = [entry.name for entry in entries if entry.name not in classes]
    lost = [file for file in beside if _is_image_name(file)]
    if lost:
        raise DataError(
            f"{folder}: images that lie in no class folder: {first_few(lost)}", remedy="Move them into their class"
        )
    if not classes:
        raise DataError(f"{folder} has no class folders; expected {folder}/CLASS/IMAGE for each class")
    notes = [f"{folder}: not used, as they are no images: {first_few(beside)}"] if beside else []
    return *_collect(root, name, classes), [*notes, *_hidden_classes(folder)]


def _hidden_classes(folder: Path) -> list[str]:
    """Return a note on folders that hold images and are taken for no class, as their names begin with a dot."""
    hidden = sorted(entry.name for entry in os.scandir(folder) if entry.name.startswith(".") and _is_dir(entry))
    with_images = [name for name in hidden if _holds_images(folder / name)]
    if not with_images:
        return []
    shown = first_few(quoted(with_images))
    return [f"SKIPPED: {one_line(folder)}: hidden folders are no classes, though they hold images: {shown}"]


def _holds_images(folder: Path) -> bool:
    try:
        return any(_is_image_name(name) for name in os.listdir(folder))
    except OSError:
        return False


def _collect(root: Path, name: str, classes: list[str]) -> tuple[SourceSplit, Ints]:
    if strange := [label for label in classes if not is_unicode(label)]:
        raise DataError(_not_utf8(root / name, strange[0]))
    order, looked_ns = sort_labels(classes), time.time_ns()
    chunks, counts, stats = [], [], []
    parts: list[str | bytes] = []
    problems: list[str] = []
    pace = Pace(None, None, f"scanning {visible(root / name)}")
    for label in order:
        paths, stats_N5, wrong = _read_class(root, name, label, pace)
        problems.extend(wrong)
        if not paths and not wrong:
            problems.append(f"{one_line(root / name / label)} is empty: a class needs at least one image")
        chunks.append(pa.array(paths, type=pa.large_string()))
        counts.append(len(paths))
        stats.append(stats_N5)
        parts.extend(("\0".join(paths), stats_N5[:, 2:4].astype("<i8").tobytes()))  # sizes, times of the last write
    if problems:
        rest = len(problems) - 5
        more = [f"and {rest:,} more of this kind"] if rest > 0 else []
        raise DataError("\n  ".join([*problems[:5], *more]))
    label_ids_N = np.repeat(np.arange(len(order), dtype=np.int64), counts)
    stats_N5 = np.concatenate(stats)
    store = FileStore(str(root), pa.concat_arrays(chunks), digest_of_parts(parts), stats_N5, looked_ns)
    return SourceSplit(name, store, order, label_ids_N), stats_N5


def _read_class(root: Path, name: str, label: str, pace: Pace) -> tuple[list[str], Ints, list[str]]:
    """Return paths below `root`, the `file_stamp` of each, and what is wrong."""
    folder = root / name / label
    prefix = "" if name == "." else f"{name}/"
    paths: list[str] = []
    stats: list[tuple[int, ...]] = []
    wrong: list[str] = []
    for entry in _visible(folder):
        check_stop("scanning folders")
        pace.add(1)
        shown = one_line(entry.path)
        try:
            stat = entry.stat()
        except OSError as error:
            wrong.append(f"{shown}: {error.strerror or error} (a link to nowhere?)")
            continue
        if S_ISDIR(stat.st_mode):
            wrong.append(f"{shown} is a folder inside a class folder; use source 'manifest' for nested folders")
        elif not _is_image_name(entry.name):
            endings = " ".join(sorted(EXTENSIONS))
            wrong.append(f"{shown} has no ending of an image ({endings}); take it out of the class folder")
        elif not S_ISREG(stat.st_mode):
            wrong.append(f"{shown} is {kind_of_file(stat.st_mode)}, no regular file; take it out of the class folder")
        elif not is_unicode(entry.name):
            wrong.append(_not_utf8(folder, entry.name))
        else:
            paths.append(f"{prefix}{label}/{entry.name}")
            stats.append(file_stamp(stat))
    return paths, np.array(stats, dtype=np.int64).reshape(-1, 5), wrong


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links that go round in a circle
        return False


def _refuse_lost_links(entries: Iterable[os.DirEntry[str]]) -> None:
    """Refuse links to what is not there, such as a disk that is not mounted: each may be a class, or a split."""
    lost = [one_line(entry.path) for entry in entries if entry.is_symlink() and not os.path.exists(entry.path)]
    if lost:
        raise DataError(f"links to what is not there: {first_few(lost)}", remedy="Bring it back, or take the links out")


def _not_utf8(folder: Path, name: str) -> str:
    return (
        f"{one_line(folder)}: the name {os.fsencode(name)!r} is not UTF-8; rename it, or all of them: "
        f"convmv -r -f latin1 -t utf8 --notest {one_line(folder)}"
    )


def _is_image_name(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS
