"""`tlscale export`: the model of a run for elsewhere, compared with the run's on real images.

Promise: a file that gives anything but what the run's model gives does not get its name. Nothing is written over but an
export of ours. Nothing leaves the machine.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tlscale import __version__
from tlscale.commands.evaluation_images import FinishedRun, read_json
from tlscale.commands.model_card import write_card
from tlscale.data.given import find_images, read_given
from tlscale.data.loader import ImageStore, stacked
from tlscale.data.sources.open import ImageSplit
from tlscale.distributed.signals import check_stop, stoppable
from tlscale.errors import DataError, RunFolderError, Stopped, TlscaleError, one_line, option, speaks_python
from tlscale.models.classifier import CodesClassifier
from tlscale.models.exports.check import NO_UNKNOWN, Evidence, about
from tlscale.models.exports.onnx_file import write_onnx
from tlscale.models.exports.timm_folder import write_timm
from tlscale.models.exports.torch_program import write_program
from tlscale.models.knn import KnnHead
from tlscale.models.model_folder import CONFIG_FILE, TrainedModel, load
from tlscale.models.unknown import UnknownSettings
from tlscale.recipe.load import load_stored_recipe
from tlscale.storage.files import file_sha256, flush, make_folder, reporting_disk_errors, write_json
from tlscale.storage.run_folder import refuse_not_utf8
from tlscale.training.run_path import RunFacts

TARGETS = ("onnx", "torch-export", "timm", "hub")
NOTES = "export.json"
"""Says what an export is of, how it was checked, and which files are its own."""
_MOST_IMAGES = 256
_ASIDE = ".export"


@speaks_python
def export(
    run: str | os.PathLike[str],
    *,
    to: str,
    out: str | os.PathLike[str],
    images: Iterable[str | os.PathLike[str]] = (),
    licence: str = "unknown",
    with_training_codes: bool = False,
) -> Path:
    """Write the model of a run for use elsewhere.

    Args:
        run: its folder.
        to: `onnx`, `torch-export`, `timm`, or `hub`: as `timm`, with a model card. Nothing is uploaded.
        out: a folder; it is made. One that holds an export to the same format is replaced.
        images: paths to compare on, in place of the run's own data.
        licence: for the model card, such as `cc-by-4.0`.
        with_training_codes: export a classifier of nearest neighbours, which holds the features of all its training
            images.

    Returns:
        The folder.

    Raises:
        TlscaleError: no such run, a folder that holds something else, or an export that does not give what the run's
            model gives; then nothing is written.
    """
    if to not in TARGETS:
        raise DataError(f"there is no '{to}'", key=option("to"), remedy=f"There are: {', '.join(TARGETS)}")
    folder, target = Path(run), Path(os.path.abspath(out))
    refuse_not_utf8(target)
    trained = load(folder)
    _refuse_training_codes(trained, allowed=with_training_codes)
    with reporting_disk_errors():
        _refuse_foreign(target, to)
        evidence, notes = _evidence(folder, trained, [os.fspath(image) for image in images])
        notes += [one_view_note(trained.views, to)] if trained.views else []
        notes += [] if trained.unknown is None else unknown_notes(trained, trained.unknown.settings, to)
        for note in notes:
            print(f"tlscale: {one_line(note)}", file=sys.stderr)
        aside = _make_aside(target)
        try:
            with stoppable("exporting"):
                _write(folder, aside, to, evidence, notes, licence)
            _put_in_place(aside, target)
        except TlscaleError:
            check_stop("exporting")  # an exporter may have taken the stop for a failure of its own
            raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return Path(out)


def one_view_note(views: Sequence[str], to: str) -> str:
    """Tell that what is exported is the network, which scores one view of an image."""
    also = " tlscale.load(FOLDER).predict gives the mean." if to in ("timm", "hub") else ""
    return (
        f"the exported network scores one view of an image. The run's figures, and what its validation images chose, "
        f"are of the mean of probabilities over views ({' x '.join(views)}).{also}"
    )


def unknown_notes(trained: TrainedModel, settings: UnknownSettings, to: str) -> list[str]:
    """Tell where the score of unknown images, which the run has, is not computed from what is exported."""
    if to not in ("timm", "hub"):
        return [NO_UNKNOWN]
    if isinstance(trained.model, CodesClassifier) or settings.layer is not None:
        return []
    return [
        "the score of unknown images takes the features of the part that the run froze, which the exported folder does "
        "not tell: tlscale predict RUN gives the column unknown, the folder does not."
    ]


def _write(folder: Path, aside: Path, to: str, evidence: Evidence, notes: list[str], licence: str) -> None:
    """Write and check all files of an export, its notes last."""
    run_id = read_json(folder / "run.json").get("id")
    values = about(evidence.trained, __version__, run_id)
    if to == "onnx":
        checked = write_onnx(aside, evidence, values)
    elif to == "torch-export":
        checked = write_program(aside, evidence, values)
    else:
        checked = write_timm(_model_folder(folder), aside, evidence)
    if to == "hub":
        write_card(folder, aside, evidence.trained, whole=checked["loads_with"] == "timm", licence=licence)
    files = {path.name: file_sha256(path) for path in sorted(aside.iterdir())}
    ours = {"tlscale": __version__, "run": run_id, "to": to, "files": files}
    write_json(aside / NOTES, {**ours, "checked": checked, "notes": notes})


def _model_folder(folder: Path) -> Path:
    return folder / "model" if (folder / "model" / CONFIG_FILE).is_file() else folder


def _refuse_training_codes(trained: TrainedModel, *, allowed: bool) -> None:
    model = trained.model
    if isinstance(model, CodesClassifier) and isinstance(model.head, KnnHead) and not allowed:
        num, width = model.head.codes_ND.shape
        raise DataError(
            f"nearest neighbours are found among the training images: the export would carry the features of all "
            f"{num:,} ({width:,} numbers each), from which something of the images may be told",
            key=option("with-training-codes"),
            remedy="Switch it on where whoever gets the export may have them, or fit another probe (probe.kind=ridge)",
        )


# --- The images to compare on -----------------------------------------------------------------------------------------


def _evidence(folder: Path, trained: TrainedModel, places: list[str]) -> tuple[Evidence, list[str]]:
    """Find images: those named, else the run's own, else random ones; with notes for people."""
    if places:
        return _named(folder, trained, places), []
    try:
        return _own(folder, trained), []
    except Stopped:
        raise
    except TlscaleError as error:
        why = error.problem.splitlines()[0]
    spec = trained.input_spec
    shape = (64, *spec.shape_CHW)
    random = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    random = random if spec.range is None else random / 255
    note = "the export was compared on random images, as the run's own are not at hand; name some (images) for a "
    return Evidence(trained, random, None, "random images"), [f"{note}comparison that says more: {_placeless(why)}"]


def _placeless(why: str) -> str:
    from tlscale.tracking.redact import redact, without_places

    return str(without_places(redact(why), [os.getcwd(), os.path.expanduser("~")]))


def _named(folder: Path, trained: TrainedModel, places: list[str]) -> Evidence:
    notes: list[str] = []
    found = list(islice(find_images(places, notes.append), _MOST_IMAGES))
    pixels, why = read_given(found, trained.input_spec, RunFacts.of(folder).max_pixels)
    if not pixels:
        problem = f"none of them can be read; the first: {why[0]}" if found else "; ".join(notes) or "there are none"
        raise DataError(problem, key=option("images"), remedy="Name images like those that the model is for")
    return Evidence(trained, torch.from_numpy(stacked(pixels)), None, "images that were named")


def _own(folder: Path, trained: TrainedModel) -> Evidence:
    """Take images of the run's data, of all classes: of its test split, else of the validation or training split.

    Raises:
        TlscaleError: they are not there, or not one can be read.
    """
    if not (folder / "recipe.yaml").is_file():
        raise RunFolderError("there is no recipe, and so no data")
    finished = FinishedRun(folder, load_stored_recipe(folder / "recipe.yaml").recipe, trained)
    data = finished.open_data()
    split = next(one for one in (data.test, data.validation, data.train) if one is not None and len(one))
    store = ImageStore(split, finished.recipe.data, trained.input_spec, keep=False)
    images, rows = [], []
    for row in _spread(split):
        try:
            images.append(store.images(np.array([row])))
            rows.append(row)
        except DataError as error:
            bad = error
    if not images:
        raise bad
    joined = torch.cat([image for image in images if isinstance(image, Tensor)])
    # Of several labels an image the accuracy would say little; their logits are compared all the same.
    labels_N = None if data.has_several_labels else torch.from_numpy(split.labels_N[rows])
    return Evidence(trained, joined, labels_N, f"{split.name} images of the run's data")


def _spread(split: ImageSplit) -> list[int]:
    """Choose rows at equal distances: images are often sorted by class."""
    count = min(len(split), _MOST_IMAGES)
    return [number * len(split) // count for number in range(count)]


# --- The folder -------------------------------------------------------------------------------------------------------


def _refuse_foreign(target: Path, to: str) -> None:
    """Refuse a folder that holds anything but an export of ours, to the same format.

    Raises:
        RunFolderError: it does, or is no folder.
    """
    if not os.path.lexists(target):
        return
    remedy = "Give another folder"
    if not target.is_dir():
        raise RunFolderError(f"'{target}' is there, and no folder", key=option("out"), remedy=remedy)
    there = {path.name for path in target.iterdir() if not path.name.startswith(f"{_ASIDE}.")}
    ours = read_json(target / NOTES)
    if there and "tlscale" not in ours:
        raise RunFolderError(
            f"'{target}' is not empty and no export of tlscale, so nothing is written there",
            key=option("out"),
            remedy=remedy,
        )
    if there and ours.get("to") != to:
        raise RunFolderError(f"'{target}' holds an export to {ours.get('to')}", key=option("out"), remedy=remedy)
    if others := sorted(there - {NOTES, *ours.get("files", ())}):
        problem = f"'{target}' holds '{others[0]}' as well, which is no part of the export"
        raise RunFolderError(problem, key=option("out"), remedy=remedy)


def _make_aside(target: Path) -> Path:
    """Make a folder to write to, on the same disk."""
    if target.is_dir():
        aside = target / f"{_ASIDE}.{os.getpid()}"
        for left in target.glob(f"{_ASIDE}.*"):  # of one that was killed
            shutil.rmtree(left, ignore_errors=True)
    else:
        aside = target.with_name(f".{target.name}{_ASIDE}.{os.getpid()}")
        shutil.rmtree(aside, ignore_errors=True)
    make_folder(aside)
    return aside


def _put_in_place(aside: Path, target: Path) -> None:
    """Give the files their names, when all of them are on the disk.

    In a folder that is there the notes come first: then what a killed process leaves is known to be ours.
    """
    for path in aside.iterdir():
        flush(path)
    flush(aside)
    if not target.exists():
        aside.replace(target)
        flush(target.parent)
        return
    earlier = set(read_json(target / NOTES).get("files", ()))
    new = [NOTES, *sorted(path.name for path in aside.iterdir() if path.name != NOTES)]
    for name in new:
        (aside / name).replace(target / name)
    for name in earlier - set(new):
        (target / name).unlink(missing_ok=True)
    flush(target)


def show(done: Path) -> None:
    """Tell people what was written, and how it was compared."""
    notes: dict[str, Any] = read_json(done / NOTES)
    checked = notes["checked"]
    accuracy = f"; accuracy {checked['top1']:.4f}, the run's {checked['top1_of_run']:.4f}" if "top1" in checked else ""
    how = f" ({checked['exporter']} exporter, opset {checked['opset']})" if "exporter" in checked else ""
    print(f"{done}: {', '.join(notes['files'])}{how}", file=sys.stderr)
    print(
        f"compared on {checked['num_images']:,} {checked['images']}, in batches of "
        f"{' and '.join(map(str, checked['batch_sizes']))}: logits differ by "
        f"{checked['largest_difference']:.1g} of the largest{accuracy}",
        file=sys.stderr,
    )
