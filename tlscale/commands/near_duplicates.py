"""`tlscale codes --near-duplicates`: show images of two splits that look alike, and write a table that leaves them out.

Promise: of two images that look alike, the one that is left out is that of the split whose part in the model makes the
figures on the other one too good: of train before validation, and never of test.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tlscale.codes.near_duplicates import near_duplicates
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
    splits: Mapping[Role, ImageSplit], codes: Mapping[str, Codes], least: float, console: Console
) -> list[Left]:
    """Show how many images of a split look like one of another, and the nearest of them; return what to leave out."""
    layer, left = codes["train"].values[0].name, list[Left]()
    for one, other in PAIRS:
        if one not in splits or other not in splits:
            continue
        near = near_duplicates(codes[one], codes[other], least)
        console.say(
            f"{len(near.positions_M):,} of {len(splits[one]):,} images of {one} look like one of {other}: the cosine "
            f"of their codes ({layer}) is {least:g} or more",
            style="bold yellow" if len(near.positions_M) else None,
        )
        shown = slice(0, _MOST_SHOWN)
        names = image_names(splits[one], near.positions_M[shown]), image_names(splits[other], near.others_M[shown])
        rows = zip((f"{cosine:.4f}" for cosine in near.cosines_M[shown].tolist()), *names, strict=True)
        if len(near.positions_M):
            console.table(f"The nearest images of {one} and {other}", ("cosine", one, other), list(rows))
            left += _left(splits, codes, one, other, least)
    return left


def _left(
    splits: Mapping[Role, ImageSplit], codes: Mapping[str, Codes], one: Role, other: Role, least: float
) -> Iterator[Left]:
    """Give all images of `other` that look like one of `one`; each of the latter is near to one of them at least."""
    near = near_duplicates(codes[other], codes[one], least)
    names = image_names(splits[one], near.others_M)
    for position, name, cosine in zip(near.positions_M.tolist(), names, near.cosines_M.tolist(), strict=True):
        yield Left(other, position, f"looks like {name} of {one} (cosine {cosine:.4f})")


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
        console.say(f"'{place}' is not written: no two splits have images that look alike")
        return
    with naming_disk_errors(place):
        write_excluded(place, rows.items())
    console.say(f"wrote '{place}', {len(rows):,} rows; data.exclude={place} leaves these images out")
