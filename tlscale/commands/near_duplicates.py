"""`tlscale codes --near-duplicates`: show images of two splits or folds that look alike, and write a table of them.

Promise: of two images that look alike, the one that is left out is that of the split whose part in the model makes the
figures on the other one too good: of train before validation, and never of test. Of images of folds, which are all
scored, the first one stays; without the others no two look alike that folds may divide, however they are drawn then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tlscale.codes.near_duplicates import Near, near_duplicates, surplus_duplicates
from tlscale.codes.reader import Codes
from tlscale.data.sources.duplicates import PAIRS
from tlscale.data.sources.excluded import COLUMNS, path_below, read_excluded, write_excluded
from tlscale.data.sources.open import ImageData, ImageSplit
from tlscale.data.sources.tables import Role
from tlscale.errors import DataError, RecipeError, option
from tlscale.recipe.schema import DataSection
from tlscale.storage.files import naming_disk_errors
from tlscale.tracking.console import Console
from tlscale.training.predictions import image_names

_MOST_SHOWN = 20


class Left(NamedTuple):
    """An image that is left out."""

    split: Role
    position: int
    reason: str


def check_near_file(place: Path | None, near: float | None) -> None:
    """Refuse a table that would not be written, or that would replace another file, before anything is computed.

    Raises:
        RecipeError: no cosine was given.
        DataError: there is another file.
    """
    if place is None:
        return
    if near is None:
        problem = "has no effect without " + option("near-duplicates", "COSINE").shell
        raise RecipeError(problem, key=option("near-duplicates-to"), remedy="Give that, too")
    if place.exists() and not _is_table(place):
        problem = f"'{place}' is there, and is no table of data.exclude"
        raise DataError(problem, key=option("near-duplicates-to"), remedy="Name another file")


def _is_table(place: Path) -> bool:
    """Report whether a file begins as `write_excluded` lets it begin."""
    try:
        return place.read_bytes().startswith(",".join(COLUMNS).encode())
    except OSError:
        return False


def show_near(
    data: ImageData, codes: Mapping[str, Codes], least: float, console: Console, *, lists: bool
) -> list[Left]:
    """Show how many images of a split, or fold, look like one of another, and the nearest of them.

    Args:
        codes: by split.
        least: the cosine.
        lists: return what to leave out; else nothing is looked for that is not shown.
    """
    splits, left, pool = data.splits, list[Left](), None if data.folds is None else "the folds"

    def say(near: Near, split: ImageSplit, called: str, where: str) -> None:
        console.say(
            f"{len(near.positions_M):,} of {len(split):,} images of {called} look like one {where}: the cosine of "
            f"their codes ({codes['train'].values[0].name}) is {least:g} or more",
            style="bold yellow" if len(near.positions_M) else None,
        )

    for one, other in PAIRS:
        if one not in splits or other not in splits:
            continue
        near, where = near_duplicates(codes[one], codes[other], least), pool or other
        say(near, splits[one], one, f"of {where}")
        _show(near, splits[one], splits[other], f"The nearest images of {one} and {where}", (one, where), console)
        if lists and len(near.positions_M):
            left += _left(splits, codes, one, other, least)
    if data.folds is not None:
        # Equal for images that are in one fold in every repeat.
        folds_N = np.unique(data.folds.folds_RN, axis=1, return_inverse=True)[1].reshape(-1).astype(np.int64)
        near = near_duplicates(codes["train"], codes["train"], least, (folds_N, folds_N))
        say(near, data.train, "the folds", "in another fold")
        _show(near, data.train, data.train, "The nearest images of two folds", ("image", "in another fold"), console)
        left += _left_of_folds(data, codes["train"], least, left) if lists else []
    return left


def _show(
    near: Near, one: ImageSplit, other: ImageSplit, title: str, columns: tuple[str, str], console: Console
) -> None:
    """Show the nearest pairs, each once."""
    pairs = list(zip(near.positions_M.tolist(), near.others_M.tolist(), near.cosines_M.tolist(), strict=True))
    if one is other:
        pairs = list({frozenset(pair[:2]): pair for pair in reversed(pairs)}.values())[::-1]
    if not pairs:
        return
    of_one, of_other, cosines = zip(*pairs[:_MOST_SHOWN], strict=True)
    names = image_names(one, np.array(of_one)), image_names(other, np.array(of_other))
    rows = zip((f"{cosine:.4f}" for cosine in cosines), *names, strict=True)
    console.table(title, ("cosine", *columns), list(rows))


def _left(
    splits: Mapping[Role, ImageSplit], codes: Mapping[str, Codes], one: Role, other: Role, least: float
) -> Iterator[Left]:
    """Give all images of `other` that look like one of `one`; each of the latter is near to one of them at least."""
    yield from _reasons(near_duplicates(codes[other], codes[one], least), other, splits[one], one)


def _left_of_folds(data: ImageData, codes: Codes, least: float, left: Sequence[Left]) -> Iterator[Left]:
    """Give the images of folds that look like an earlier one of them, which stays."""
    assert data.folds is not None, "there are folds"
    gone_N = np.zeros(len(codes), dtype=bool)
    gone_N[[one.position for one in left]] = True
    yield from _reasons(surplus_duplicates(codes, least, data.folds.units_N, gone_N), "train", data.train, "the folds")


def _reasons(near: Near, split: Role, other: ImageSplit, called: str) -> Iterator[Left]:
    names = image_names(other, near.others_M)
    for position, name, cosine in zip(near.positions_M.tolist(), names, near.cosines_M.tolist(), strict=True):
        yield Left(split, position, f"looks like {name} of {called} (cosine {cosine:.4f})")


def write_near(place: Path, section: DataSection, data: ImageData, left: Sequence[Left], console: Console) -> None:
    """Write the images to a table for `data.exclude`, with what that leaves out already.

    Raises:
        DataError: the images are no files.
    """
    rows = {} if section.exclude is None else dict(read_excluded(Path(section.exclude).expanduser()))
    for split, position, reason in left:
        file = data.splits[split].file_of(position)
        if file is None:
            problem = f"{data.splits[split].where(position)} is no file of its own, so data.exclude cannot name it"
            raise DataError(problem, key=option("near-duplicates-to"), remedy="Take such rows out of the table itself")
        rows.setdefault(path_below(file, str(data.identity["place"])), reason)
    if not left:
        of = "two splits" if data.folds is None else "two folds, or of a fold and test,"
        console.say(f"'{place}' is not written: no images of {of} look alike")
        return
    with naming_disk_errors(place):
        write_excluded(place, rows.items())
    then = (
        ""
        if data.folds is None
        else ". Folds are drawn anew without them, so those that look alike within one are among them"
    )
    console.say(f"wrote '{place}', {len(rows):,} rows; data.exclude={place} leaves these images out{then}")
