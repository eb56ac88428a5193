"""`tlscale evaluate`: the figures of a finished run's model, on its own data or on other.

Promise: the figures of the run itself are never touched. Images are prepared as the model's own settings say, an
override that would change nothing is an error, and figures on images that had a part in the model say so.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tlscale.commands.evaluation_keys import changes_for_evaluation
from tlscale.commands.tables import show_classes
from tlscale.data.loader import ImageStore, default_workers, eval_batches
from tlscale.data.sources.bad_images import find_bad_images
from tlscale.data.sources.labelled import count_shared, open_labelled, own_images
from tlscale.data.sources.open import BadImages, ImageData, ImageSplit, open_data
from tlscale.data.sources.tables import Role
from tlscale.distributed.processes import Processes, start_processes
from tlscale.errors import DataError, RecipeError, RunFolderError, TlscaleError
from tlscale.models.export import TrainedModel, load
from tlscale.recipe.load import load_stored_recipe
from tlscale.recipe.schema import DataSection, LossSection, Recipe
from tlscale.storage.run_folder import write_json
from tlscale.tracking.console import Console, Pace, number, visible
from tlscale.tracking.stopwatch import Stopwatch, describe_seconds
from tlscale.training.evaluate import InputPath, evaluate
from tlscale.training.loss import Objective

_SPLITS: tuple[Role, ...] = ("train", "validation", "test")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_FILE = "figures.json"


@dataclass(frozen=True)
class _Scored:
    """The images that are scored, and what is said of them."""

    split: ImageSplit
    figures: dict[str, Any]
    """What goes before the figures: which split, of which data (`own`: the run's), what part they had in the model."""
    notes: list[str] = field(default_factory=list)


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
) -> dict[str, Any]:
    """Score the run's exported model.

    Args:
        run: a run folder.
        overrides: changes to its recipe that have an effect on an evaluation, such as `data.path=DIR`.
        data: other data, a folder or a table; short for `data.source` and `data.path`.
        split_name: the split; by default test, else the validation of the run's own data, or all of other data.
        name: of the evaluation's folder below `RUN/evaluations`; by default the data's.
        out: a folder for the figures, in place of that one.
        as_json: print the figures as JSON rather than as tables.
        watch: measures it; by default from this call.

    Returns:
        The figures, which are also written to `figures.json` in the folder of the evaluation.

    Raises:
        TlscaleError: no such run, overrides without effect, data that do not fit its classes, or none to score on.
    """
    watch = watch or Stopwatch()
    folder = Path(run)
    if not (folder / "recipe.yaml").is_file():
        raise RunFolderError(f"'{run}' is not a run folder: there is no '{folder / 'recipe.yaml'}'")
    own = load_stored_recipe(folder / "recipe.yaml").recipe
    changes, is_other = changes_for_evaluation(own, overrides, data)
    recipe = load_stored_recipe(folder / "recipe.yaml", changes).recipe
    target = None if out is None else _checked_out(Path(out))
    _check_name(name)
    trained = load(folder)
    with closing(start_processes(recipe.compute.without_engine())) as processes:
        with watch("scan"):
            if is_other:
                named = [role for role in _SPLITS if any(text.startswith(f"data.{role}_split=") for text in overrides)]
                scored = _other_images(folder, own, recipe, trained, split_name, named, processes)
                scored = _without_bad(scored, recipe.data)
            else:
                with processes.main_first():
                    scored = _own_images(folder, own, trained, split_name)
                if own.data.on_bad_image == "error":  # else the run says which
                    scored = _without_bad(scored, recipe.data)
        figures = {**scored.figures, **_figures(recipe, trained, scored.split, processes, watch)}
        figures |= watch.figures(parts=("start", "scan", "decode", "evaluate"))
        if processes.is_main:
            target = target or folder / "evaluations" / (name or _default_name(folder, figures))
            _write(target, figures, scored.notes, asked_for=out is not None)
            _show(figures, scored.notes, as_json=as_json)
    return figures


def _figures(
    recipe: Recipe, trained: TrainedModel, split: ImageSplit, processes: Processes, watch: Stopwatch
) -> dict[str, Any]:
    with watch("decode"):
        pace = Pace(len(split), lambda text: print(text, file=sys.stderr), f"decoding {split.name}")
        show = pace.add if processes.is_main else None
        store = ImageStore(split, recipe.data, trained.input_spec, on_images=show)
    dtype = torch.float64 if recipe.compute.precision == "fp64" else torch.float32
    workers = default_workers(
        recipe.data, cached=store.cached, augmented=False, device=processes.device, processes=processes.world_size
    )
    batch_size = recipe.evaluate.batch_size or recipe.batch_size
    with watch("evaluate"):
        return evaluate(
            trained.model.to(processes.device, dtype),
            eval_batches(store, processes.rank, processes.world_size, batch_size, workers),
            inputs=InputPath(trained.input_spec, dtype, processes.device, recipe.compute.channels_last),
            num_images=len(split),
            objective=Objective(LossSection(), None),
            classes=trained.classes,
            processes=processes,
        )


# --- Which images -----------------------------------------------------------------------------------------------------


def _own_images(folder: Path, recipe: Recipe, trained: TrainedModel, name: Role | None) -> _Scored:
    """A split of the run's own data, by default its test split, else its validation split.

    Raises:
        DataError: there is no such split, or the model was fitted on it.
    """
    data = _open_own(folder, recipe, trained)
    splits = {split.name: split for split in (data.test, data.validation, data.train) if split is not None}
    name = name or next(iter(splits))
    if name not in splits:
        raise DataError(f"the data of '{folder}' have no split '{name}'; there are: {', '.join(splits)}")
    if name == "validation" and _was_refitted(folder, recipe):
        raise DataError(
            f"'{folder}': its probe was fitted once more on training and validation images together (probe.refit), so "
            "its own data have no image left to score it on. Score it on other images (--data DATA), or run it again "
            "with a test split or with probe.refit=false"
        )
    head: dict[str, Any] = {"split": name, "source": recipe.data.source, "data": _identity(recipe.data), "own": True}
    notes = []
    if not _is_unchanged(folder, data):
        changed = f"the data of '{folder}' are not those that it was trained on"
        if name != "test":
            raise DataError(f"{changed}, so its {name} images cannot be told. Bring the data back, or give --data DATA")
        notes.append(f"{changed}: the test images may be others as well")
    if name == "validation":
        head["selected_on"] = "validation"
        notes.append("these images chose the weights or the settings of the model: the figures are too good by that")
    if recipe.data.on_bad_image == "skip":
        head["num_bad_images"] = data.bad_images.counts.get(name, 0)
    if name == "train":
        head["num_trained_on"] = len(splits[name])
        notes.append("the model was trained on these images")
    return _Scored(splits[name], head, notes)


def _other_images(
    folder: Path,
    own: Recipe,
    recipe: Recipe,
    trained: TrainedModel,
    name: Role | None,
    named: Sequence[Role],
    processes: Processes,
) -> _Scored:
    """Images of other data, and how many of them the run was trained on."""
    with processes.main_first():
        found = open_labelled(recipe.data, trained.classes, name=name, named=named)
    notes = list(found.notes)
    counted = processes.run_on_main(_trained_on, folder, own, trained, found.split)
    notes.append(counted["said"])
    head = {
        "split": found.of,
        "source": recipe.data.source,
        "data": _identity(recipe.data),
        "own": False,
        "num_trained_on": counted["num"],
        **({"num_selected_on": counted["num_selected_on"]} if counted.get("num_selected_on") else {}),
    }
    return _Scored(found.split, head, notes)


def _trained_on(folder: Path, own: Recipe, trained: TrainedModel, scored: ImageSplit) -> dict[str, Any]:
    """How many of some images the run was trained on (`num`, None where it cannot be told), and in words (`said`)."""
    refitted = _was_refitted(folder, own)
    try:
        data = _open_own(folder, own, trained)
        if not _is_unchanged(folder, data):
            raise DataError("its data are not those that it was trained on")
        num = sum(count_shared(scored, split) for split in own_images(data, refitted=refitted))
        chose = 0 if refitted or data.validation is None else count_shared(scored, data.validation)
    except DataError as error:
        first = str(error).splitlines()[0]
        return {"num": None, "said": f"whether the run was trained on any of these images cannot be told: {first}"}
    said = f"the run was trained on {num:,} of these {len(scored):,} images"
    if chose:
        said += f", and {chose:,} of them chose its weights or settings"
    return {"num": num, "num_selected_on": chose, "said": said + (": the figures are too good by those" if num else "")}


def _open_own(folder: Path, recipe: Recipe, trained: TrainedModel) -> ImageData:
    # The model's classes are the truth: a class list that other data would give by themselves may be in another order.
    section = recipe.data.model_copy(update={"classes": list(trained.classes)})
    skipped = _read_json(folder / "run.json").get("bad_images")
    return open_data(section, recipe.seed, bad_images=None if skipped is None else BadImages.from_plain(skipped))


def _is_unchanged(folder: Path, data: ImageData) -> bool:
    """Whether the labels, row by row, are those that the run began with; True where it did not note them."""
    then = _read_json(folder / "run.json").get("data", {}).get("labels_sha256")
    return then is None or then == data.identity.get("labels_sha256")


def _was_refitted(folder: Path, recipe: Recipe) -> bool:
    """Whether the exported classifier was fitted on training and validation images together."""
    noted = (_read_json(folder / "result.json").get("probe") or {}).get("refitted")
    return bool(noted) if noted is not None else recipe.probe is not None and recipe.probe.refit


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _without_bad(scored: _Scored, section: DataSection) -> _Scored:
    """`data.on_bad_image: skip`: without the images that cannot be read, which are counted."""
    if section.on_bad_image != "skip":
        return scored
    max_pixels = round(section.max_megapixels * 1e6)
    bad = find_bad_images(scored.split, max_pixels=max_pixels)
    if len(bad) == len(scored.split):
        raise DataError(f"none of the {len(bad):,} images can be read; the first: {bad[0][1]}")
    notes = [f"skipped {len(bad):,} of {len(scored.split):,} images, which cannot be read: {bad[0][1]}"] if bad else []
    split = scored.split.without([row for row, _ in bad])
    return _Scored(split, {**scored.figures, "num_bad_images": len(bad)}, [*scored.notes, *notes])


# --- What becomes of the figures --------------------------------------------------------------------------------------


def _identity(section: DataSection) -> dict[str, str]:
    """Which data they are, without the folders above them: a name, and a digest that tells equal names apart."""
    place = section.path or section.source
    digest = hashlib.sha256(f"{section.source} {place} {section.config} {section.revision}".encode()).hexdigest()
    return {"name": Path(place).name or section.source, "id": digest[:12]}


def _default_name(folder: Path, figures: dict[str, Any]) -> str:
    """The split for the run's own data, else the data's name; with a digest where another has that name."""
    if figures["own"]:
        return str(figures["split"])
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", figures["data"]["name"]).strip(".-") or "data"
    name = f"data-{name}" if name in _SPLITS else name
    there = _read_json(folder / "evaluations" / name / _FILE).get("data")
    return name if there in (None, figures["data"]) else f"{name}-{figures['data']['id']}"


def _check_name(name: str | None) -> None:
    if name is not None and not _NAME.fullmatch(name):
        raise RecipeError(f"--name: '{name}' is no name of a folder; take letters, digits, '.', '_' and '-'")


def _checked_out(out: Path) -> Path:
    """`--out`, made and found to be writable, before any work.

    Raises:
        RunFolderError: it is a run's folder, holds another file of that name, or cannot be written.
    """
    if (out / "run.json").exists():
        raise RunFolderError(f"--out: '{out}' is a run folder; give a folder of the evaluation's own")
    if (out / _FILE).exists() and "num_images" not in _read_json(out / _FILE):
        raise RunFolderError(f"--out: '{out / _FILE}' is not from an evaluation, so it is not replaced")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"--out: '{out}' cannot be made: {error.strerror or error}") from error
    if not os.access(out, os.W_OK | os.X_OK):
        raise RunFolderError(f"--out: '{out}' cannot be written to: permission denied")
    return out


def _write(target: Path, figures: dict[str, Any], notes: list[str], *, asked_for: bool) -> None:
    """The figures as a file; where that cannot be, they are shown all the same, and a note says so."""
    try:
        target.mkdir(parents=True, exist_ok=True)
        write_json(target / _FILE, figures)
    except OSError as error:
        why = error.strerror or str(error)
        if asked_for:
            raise TlscaleError(f"--out: the figures cannot be written to '{target}': {why}") from error
        notes.append(f"the figures could not be written to '{target}' ({why}); --out DIR writes them elsewhere")
    else:
        notes.append(f"figures: {target / _FILE}")


def _show(figures: dict[str, Any], notes: Sequence[str], *, as_json: bool) -> None:
    for note in notes:
        print(f"tlscale: {visible(note)}", file=sys.stderr)
    if as_json:
        print(json.dumps(figures))
        return
    console = Console()
    show_classes(figures, console)
    console.say(f"seconds: {describe_seconds(figures)}")
    low, high = figures["top1_interval95"]
    of = f"{figures['split']} images" if figures["split"] != "all" else f"images of {figures['data']['name']}"
    chose = " (they chose the model)" if figures.get("selected_on") else ""
    console.say(
        f"{figures['num_images']:,} {of}{chose}: top1 {number(figures['top1'])} "
        f"(95% interval {low:.4f} to {high:.4f}), loss {number(figures['loss'])}, "
        f"macro-F1 {number(figures['macro_f1'])}, ECE {number(figures['ece'])}",
        style="bold",
    )
