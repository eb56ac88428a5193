"""Find out how a folder of images is laid out: which folders are splits, which are classes, and what is no image.

Promise: nothing is opened and nothing is guessed silently: what has no place in the layout is in `left_out`, with the
reason, and a layout that cannot be told is an error that says how to arrange the files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

from tlscale.data.formats.unread import Reason
from tlscale.data.sources.folder import KINDS, is_dir, is_image_name, kind_of_image, visible_entries
from tlscale.data.sources.manifest import TABLE_ENDINGS
from tlscale.data.sources.split_names import (
    ROLES,
    Role,
    are_splits,
    is_split_name,
    may_be_classes,
    role_of,
    role_within,
)
from tlscale.errors import DataError, Wording, first_few, irregular_mode, is_unicode, one_line, quoted

ClassFolder = Literal["top", "parent"]


@dataclass(frozen=True)
class FolderLayout:
    """How the images of a folder lie."""

    splits: dict[Role, str]
    """Folder of each split; empty where the classes are at the top."""
    class_folder: ClassFolder | None
    """As `data.class_folder`."""
    is_whole: bool
    """Whether classes are called like splits, so that the recipe has to say that they are none."""
    left_out: dict[str, Reason]
    """Path below the folder -> why it has no place."""
    notes: tuple[str, ...] = ()


@dataclass
class _Found:
    """Everything below a folder, as paths below it."""

    images: dict[str, list[str]] = field(default_factory=dict)
    """Folder -> names of images in it; '.' is the folder itself."""
    others: dict[str, Reason] = field(default_factory=dict)
    """File -> what it is."""
    folders: list[str] = field(default_factory=list)

    def below(self, base: str) -> list[str]:
        """Return the folders with images in `base` or below it, as paths below it."""
        prefix = "" if base == "." else f"{base}/"
        inside = [folder for folder in self.images if folder not in (".", base) and folder.startswith(prefix)]
        return [folder.removeprefix(prefix) for folder in inside]


def lay_out(root: Path) -> FolderLayout:
    """Look through a folder.

    Raises:
        DataError: no image in it, no class folders, or nothing to train on.
    """
    found = _look_through(root)
    _leave_one_kind(found)
    if not found.images:
        raise DataError(f"{one_line(root)}: no image in it, nor in the folders below it")
    splits = _splits(root, found)
    bases = list(splits.values()) or ["."]
    if not any(found.below(base) for base in bases):
        table = "a table (.csv, .tsv, .parquet) with the columns path and label"
        raise DataError(
            f"{one_line(root)}: {_count(found):,} images, and none of them in a class folder",
            remedy=f"Put them into a folder per class, or name {table} instead of the folder",
        )
    class_folder, notes = _class_folder([found.below(base) for base in bases])
    left_out = dict(found.others)
    for folder, names in found.images.items():
        if folder == "." or folder in bases:
            left_out |= {_join(folder, name): Reason("an image in no class folder") for name in names}
        elif splits and not any(folder.startswith(f"{base}/") for base in bases):
            left_out[folder.split("/")[0]] = Reason(f"a folder that is none of the splits {', '.join(bases)}")
    left_out |= dict.fromkeys(_without_images(found, bases), Reason("a folder without an image"))
    called = [] if splits else _called_like_splits(root, found)
    notes += tuple(f"{name!r} is a class here, and no split: it holds no class folders" for name in called)
    return FolderLayout(splits, class_folder, bool(called), left_out, notes)


def tables_in(root: Path) -> list[str]:
    """Return the names of the tables that lie directly in a folder."""
    return [entry.name for entry in visible_entries(root) if Path(entry.name).suffix.lower() in TABLE_ENDINGS]


def _count(found: _Found) -> int:
    return sum(map(len, found.images.values()))


def _join(folder: str, name: str) -> str:
    return name if folder == "." else f"{folder}/{name}"


def _look_through(root: Path) -> _Found:
    found = _Found()
    for folder, entry in _walk(root, ".", ()):
        path = _join(folder, entry.name)
        if is_dir(entry):
            found.folders.append(path)
        elif problem := _problem_of(entry):
            found.others[path] = Reason(problem)
        else:
            found.images.setdefault(folder, []).append(entry.name)
    return found


def _leave_one_kind(found: _Found) -> None:
    """Leave out the images of all kinds but one: a run takes one."""
    kinds = {kind_of_image(name) for names in found.images.values() for name in names}
    kept = next((kind for kind in KINDS if kind in kinds), None)
    for folder, names in list(found.images.items()):
        others = [name for name in names if kind_of_image(name) != kept]
        found.others |= {_join(folder, name): Reason(f"{kind_of_image(name)} next to {kept}") for name in others}
        if len(others) == len(names):
            del found.images[folder]
        else:
            found.images[folder] = [name for name in names if kind_of_image(name) == kept]


def _walk(root: Path, folder: str, above: tuple[str, ...]) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield all entries with the folder that each is in; a link round in a circle is an entry without any."""
    real = os.path.realpath(root / folder)
    for entry in visible_entries(root / folder):
        yield folder, entry
        if is_dir(entry) and os.path.realpath(entry.path) not in (*above, real):
            yield from _walk(root, _join(folder, entry.name), (*above, real))


def _problem_of(entry: os.DirEntry[str]) -> str | None:
    """Return why a file is none of the images; None: it may be one."""
    try:
        mode = entry.stat().st_mode
    except OSError as error:
        return f"{error.strerror or error} (a link to nowhere?)"
    if (what := irregular_mode(mode)) is not None:
        return what
    if not is_image_name(entry.name):
        ending = os.path.splitext(entry.name)[1]
        if ending.lower() in (".heic", ".heif", ".hif"):
            return "a photo in HEIC, which takes the extra: pip install 'tlscale[heif]'"
        return f"no image by its ending {ending}" if ending else "no image: its name has no ending"
    return None if is_unicode(entry.name) else "its name is not UTF-8"


def _splits(root: Path, found: _Found) -> dict[Role, str]:
    """Return the folders at the top that are splits, by role; none where those are the classes."""
    tops = [folder for folder in found.folders if "/" not in folder]
    certain = {name: role for name in tops if (role := role_of(name)) is not None}
    within = {name: role for name in tops if (role := role_within(name)) is not None}
    named = within if are_splits(tops) else certain
    named = {name: role for name, role in named.items() if found.below(name)}
    if not named:
        return {}
    by_role: dict[Role, str] = {}
    for name, role in named.items():
        if role in by_role:
            problem = f"{one_line(root)}: the folders {by_role[role]!r} and {name!r} may both be the {role} split"
            raise DataError(problem, remedy="Rename one of them, or take it out")
        by_role[role] = name
    if "train" not in by_role:
        others = [name for name in tops if name not in named and found.below(name) + found.images.get(name, [])]
        held = first_few(quoted(named))
        if not others:
            scores = Wording("`tlscale evaluate RUN --data FOLDER`", "tlscale.evaluate(run, data=folder)")
            raise DataError(
                f"{one_line(root)}: nothing to train on, as it holds {held} alone",
                remedy="Images to train on go into a folder 'train'; " + scores + " scores a model",
            )
        remedy = f"Put the class folders ({first_few(quoted(others), 3)}) into a folder 'train' next to it"
        raise DataError(f"{one_line(root)}: class folders lie next to {held}, which is a split", remedy=remedy)
    return {role: by_role[role] for role in ROLES if role in by_role}


def _called_like_splits(root: Path, found: _Found) -> list[str]:
    """Return the class folders that are called like splits.

    Raises:
        DataError: all folders are called so; it cannot be told whether they are splits without classes.
    """
    tops = [folder for folder in found.folders if "/" not in folder and (folder in found.images or found.below(folder))]
    called = [name for name in tops if is_split_name(name)]
    if called and not may_be_classes(tops, [name for name in tops if found.below(name)]):
        remedy = (
            "Put the images of each split into a folder per class, or write data.train_split: . if they are classes"
        )
        problem = f"{one_line(root)}: {first_few(quoted(called))} are called like splits, and hold no class folders"
        raise DataError(problem, remedy=remedy)
    return called


def _class_folder(folders_of_bases: list[list[str]]) -> tuple[ClassFolder | None, tuple[str, ...]]:
    """Return which folder is the class, from the folders that hold images; None where there is no choice."""
    folders = [PurePosixPath(folder) for folders in folders_of_bases for folder in folders]
    nested = [folder for folder in folders if len(folder.parts) > 1]
    if not nested:
        return None, ()
    direct = {folder.name for folder in folders if len(folder.parts) == 1}
    within_classes = [folder for folder in nested if folder.parts[0] in direct]
    names = {folder.name for folder in nested}
    tops = {folder.parts[0] for folder in nested}
    if direct:  # ash/1.jpg next to old/ash/2.jpg: 'ash' is the class of both
        is_parent = not within_classes and names <= direct
    else:  # 2023/ash/1.jpg next to 2024/ash/2.jpg, or all/ash/1.jpg
        is_parent = len(tops) == 1 or all(_names_of(nested, top) & _names_of(nested, *(tops - {top})) for top in tops)
    chosen: ClassFolder = "parent" if is_parent else "top"
    what = "the folder that an image lies in" if is_parent else "the topmost one"
    return chosen, (f"folders lie in folders, such as {str(nested[0])!r}: the class is {what}",)


def _names_of(folders: list[PurePosixPath], *tops: str) -> set[str]:
    return {folder.name for folder in folders if folder.parts[0] in tops}


def _without_images(found: _Found, bases: list[str]) -> list[str]:
    """Return the folders at the place of a class that hold no image, however deep."""
    empty = []
    for folder in found.folders:
        parent = folder.rpartition("/")[0] or "."
        if parent in bases and folder not in found.images and not found.below(folder):
            empty.append(folder)
    return empty
