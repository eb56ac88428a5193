"""Put finished runs side by side, wherever and whenever they ran: nothing is run here.

Runs of one recipe with several seeds are one row, as in a comparison that ran them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlscale.commands.compare_outcomes import finished
from tlscale.commands.compare_report import (
    columns_of,
    refuse_other_images,
    table,
    to_plain,
    to_rows,
    write_comparison,
)
from tlscale.commands.comparison import Comparison
from tlscale.commands.paired_tests import paired_tests
from tlscale.errors import RunFolderError, first_few, one_line, option, quoted
from tlscale.recipe.load import load_stored_recipe, recipe_digest
from tlscale.recipe.schema import Recipe
from tlscale.storage.files import make_folder, naming_disk_errors
from tlscale.storage.run_folder import RunFolder
from tlscale.tracking.console import Console
from tlscale.training.run_files import read_result

_TITLE = "Comparison of runs"


def compare_runs(places: Sequence[str | os.PathLike[str]], out: Path | None, console: Console) -> Comparison:
    """Tabulate finished runs; those that are not finished, and other folders, are passed over with a note.

    Args:
        places: their folders.
        out: a folder for the table and the picture; None: they are shown alone.

    Raises:
        DataError: they were scored on different images.
        RunFolderError: none of them is finished, or `out` is a run folder.
    """
    if out is not None and RunFolder(out).run_json.exists():
        raise RunFolderError(
            f"'{out}' is a run folder", key=option("out"), remedy="Give a folder of the comparison's own"
        )
    found = [_read(Path(place)) for place in dict.fromkeys(os.fspath(place) for place in places)]
    runs = [run for run in found if not isinstance(run, str)]
    notes = [f"Passed over: {run}." for run in found if isinstance(run, str)]
    if not runs:
        remedy = "Name folders of finished runs, or recipe files"
        raise RunFolderError(
            f"no finished run among {first_few(quoted(os.fspath(place) for place in places))}", remedy=remedy
        )
    outcomes = [
        finished(label, run.recipe.data.train_limit, run.recipe.seed, run.folder, run.result)
        for label, run in zip(_labels(runs), runs, strict=True)
    ]
    refuse_other_images(outcomes)
    pairs = paired_tests(to_rows(outcomes))
    console.table(_TITLE, columns_of(outcomes), table(outcomes, pairs), num_keys=2)
    if out is None:
        figures = to_plain(_TITLE, outcomes, notes, pairs)
    else:
        with naming_disk_errors(out):
            make_folder(out)
        figures = write_comparison(out, _TITLE, outcomes, notes, pairs)
    for line in figures["notes"]:
        console.say(line)
    if out is not None:
        console.say(f"table: {out / 'compare.md'}   picture: {out / 'compare.png'}   figures: {out / 'compare.json'}")
    return Comparison(figures, out)


@dataclass(frozen=True)
class _Finished:
    """Hold a finished run."""

    folder: RunFolder
    recipe: Recipe
    result: dict[str, Any]

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
    if not (folder.recipe.is_file() and folder.run_json.is_file()):
        inside = next((f"; name those in it: '{path}/'*" for _ in path.glob("*/run.json")), "")
        return f"'{one_line(path)}' is no run folder{inside}"
    try:
        result = read_result(folder)
    except RunFolderError as error:
        return str(error)
    if result is None:
        return f"'{one_line(path)}' is not finished"
    if result["split"] is None:
        return f"'{one_line(path)}' is the model of a cross-validation, and has no score of its own"
    return _Finished(folder, load_stored_recipe(folder.recipe).recipe, result)


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
