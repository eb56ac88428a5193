"""`tlscale run`: everything up to the first step or fit, the same for training and for a probe.

Chapters: process; folder; data, model and weights; plan; and then the job that the recipe asks for.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tlscale.commands.tables import show_plan, show_result
from tlscale.data.sources.open import BadImages, ImageData
from tlscale.distributed.device import choose_algorithms, naming_memory
from tlscale.distributed.host import num_cores
from tlscale.distributed.processes import Processes, start_processes
from tlscale.distributed.signals import StopRequest, stopped_by
from tlscale.errors import ResumeError, RunFolderError, Stopped, flag, option
from tlscale.models.model_folder import fault_of_model
from tlscale.recipe.load import diff_recipes, load_stored_recipe, with_values
from tlscale.recipe.schema import Recipe
from tlscale.storage.files import naming_disk_errors, reporting_disk_errors, write_json
from tlscale.storage.run_folder import Mode, RunFolder, claim, forget_stop
from tlscale.tracking.console import Console
from tlscale.tracking.redact import about_secrets
from tlscale.tracking.stopwatch import Stopwatch
from tlscale.training.checkpoint.files import list_checkpoints
from tlscale.training.compiler import check_compiler
from tlscale.training.cross_validation import cross_validate
from tlscale.training.earlier_images import compare_with_earlier, refuse_replacing_start
from tlscale.training.fold_checks import refuse_other_images, refuse_other_part
from tlscale.training.fold_parts import Part
from tlscale.training.lengthening import lengthen, lengthens, other_steps, refuse_longer, settle_length
from tlscale.training.loop import train
from tlscale.training.probe import probe
from tlscale.training.resumed_inputs import checked_run_info
from tlscale.training.run_files import read_result, read_run_info
from tlscale.training.setup import set_up

# A resumed run may differ in these: they change nothing of what is learned, or only rounding. The exception is batch
# norm and dropout on other passes (`compute.micro_batch_size`, the number of processes), which `computed` announces.
MAY_CHANGE = (
    "checkpoint.",
    "codes.cache_gib",
    "codes.disk_gib",
    "codes.keep",
    "codes.memory_mib",
    "compute.engine",
    "compute.gradient_checkpointing",
    "compute.num_processes",
    "compute.hang_timeout_s",
    "compute.micro_batch_size",
    "data.cache_mib",
    "data.workers",
    "evaluate.batch_size",
    "log_every",
    "non_finite.",
    "track",
    "wandb",
)

_NEEDED = ("data", "bad_images", "input", "weights")  # of `run.json`, to compare them with those of today

_KEEP_EVERY_S = 10.0  # seconds of a start on disk


@reporting_disk_errors()
def run(
    recipe: Recipe,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    watch: Stopwatch | None = None,
) -> dict[str, Any]:
    """Do what `in_python.run` says; return what `result.json` holds."""
    watch = watch or Stopwatch()
    # -- process ------------------------------------------------------------------------------------------------
    check_compiler(recipe.compute)
    processes = start_processes(recipe.compute)
    mode: Mode = "resume" if resume else "overwrite" if overwrite else "fresh"
    folder = RunFolder(Path(out) if out is not None else Path("runs") / recipe.name)
    # -- folder: the main process holds it for all ----------------------------------------------------------------
    console = Console(enabled=processes.is_main)
    with (
        closing(processes),
        processes.main_holds(lambda: claim(folder.path, mode)),
        console.shows_progress(),
    ):
        choose_algorithms(processes.device, deterministic=recipe.compute.deterministic)
        processes.run_on_main(_settle_earlier_stop, folder, console)
        return _run(recipe, folder, processes, console, watch, mode)


def _run(
    recipe: Recipe, folder: RunFolder, processes: Processes, console: Console, watch: Stopwatch, mode: Mode
) -> dict[str, Any]:
    """Run what is in a folder that is held."""
    keepers: list[Callable[[], None]] = []  # of the run, and of the fold that it is at

    def keep() -> None:
        for one in keepers:
            one()

    on_main = (folder.stop, keep) if processes.is_main else (None, None)
    with StopRequest(on_main[0], processes.peers(), on_main[1]):
        return _Start(processes, console, keepers).run(recipe, folder, watch, mode)


@dataclass(frozen=True)
class _Start:
    """Run what is in folders that are held: a run, and where that is a cross-validation those of its folds."""

    processes: Processes
    console: Console
    keepers: list[Callable[[], None]]

    def run_part(self, recipe: Recipe, path: Path, part: Part, whole: ImageData) -> dict[str, Any]:
        """Run a part of a cross-validation, or go on with it, or read its result where it is complete."""
        folder = RunFolder(path)
        with self.processes.main_holds(lambda: claim(path, "resume")):
            return self.run(recipe, folder, Stopwatch(), "resume", part, whole)

    def run(
        self,
        recipe: Recipe,
        folder: RunFolder,
        watch: Stopwatch,
        mode: Mode,
        part: Part | None = None,
        whole: ImageData | None = None,
    ) -> dict[str, Any]:
        self.keepers.append(_Spent(folder, watch).keep)
        try:
            with _marking_stop(folder, watch, is_main=self.processes.is_main):
                return self._run(recipe, folder, watch, mode, part, whole)
        finally:
            self.keepers.pop()

    def _run(
        self,
        recipe: Recipe,
        folder: RunFolder,
        watch: Stopwatch,
        mode: Mode,
        part: Part | None,
        whole: ImageData | None,
    ) -> dict[str, Any]:
        processes, console, is_longer, is_alone = self.processes, self.console, False, part is None
        run_info = None if mode == "overwrite" else processes.run_on_main(read_run_info, folder, _NEEDED)
        if run_info is not None:
            part = processes.run_on_main(_same_part, part, run_info, folder)
            older, is_longer = processes.run_on_main(_refuse_other_recipe, recipe, folder, console)
            recipe = with_values(recipe, older)
            if not is_longer and (done := processes.run_on_main(_earlier_result, folder, recipe, console)) is not None:
                if whole is not None:
                    processes.run_on_main(refuse_other_images, recipe, whole, done, folder)
                processes.run_on_main(_tidy, folder, console)  # a process that was killed just after the result had not
                console.say(f"'{folder.path}' is complete already; its figures are in {folder.result}")
                return done

            _take_threads(recipe, run_info, processes, console)
        for spent_s in processes.run_on_main(_spent_before, folder) if mode == "resume" else ():
            watch.add_earlier(spent_s)  # now: what is kept on disk from here on is of all starts
        # -- data, model and weights: whatever is wrong with them ends the run here -------------------------------
        known = None if whole is None else whole.bad_images
        bad_images = BadImages.from_plain(run_info["bad_images"]) if run_info else known
        if run_info is None and is_alone and (warning := about_secrets(recipe)):
            console.say(warning, style="bold red")
        if mode == "overwrite" and is_alone:
            processes.run_on_main(refuse_replacing_start, recipe, folder)
        opened = partial(set_up, recipe, world_size=processes.world_size, part=part, bad_images=bad_images)
        with processes.main_first():  # what a hub has to give is fetched once
            setup = opened(watch=watch, began=None if run_info is None else run_info.get("input"))
            compare_with_earlier(setup, is_new=run_info is None, is_whole=part is None)
            if whole is not None:
                refuse_other_part(whole, setup.data, folder)

        # -- plan -------------------------------------------------------------------------------------------------
        if is_alone:
            show_plan(setup, console, device=str(processes.device), whole=False)
        if run_info is not None:
            run_info = processes.run_on_main(checked_run_info, run_info, setup, folder, console)
            settle = partial(lengthen, setup) if is_longer else settle_length
            run_info = processes.run_on_main(settle, run_info, folder)
        processes.run_on_main(folder.stopped.unlink, missing_ok=True)
        with naming_memory():
            if recipe.evaluate.folds is not None and part is None:
                result, how_to_load = cross_validate(setup, folder, processes, run_info, console, self.run_part)
            else:
                job = train if recipe.probe is None else probe
                result, how_to_load = job(setup, folder, processes, run_info, console)
        processes.run_on_main(_tidy, folder, console)
        if is_alone:
            show_result(result, console, folder=folder.path, how_to_load=how_to_load)
        return result


def _same_part(part: Part | None, run_info: dict[str, Any], folder: RunFolder) -> Part | None:
    """Return the part of a cross-validation that a run is; one that is resumed alone is what it was.

    It keeps the temperature that it began with, as an older version chose none, and another CPU may round it otherwise,
    and the name by which trackers know it.

    Raises:
        RunFolderError: it is another one.
    """
    then = None if run_info.get("fold") is None else Part.from_plain(run_info["fold"])
    if part is not None and (then is None or part._replace(calibration=then.calibration, group=then.group) != then):
        raise RunFolderError(
            f"'{folder.path}' holds another part of the cross-validation, or one of another length",
            remedy="Remove it, and resume the whole with " + flag("resume"),
        )
    return then


def _tidy(folder: RunFolder, console: Console) -> None:
    """Remove what is only needed while the run is at work; say what the disk refuses to remove."""
    with suppress(OSError):  # such as in a run folder that can only be read
        folder.spent.unlink(missing_ok=True)
    shutil.rmtree(folder.fits, ignore_errors=True)
    for left in filter(os.path.lexists, (folder.spent, folder.fits)):
        remedy = f"Remove it, or let the same line with {flag('resume').shell} do it"
        console.say(f"'{left}' cannot be removed; the run is complete without it. {remedy}", style="yellow")


def _take_threads(recipe: Recipe, run_info: dict[str, Any], processes: Processes, console: Console) -> None:
    """Compute with the threads that the run began with, where the recipe names none: sums depend on them."""
    then, now = run_info.get("threads"), torch.get_num_threads()
    is_free = recipe.compute.threads is None and processes.device.type == "cpu"
    if not is_free or not isinstance(then, int) or then < 1 or then == now:
        return
    if run_info.get("world_size") != processes.world_size:
        return
    if then * processes.world_size > num_cores():
        console.say(f"{now} CPU threads a process, and {then} when the run began: the same training up to rounding")
        return
    torch.set_num_threads(then)
    console.say(f"{then} CPU threads a process, as the run began")


def _settle_earlier_stop(folder: RunFolder, console: Console) -> None:
    """Remove a request to stop that was made before this start: it was to another run.

    Raises:
        Stopped: this is torchrun's restart, which takes a stop for a failure and starts the stopped processes again.
    """
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and folder.stopped.exists():
        raise Stopped(f"'{folder.path}' was stopped, and this is only torchrun's restart: nothing was done")
    if forget_stop(folder):
        console.say(f"'{folder.stop}' is from before this start, so it is removed")


class _Spent:
    """Keep the seconds of a start on disk now and then: one that is killed counts, too."""

    def __init__(self, folder: RunFolder, watch: Stopwatch, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._watch, self._clock = folder.spent, watch, clock
        self._kept_s = clock()

    def keep(self) -> None:
        if self._clock() - self._kept_s >= _KEEP_EVERY_S:
            self._kept_s = self._clock()
            with suppress(OSError):  # a disk that fails is found by what is needed
                write_json(self._path, {"spent_s": self._watch.spent()})


def _spent_before(folder: RunFolder) -> list[dict[str, float]]:
    """Read the seconds of all starts up to the last one: by what it left when it was stopped, and before."""
    accounts = []
    for path in (folder.stopped, folder.spent):
        with suppress(
            OSError, ValueError, KeyError, TypeError, AttributeError
        ):  # of an older version, or put there by hand
            spent_s = json.loads(path.read_text())["spent_s"]
            accounts.append({str(part): float(seconds) for part, seconds in spent_s.items()})
    return accounts


@contextmanager
def _marking_stop(folder: RunFolder, watch: Stopwatch, *, is_main: bool) -> Iterator[None]:
    """Leave word of a stop for a launcher, which sees no exit code of ours, and remove the request that was obeyed."""
    try:
        yield
    except Stopped as stopped:
        if is_main:
            with naming_disk_errors(folder.stopped):
                write_json(folder.stopped, {"by": stopped_by(), "message": str(stopped), "spent_s": watch.spent()})
            folder.spent.unlink(missing_ok=True)
            with suppress(RunFolderError):  # the run is saved, and the next start says what is wrong with it
                forget_stop(folder)
        raise


def _earlier_result(folder: RunFolder, recipe: Recipe, console: Console) -> dict[str, Any] | None:
    """Read `result.json`; None where the run is not complete, or not any more, and can be finished again.

    Raises:
        RunFolderError: its figures are damaged, or its model is and cannot be made again.
    """
    if not folder.result.exists():
        return None
    result, fault = read_result(folder), fault_of_model(folder.model)
    if fault is None:
        return result
    is_made_anew = recipe.probe is not None or recipe.evaluate.folds is not None  # of what is in its folders
    if not is_made_anew and not list_checkpoints(folder.checkpoints):
        raise RunFolderError(
            f"'{folder.path}' was complete, and is damaged; there is no checkpoint to finish it from: {fault}",
            remedy="Copy it from where it is whole, or run the recipe again with " + flag("overwrite") + ".",
        )
    console.say(f"WARNING: '{folder.path}' was complete, and is finished again: {fault}", style="bold red")
    return None


def _refuse_other_recipe(
    recipe: Recipe, folder: RunFolder, console: Console
) -> tuple[dict[str, dict[str, object]], bool]:
    """Compare the recipe with that of the run.

    Returns:
        By section, what keys newer than the run are to be for it; and whether the run is to become longer.
    """
    stored, older, notes = load_stored_recipe(folder.recipe)
    for note in notes:
        console.say(note)
    for section, keys in older.items() if recipe.probe is None else ():  # a probe has no use for them
        for key, value in keys.items():
            console.say(f"{section}.{key}: {value}, as the run began: it is older than this key")
    changes = [
        (key, old, new)
        for key, old, new in diff_recipes(stored, with_values(recipe, older))
        if not key.startswith(MAY_CHANGE) or (key == "codes.keep" and _sees_other_views(stored, recipe))
    ]
    if lengthens(stored, recipe, changes):
        why = other_steps(stored)
        if why is None and folder.result.exists() and not list_checkpoints(folder.checkpoints):
            why = "no checkpoint of it is left, so that it would begin again"
        if why is None:
            return older, True
        if folder.result.exists():
            refuse_longer(why, changes, folder)
    if changes:
        lines = "\n  ".join(f"{key}: {old!r} -> {new!r}" for key, old, new in changes)
        raise ResumeError(
            f"'{folder.path}' cannot be resumed with another recipe:\n  {lines}",
            remedy=f"Its own recipe is '{folder.recipe}'; another recipe wants another folder: " + option("out", "DIR"),
        )
    return older, False


def _sees_other_views(stored: Recipe, recipe: Recipe) -> bool:
    """Report whether epochs would see other views: with `codes.keep: always` one is cached for all of them."""
    is_one = bool(recipe.data.augment) and recipe.codes.views == 1 and recipe.distill is None
    return is_one and (stored.codes.keep == "always") != (recipe.codes.keep == "always")
