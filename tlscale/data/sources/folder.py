"""Read a folder per class: `path/train/CLASS/IMAGE`, with validation and test next to train, or `path/CLASS/IMAGE`.

Promise: every file below a class folder is either an image of the split or an error; nothing is skipped silently,
except hidden files, what desktops leave behind, and what the table `data.exclude` names. Symbolic links are followed.
A class folder holds images only, unless `data.class_folder` tells which level is the class. Pictures, DICOM and arrays
are not mixed: beside pictures an array is more often their mask, and a DICOM their original.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from stat import S_ISDIR
from typing import Literal, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tlscale.data.content import digest_of_parts, file_stamp
from tlscale.data.decode import ARRAYS, DICOMS, EXTENSIONS
from tlscale.data.sources.excluded import excluded_paths, whole_path
from tlscale.data.sources.labels import sort_labels
from tlscale.data.sources.paths import local_folder
from tlscale.data.sources.same_files import number_files
from tlscale.data.sources.split_names import (
    VALIDATION_NAMES,
    WHOLE,
    ScoredSection,
    are_splits,
    is_split_name,
    may_be_classes,
    pick_splits,
    role_within,
)
from tlscale.data.sources.stores import FileStore
from tlscale.data.sources.tables import Ints, Role, Source, SourceSplit
from tlscale.distributed.signals import check_stop
from tlscale.errors import (
    DataError,
    first_few,
    irregular_mode,
    is_unicode,
    one_line,
    quoted,
    quoted_list,
    sentences,
    suggestion,
)
from tlscale.recipe.schema import DataSection
from tlscale.tracking.console import visible
from tlscale.tracking.progress import Pace

KINDS = ("pictures", "DICOM", "arrays")
"""Kinds of images; where there are several, the first is likely what the data set is of."""
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
    tree = _Tree(root, excluded_paths(section, root), section.class_folder)
    picked = _pick(section, tree)
    notes = []
    if picked:
        used = {PurePosixPath(name).parts[0] for name in picked.values()}
        rest = [entry.name for entry in tree.visible(root) if is_dir(entry) and entry.name not in used]
        notes = [f"{root}: not used, as no split has their name: {first_few(quoted(rest))}"] if rest else []
    splits: dict[Role, SourceSplit] = {}
    stamps: list[Ints] = []
    for role, name in (picked or {"train": "."}).items():
        splits[role], stats_N5, strangers = _read_split(tree, name)
        stamps.append(stats_N5)
        notes.extend(strangers)
    _refuse_mixed(root, [cast(FileStore, split.store).paths_N for split in splits.values()])
    numbers = number_files(stamps)
    if numbers is not None:
        splits = {role: replace(splits[role], files_N=files_N) for role, files_N in zip(splits, numbers, strict=True)}
    return Source(str(root), splits, notes=tuple(notes))


@dataclass(frozen=True)
class _Tree:
    """The folder, without what is left out."""

    root: Path
    left_out: frozenset[str]
    """Full paths."""
    class_folder: Literal["top", "parent"] | None

    def visible(self, folder: Path) -> list[os.DirEntry[str]]:
        """List a folder by name, without hidden entries and what desktops leave behind."""
        return [entry for entry in visible_entries(folder) if not self._is_left_out(entry)]

    def _is_left_out(self, entry: os.DirEntry[str]) -> bool:
        return bool(self.left_out) and whole_path(Path(), entry.path) in self.left_out


def _pick(section: DataSection, tree: _Tree) -> dict[Role, str] | None:
    """Pick a folder for each role; None where the class folders are directly in the root."""
    root = tree.root
    named = [section.train_split, section.validation_split, section.test_split, *VALIDATION_NAMES]
    for name in filter(None, named):
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise DataError(f"split {name!r} is outside {root}; a split is a folder inside data.path")
    visible = tree.visible(root)
    _refuse_lost_links(entry for entry in visible if role_within(entry.name) is not None)
    top = [entry.name for entry in visible if is_dir(entry)]
    if section.train_split == WHOLE:
        _refuse_splits_of_whole(section)
        return None
    nested = [name for name in filter(None, named) if "/" in name and (root / name).is_dir()]
    if not nested:
        _refuse_classes_called_like_splits(tree, top, section)
    wanted = [section.train_split]
    if isinstance(section, ScoredSection):
        wanted += [section.test_split, section.validation_split or "", *VALIDATION_NAMES]
    if any(name in (*top, *nested) for name in wanted):
        return pick_splits(section, _available(tree, section.train_split, top, nested), str(root), any_word=True)
    certain = [name for name in top if is_split_name(name)]
    telling = top if are_splits(top) else certain
    if isinstance(section, ScoredSection) and not telling:
        return None
    if telling or section.train_split != "train" or section.validation_split or section.test_split != "test":
        raise DataError(
            f"{root} has no folder {section.train_split!r}",
            key="data.train_split",
            remedy=sentences(
                f"Its folders are {quoted_list(top)}; {WHOLE} takes all of them for classes.",
                suggestion(section.train_split, top),
            ),
        )
    return None


def _refuse_splits_of_whole(section: DataSection) -> None:
    """Refuse splits by name where all folders are classes."""
    for key, name, default in (
        ("validation_split", section.validation_split, None),
        ("test_split", section.test_split, "test"),
    ):
        if name != default and not isinstance(section, ScoredSection):
            problem = f"{name!r} is a class where data.train_split is {WHOLE!r}, the folder with all classes in it"
            raise DataError(problem, key=f"data.{key}", remedy="Take one of the two keys out")


def _refuse_classes_called_like_splits(tree: _Tree, top: list[str], section: DataSection) -> None:
    """Refuse folders called like splits that seem to be classes: neither reading is so sure that it is taken."""
    if not any(map(is_split_name, top)):
        return  # nor are the folders listed, which takes long where there are many images
    kinds = {name: _kinds_in(tree, name) for name in top if is_split_name(name)}
    if any(False in kinds_of_one for kinds_of_one in kinds.values()):
        return
    kinds = {name: kinds.get(name) or _kinds_in(tree, name) for name in top}
    full = [name for name in top if kinds[name]]
    called = may_be_classes(full, ())
    others = [name for name in full if name not in called]
    if called and section.train_split not in others:
        raise DataError(
            f"{one_line(tree.root)}: folders called like splits hold images and no class folders "
            f"({first_few(quoted(called))}), next to folders called like classes "
            f"({first_few(quoted(others), 3)})",
            key="data.train_split",
            remedy=f"Write data.train_split: {WHOLE} if all of them are classes, or put the images of a split into a "
            "folder per class",
        )


def _kinds_in(tree: _Tree, name: str) -> set[bool]:
    """Return whether a folder holds images (True), folders (False), or both."""
    entries = tree.visible(tree.root / name)
    return {not is_dir(entry) for entry in entries if is_dir(entry) or is_image_name(entry.name)}


def _available(tree: _Tree, train: str, top: list[str], nested: list[str]) -> list[str]:
    """Return the folders that may be splits: at the top, those named in the recipe below it, those next to train."""
    holders = {PurePosixPath(name).parts[0] for name in nested}  # their first part alone is no split
    parent = PurePosixPath(train).parent
    beside = [] if parent.name == "" else [str(parent / e.name) for e in tree.visible(tree.root / parent) if is_dir(e)]
    return list(dict.fromkeys([*(name for name in top if name not in holders or name == train), *nested, *beside]))


def visible_entries(folder: Path) -> list[os.DirEntry[str]]:
    """List a folder by name, without hidden entries and what desktops leave behind; `DataError` where that fails."""
    try:
        with os.scandir(folder) as entries:
            kept = [e for e in entries if not e.name.startswith(".") and e.name not in LEFT_BY_DESKTOPS]
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed: {error.strerror or error}") from None
    return sorted(kept, key=lambda entry: entry.name)


def _read_split(tree: _Tree, name: str) -> tuple[SourceSplit, Ints, list[str]]:
    """Read a split, the `file_stamp` of each of its images, and notes on files that are in no class folder."""
    folder = tree.root / name
    entries = tree.visible(folder)
    _refuse_lost_links(entries)
    classes = [entry.name for entry in entries if is_dir(entry)]
    beside = [entry.name for entry in entries if entry.name not in classes]
    lost = [file for file in beside if os.path.splitext(file)[1].lower() in EXTENSIONS]
    if lost:
        raise DataError(
            f"{folder}: images that lie in no class folder: {first_few(lost)}", remedy="Move them into their class"
        )
    if not classes:
        raise DataError(f"{folder} has no class folders; expected {folder}/CLASS/IMAGE for each class")
    notes = [f"{folder}: not used, as they are no images: {first_few(beside)}"] if beside else []
    return *_collect(tree, name, classes), [*notes, *_hidden_classes(folder)]


def _hidden_classes(folder: Path) -> list[str]:
    """Return a note on folders that hold images and are taken for no class, as their names begin with a dot."""
    hidden = sorted(entry.name for entry in os.scandir(folder) if entry.name.startswith(".") and is_dir(entry))
    with_images = [name for name in hidden if _holds_images(folder / name)]
    if not with_images:
        return []
    shown = first_few(quoted(with_images))
    return [f"SKIPPED: {one_line(folder)}: hidden folders are no classes, though they hold images: {shown}"]


def _holds_images(folder: Path) -> bool:
    try:
        return any(is_image_name(name) for name in os.listdir(folder))
    except OSError:
        return False


def _class_folders(tree: _Tree, folder: Path, tops: list[str]) -> dict[str, list[str]]:
    """Return for each class the folders of its images, below `folder`."""
    if tree.class_folder is None:
        return {name: [name] for name in tops}
    below = {top: _folders_below(tree, folder, top, ()) for top in tops}
    if tree.class_folder == "top":
        return below
    classes: dict[str, list[str]] = {}
    for place in itertools.chain.from_iterable(below.values()):
        if any(not is_dir(entry) for entry in tree.visible(folder / place)):
            classes.setdefault(PurePosixPath(place).name, []).append(place)
    if not classes:
        raise DataError(f"{one_line(folder)}: no folder holds a file", key="data.class_folder")
    return classes


def _folders_below(tree: _Tree, folder: Path, place: str, above: tuple[str, ...]) -> list[str]:
    """Return a folder and all below it, by name; `above`: where those lie that it is in, links followed."""
    real = os.path.realpath(folder / place)
    if real in above:
        raise DataError(f"{one_line(folder / place)}: a link that leads round in a circle", remedy="Take it out")
    inner = [f"{place}/{entry.name}" for entry in tree.visible(folder / place) if is_dir(entry)]
    return [place, *itertools.chain.from_iterable(_folders_below(tree, folder, name, (*above, real)) for name in inner)]


def _collect(tree: _Tree, name: str, tops: list[str]) -> tuple[SourceSplit, Ints]:
    split = tree.root / name
    folders = _class_folders(tree, split, tops)
    if strange := [place for places in folders.values() for place in places if not is_unicode(place)]:
        raise DataError(_not_utf8(split, strange[0]))
    order, looked_ns = sort_labels(folders), time.time_ns()
    chunks, counts, stats = [], [], []
    parts: list[str | bytes] = []
    problems: list[str] = []
    with Pace(None, f"scanning {visible(split)}") as pace:
        for label in order:
            paths, stats_N5, wrong = _read_class(tree, name, folders[label], pace)
            problems.extend(wrong)
            if not paths and not wrong:
                problems.append(f"{one_line(split / folders[label][0])} is empty: a class needs at least one image")
            chunks.append(pa.array(paths, type=pa.large_string()))
            counts.append(len(paths))
            stats.append(stats_N5)
            # Sizes, and times of the last write.
            parts.extend(("\0".join(paths), stats_N5[:, 2:4].astype("<i8").tobytes()))
    if problems:
        rest = len(problems) - 5
        more = [f"and {rest:,} more of this kind"] if rest > 0 else []
        raise DataError("\n  ".join([*problems[:5], *more]))
    label_ids_N = np.repeat(np.arange(len(order), dtype=np.int64), counts)
    stats_N5 = np.concatenate(stats)
    store = FileStore(str(tree.root), pa.concat_arrays(chunks), digest_of_parts(parts), stats_N5, looked_ns)
    return SourceSplit(name, store, order, label_ids_N), stats_N5


def _read_class(tree: _Tree, name: str, folders: list[str], pace: Pace) -> tuple[list[str], Ints, list[str]]:
    """Return paths below the root, the `file_stamp` of each, and what is wrong."""
    prefix = "" if name == "." else f"{name}/"
    paths: list[str] = []
    stats: list[tuple[int, ...]] = []
    wrong: list[str] = []
    for place in folders:
        for entry in tree.visible(tree.root / name / place):
            check_stop("scanning folders")
            pace.add(1)
            stat, problem = _stat_of_image(entry, may_be_folder=tree.class_folder is not None)
            if problem:
                wrong.append(problem)
            elif stat is not None:
                paths.append(f"{prefix}{place}/{entry.name}")
                stats.append(file_stamp(stat))
    return paths, np.array(stats, dtype=np.int64).reshape(-1, 5), wrong


def _stat_of_image(entry: os.DirEntry[str], *, may_be_folder: bool) -> tuple[os.stat_result | None, str]:
    """Return the `stat` of an image file, None of anything else, and what is wrong with it, or an empty text."""
    shown = one_line(entry.path)
    try:
        stat = entry.stat()
    except OSError as error:
        return None, f"{shown}: {error.strerror or error} (a link to nowhere?)"
    if S_ISDIR(stat.st_mode):
        nested = (
            f"{shown} is a folder inside a class folder; data.class_folder says which one is the class: top, the one "
            "below the split, or parent, the one that an image lies in"
        )
        return None, "" if may_be_folder else nested
    if not is_image_name(entry.name):
        endings = " ".join(sorted(EXTENSIONS | ARRAYS))
        return None, (
            f"{shown} has no ending of an image ({endings}); take it out of the class folder, or write it to the table "
            "of data.exclude"
        )
    if (what := irregular_mode(stat.st_mode)) is not None:
        return None, f"{shown} is {what}; take it out of the class folder"
    if not is_unicode(entry.name):
        return None, _not_utf8(Path(entry.path).parent, entry.name)
    return stat, ""


def is_dir(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder, or a link to one."""
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


def is_image_name(name: str) -> bool:
    """Return whether a file has the ending of an image."""
    return kind_of_image(name) is not None


def kind_of_image(name: str) -> str | None:
    """Return the kind of images, one of `KINDS`, that the ending of a file's name tells; None: no image's."""
    ending = os.path.splitext(name)[1].lower()
    if ending in ARRAYS:
        return "arrays"
    if ending not in EXTENSIONS:
        return None
    return "DICOM" if ending in DICOMS else "pictures"


def _refuse_mixed(root: Path, paths_by_split: list[pa.LargeStringArray]) -> None:
    """Refuse images of several kinds: masks, and originals of pictures, would be trained on without a word."""
    found: dict[str, str] = {}
    for paths_N in paths_by_split:
        endings = pc.unique(pc.utf8_lower(pc.replace_substring_regex(paths_N, r"^.*(\.[^./]*)$", r"\1")))
        for ending in endings.to_pylist():
            kind = kind_of_image(f"image{ending}")
            if kind is not None and kind not in found:
                is_one_N = pc.ends_with(pc.utf8_lower(paths_N), ending)
                found[kind] = paths_N.filter(is_one_N)[0].as_py()
    if len(found) > 1:
        shown = "; ".join(f"{kind}, such as {quoted([found[kind]])[0]}" for kind in KINDS if kind in found)
        raise DataError(
            f"{one_line(root)}: images of several kinds by their endings: {shown}",
            remedy="Take all but one kind out of the class folders, or write the others to the table of data.exclude",
        )
