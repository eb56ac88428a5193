"""`tlscale evaluate`: the figures of a finished run's model, on its own data or on other.

Promise: the figures of the run itself are never touched. Images are prepared as the model's own settings say, an
override that would change nothing is an error, and figures on images that had a part in the model say so.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tlscale.commands.evaluation_images import FinishedRun, Scored, had_a_part, other_images, own_split, read_json
from tlscale.commands.evaluation_keys import changes_for_evaluation
from tlscale.commands.run_result import RunResult
from tlscale.commands.tables import interval_of, score_text, show_classes
from tlscale.data.loader import ImageStore, eval_batches
from tlscale.data.sources.tables import Role
from tlscale.data.transforms import InputPath
from tlscale.data.views import crop_places, views_of
from tlscale.data.workers import default_workers
from tlscale.distributed.device import naming_memory
from tlscale.distributed.processes import Processes, start_processes
from tlscale.distributed.signals import StopRequest
from tlscale.errors import RecipeError, RunFolderError, TlscaleError, option
from tlscale.models.export import TrainedModel, load
from tlscale.models.views import over_views
from tlscale.recipe.load import load_stored_recipe
from tlscale.recipe.schema import LossSection, Recipe
from tlscale.storage.files import make_folder, write_json
from tlscale.storage.run_folder import refuse_not_utf8
from tlscale.tracking.console import Console, number, visible
from tlscale.tracking.progress import Pace
from tlscale.tracking.redact import places_of, without_places
from tlscale.tracking.stopwatch import Stopwatch, describe_seconds
from tlscale.training.evaluate import SeveralLabels, evaluate
from tlscale.training.label_set_figures import add_label_figures
from tlscale.training.label_set_predictions import collect_of
from tlscale.training.loss import CrossEntropyLoss
from tlscale.training.prediction_figures import add_prediction_figures
from tlscale.training.predictions import Predictions, write_predictions
from tlscale.training.result import score_of

_SPLITS: tuple[Role, ...] = ("train", "validation", "test")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_FILE = "figures.json"


def evaluate_run(
    run: str | Path,
    overrides: Sequence[str] = (),
    *,
    data: str | None = None,
    split_name: Role | None = None,
    name: str | None = None,
    out: str | Path | None = None,
    as_json: bool = False,
    watch: Stopwatch | None = None,
) -> RunResult:
    """Do what `in_python.evaluate` says; `as_json` prints the figures as JSON rather than as tables."""
    watch = watch or Stopwatch()
    folder = Path(run)
    if not (folder / "recipe.yaml").is_file():
        raise RunFolderError(f"'{run}' is not a run folder: there is no '{folder / 'recipe.yaml'}'")
    own = load_stored_recipe(folder / "recipe.yaml").recipe
    changes, is_other = changes_for_evaluation(own, overrides, data)
    recipe = load_stored_recipe(folder / "recipe.yaml", changes).recipe
    target = None if out is None else _checked_out(Path(out))
    if name is not None and not _NAME.fullmatch(name):
        remedy = "Write letters, digits, '.', '_' and '-'"
        raise RecipeError(f"'{name}' is not the name of a folder", key=option("name"), remedy=remedy)
    finished = FinishedRun(folder, own, load(folder))
    with (
        closing(start_processes(recipe.compute.without_engine())) as processes,
        StopRequest(peers=processes.peers()),
        Console(enabled=processes.is_main, stderr=True).shows_progress(),
    ):
        with watch("scan"):
            if is_other:
                named = [role for role in _SPLITS if any(text.startswith(f"data.{role}_split=") for text in overrides)]
                scored = other_images(finished, recipe.data, split_name, named, processes)
            else:
                with processes.main_first():
                    scored = own_split(finished, split_name)
        predictions = collect_of(scored.split, finished.trained)
        figures = _figures(recipe, finished.trained, scored, predictions, processes, watch)
        figures["notes"] = without_places(scored.notes, places_of(recipe))
        target = target or folder / "evaluations" / (name or _default_name(folder, figures))
        notes = [*scored.notes, _write(target, figures, predictions, processes, watch, asked_for=out is not None)]
        if processes.is_main:
            _show(figures, notes, as_json=as_json)
    return RunResult(figures, target)


def _figures(
    recipe: Recipe,
    trained: TrainedModel,
    scored: Scored,
    predictions: Predictions,
    processes: Processes,
    watch: Stopwatch,
) -> dict[str, Any]:
    """Compute all figures, and collect this process's predictions."""
    split = scored.split
    with watch("decode"):
        pace = Pace(len(split), f"decoding {split.name}")
        make = partial(ImageStore, places=crop_places(trained.views), on_images=pace.add)
        store = processes.run_on_all(make, split, recipe.data, trained.input_spec)
    dtype = torch.float64 if recipe.compute.precision == "fp64" else torch.float32
    workers = default_workers(
        recipe.data, cached=store.cached, augmented=False, device=processes.device, processes=processes.world_size
    )
    batch_size, views = recipe.evaluate.batch_size or recipe.batch_size, views_of(trained.views)
    network = trained.model.to(processes.device, dtype)
    inputs = InputPath(trained.input_spec, dtype, processes.device, recipe.compute.channels_last)
    with watch("evaluate"), naming_memory("evaluate.batch_size", f"Give a lower one than {batch_size}."):
        figures = evaluate(
            over_views(network, len(views), len(trained.classes), several=trained.thresholds is not None),
            eval_batches(
                store, processes.rank, processes.world_size, batch_size, workers, pin_memory=processes.pins_memory
            ),
            inputs=lambda batch: inputs.of_views(batch, views),
            num_images=len(split),
            loss_fn=CrossEntropyLoss(LossSection(), None),
            classes=trained.classes,
            processes=processes,
            predictions=predictions,
            several=None if trained.thresholds is None else SeveralLabels(trained.thresholds, split.groups_N),
        )
    often = {"majority": scored.majority(trained.classes)} if trained.thresholds is None else {"task": "multi_label"}
    return {**scored.figures, **often, **({"views": list(trained.views)} if trained.views else {}), **figures}


# --- What becomes of the figures --------------------------------------------------------------------------------------


def _default_name(folder: Path, figures: dict[str, Any]) -> str:
    """Return the split for the run's own data, else the data's name; with a digest where another has that name."""
    if figures["own"]:
        return str(figures["split"])
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", figures["data"]["name"]).strip(".-") or "data"
    name = f"data-{name}" if name in _SPLITS else name
    there = read_json(folder / "evaluations" / name / _FILE).get("data")
    return name if there in (None, figures["data"]) else f"{name}-{figures['data']['id']}"


def _checked_out(out: Path) -> Path:
    """Make the folder of `--out`, and check that it can be written, before any work.

    Raises:
        RunFolderError: it is a run's folder, holds another file of that name, or cannot be written to.
    """
    refuse_not_utf8(out)
    if (out / "run.json").exists():
        remedy = "Give a folder of the evaluation's own"
        raise RunFolderError(f"'{out}' is a run folder", key=option("out"), remedy=remedy)
    if (out / _FILE).exists() and "num_images" not in read_json(out / _FILE):
        raise RunFolderError(f"'{out / _FILE}' is not from an evaluation, so it is not replaced", key=option("out"))
    if why := _disk_error(lambda: make_folder(out)):
        raise RunFolderError(f"'{out}' cannot be made: {why}", key=option("out"))
    if not os.access(out, os.W_OK | os.X_OK):
        raise RunFolderError(f"'{out}' cannot be written to: permission denied", key=option("out"))
    return out


def _write(
    target: Path,
    figures: dict[str, Any],
    predictions: Predictions,
    processes: Processes,
    watch: Stopwatch,
    *,
    asked_for: bool,
) -> str:
    """Add the seconds to the figures, and write these and the predictions; called on all processes.

    Return a note for the user: where they are, or why they could not be written, as they are shown all the same.

    Raises:
        TlscaleError: they cannot be written to the folder that was `asked_for`.
    """
    why = processes.run_on_main(_disk_error, lambda: make_folder(target))
    if why is None:
        try:
            write_predictions(target / "predictions.parquet", predictions, processes)
            file = target / "predictions.parquet"
            add = add_prediction_figures if figures.get("task") is None else add_label_figures
            figures |= processes.run_on_main(add, figures, file, have_chosen=had_a_part(figures))
        except TlscaleError as raised:
            why = str(raised)
    figures |= watch.figures(parts=("start", "scan", "decode", "evaluate"))  # all but writing this last, small file
    if why is None:
        why = processes.run_on_main(_disk_error, lambda: write_json(target / _FILE, figures))
    if why is None:
        return f"figures: {target / _FILE}   predictions: {target / 'predictions.parquet'}"
    if asked_for:
        error = TlscaleError(f"the figures cannot be written to '{target}': {why}", key=option("out"))
        error.reported_by_main = True
        raise error
    elsewhere = option("out", "DIR").shell + " writes them elsewhere"
    return f"the figures could not be written to '{target}' ({why}); {elsewhere}"


def _disk_error(write: Callable[[], None]) -> str | None:
    """Write; return why the disk did not take it, or None."""
    try:
        write()
    except OSError as error:
        return error.strerror or str(error)
    return None


def _show(figures: dict[str, Any], notes: Sequence[str], *, as_json: bool) -> None:
    for note in notes:
        print(f"tlscale: {visible(note)}", file=sys.stderr)
    if as_json:
        print(json.dumps(figures))
        return
    console = Console()
    show_classes(figures, console)
    console.say(f"seconds: {describe_seconds(figures)}")
    of = f"{figures['split']} images" if figures["split"] != "all" else f"images of {figures['data']['name']}"
    part = " (they chose the model)" if figures.get("selected_on") else ""
    in_earlier = any(one["num_trained_on"] or one["num_selected_on"] for one in figures.get("earlier_runs", ()))
    if not part and (had_a_part(figures) or in_earlier):
        part = " (too good: some of them had a part in the model)"
    others = [("loss", "loss"), ("macro-F1", "macro_f1"), ("balanced accuracy", "balanced_accuracy"), ("ECE", "ece")]
    if score_of(figures) == "mean_average_precision":
        others = [("loss", "loss"), ("macro-F1", "macro_f1"), ("micro-F1", "micro_f1")]
    told = ", ".join(f"{name} {number(figures[key])}{interval_of(figures, key)}" for name, key in others)
    auroc = f", AUROC {number(figures['auroc'])}" if figures.get("auroc") is not None else ""
    console.say(f"{figures['num_images']:,} {of}{part}: {score_text(figures)}, {told}{auroc}", style="bold")
