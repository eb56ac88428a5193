"""Put finished runs side by side, wherever and whenever they ran: nothing is run here.

Runs of one recipe with several seeds are one row, as in a comparison that ran them. Runs that were scored on other
images, or are of another task, have a table of their own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tlscale.commands.compare_outcomes import Outcome, finished
from tlscale.commands.compare_report import (
    columns_of,
    same_images,
    table,
    to_plain,
    to_rows,
    write_comparison,
)
from tlscale.commands.comparison import Comparison, together
from tlscale.commands.paired_tests import paired_tests
from tlscale.errors import RunFolderError, TlscaleError, first_few, one_line, option, quoted
from tlscale.recipe.load import load_stored_recipe, recipe_digest
from tlscale.recipe.schema import Recipe
from tlscale.storage.files import make_folder, naming_disk_errors, write_text
from tlscale.storage.run_folder import RunFolder
from tlscale.tracking.console import Console
from tlscale.training.run_files import read_result

_TITLE = "Comparison of runs"


def compare_runs(places: Sequence[str | os.PathLike[str]], out: Path | None, console: Console) -> Comparison:
    """Tabulate finished runs, those of the same scored images together; what is none is passed over with a note.

    Args:
        places: their folders, perhaps with other files and folders among them.
        out: a folder for the table and the picture, with a folder for each of several; None: they are shown alone.

    Raises:
        RunFolderError: none of them is finished, or `out` is a run folder.
    """
    if out is not None and RunFolder(out).run_json.exists():
        raise RunFolderError(
            f"'{out}' is a run folder", key=option("out"), remedy="Give a folder of the comparison's own"
        )
    found = [_read(Path(place)) for place in dict.fromkeys(os.fspath(place) for place in places)]
    runs = [run for run in found if not isinstance(run, str)]
    passed_over = [f"Passed over: {run}." for run in found if isinstance(run, str)]
    if not runs:
        remedy = "Name folders of finished runs, or recipe files"
        raise RunFolderError(
            f"no finished run among {first_few(quoted(os.fspath(place) for place in places))}", remedy=remedy
        )
    by_images = _by_images(runs)
    if len(by_images) == 1:
        figures = _tabulate(_TITLE, runs, out, console, passed_over)
        return Comparison(figures, out)
    tables = []
    for number, some in enumerate(by_images, start=1):
        folder = None if out is None else out / f"table_{number}"
        tables.append(_tabulate(f"{_TITLE}, {number} of {len(by_images)}", some, folder, console))
    notes = [f"{len(tables)} tables, as runs on other images, or of another task, do not compare.", *passed_over]
    for line in notes:
        console.say(line)
    figures = together(_TITLE, notes, tables)
    if out is not None:
        with naming_disk_errors(out):
            write_text(out / "compare.json", json.dumps(figures, indent=2, allow_nan=False) + "\n")
    return Comparison(figures, out)


def _tabulate(
    title: str, runs: Sequence[_Finished], out: Path | None, console: Console, remarks: Sequence[str] = ()
) -> dict[str, Any]:
    """Show runs on the same images in one table; return what `compare.json` holds of it."""
    outcomes = [replace(run.outcome, variant=label) for label, run in zip(_labels(runs), runs, strict=True)]
    pairs = paired_tests(to_rows(outcomes))
    console.table(title, columns_of(outcomes), table(outcomes, pairs), num_keys=2)
    if out is None:
        figures = to_plain(title, outcomes, remarks, pairs)
    else:
        with naming_disk_errors(out):
            make_folder(out)
        figures = write_comparison(out, title, outcomes, remarks, pairs)
    for line in figures["notes"]:
        console.say(line)
    if out is not None:
        console.say(f"table: {out / 'compare.md'}   picture: {out / 'compare.png'}   figures: {out / 'compare.json'}")
    return figures


def _by_images(runs: Sequence[_Finished]) -> list[list[_Finished]]:
    """Divide runs by the images that they were scored on, and by the figure that they have in common."""
    tables: list[list[_Finished]] = []
    for run in runs:
        known = next((some for some in tables if any(same_images(run.outcome, one.outcome) for one in some)), None)
        if known is None:
            tables.append([run])
        else:
            known.append(run)
    return tables


@dataclass(frozen=True)
class _Finished:
    """Hold a finished run."""

    folder: RunFolder
    recipe: Recipe
    outcome: Outcome
    """Under the name of its folder."""

    @property
    def size(self) -> int | None:
        return self.recipe.data.train_limit

    @property
    def stem(self) -> str:
        """Return the folder's name without what a comparison adds to it for the size and the seed."""
        size = "all" if self.size is None else str(self.size)
        name = self.folder.path.resolve().name
        return name.removesuffix(f"_s{self.recipe.seed}").removesuffix(f"_{size}") or name

    @property
    def digest(self) -> str:
        """Return what only runs have in common that differ by the seed alone."""
        return recipe_digest(self.recipe.model_copy(update={"name": "", "seed": 0}))


def _read(path: Path) -> _Finished | str:
    """Read a run; why it is passed over, where it is none that is finished."""
    folder = RunFolder(path)
    if not path.is_dir():
        return f"'{one_line(path)}' is a file"
    if not (folder.recipe.is_file() and folder.run_json.is_file()):
        inside = next((f"; name those in it: '{path}/'*" for _ in path.glob("*/run.json")), "")
        return f"'{one_line(path)}' is no run folder{inside}"
    try:
        result = read_result(folder)
        if result is None:
            return f"'{one_line(path)}' is not finished"
        if result["split"] is None:
            return f"'{one_line(path)}' is the model of a cross-validation, and has no score of its own"
        recipe = load_stored_recipe(folder.recipe).recipe
        return _Finished(folder, recipe, finished(path.name, recipe.data.train_limit, recipe.seed, folder, result))
    except TlscaleError as error:
        return f"'{one_line(path)}' cannot be read: {error}"


def _labels(runs: Sequence[_Finished]) -> list[str]:
    """Name runs by their folders; those of one recipe that differ by the seed alone have one name."""
    groups: dict[tuple[str, int | None], list[_Finished]] = {}
    for run in runs:
        groups.setdefault((run.stem, run.size), []).append(run)
    names = [run.folder.path.resolve() for run in runs]
    above = os.path.commonpath([name.parent for name in names])
    labels = []
    for run, name in zip(runs, names, strict=True):
        alike = groups[run.stem, run.size]
        num_seeds = len({other.recipe.seed for other in alike})
        is_one = len({other.digest for other in alike}) == 1 and num_seeds == len(alike)
        labels.append(one_line(run.stem if is_one else os.path.relpath(name, above)))
    return labels
