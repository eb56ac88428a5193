"""The model card of an export: what the model was trained on, how, how good it is, and where it ends.

Promise: names of classes and of data are text in it, whatever they hold; no place of the machine and no secret is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tlscale.commands.evaluation_images import data_name
from tlscale.commands.tables import over_groups
from tlscale.data.input_spec import InputSpec
from tlscale.data.sources.folds import ABOUT_FOLDS, FOLDS
from tlscale.errors import DataError, one_line, option
from tlscale.models.model_folder import TrainedModel
from tlscale.recipe.image_size import size_in_words
from tlscale.recipe.load import load_stored_recipe
from tlscale.recipe.schema import Recipe
from tlscale.recipe.yaml_text import write_yaml
from tlscale.storage.files import write_text
from tlscale.storage.run_folder import RunFolder
from tlscale.tracking.redact import places_of, redact, without_places
from tlscale.training.run_files import read_result, read_run_info

FILE = "README.md"
_LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}")
_MOST_CLASSES = 100  # of which the card has a row
# All that Markdown or HTML could take for more than text: but for letters, digits, blanks and what is used in prose.
_MARKS = re.compile(r"[^\w ,-]|_")
_TAGS = {True: "timm", False: "tlscale"}


def escaped(text: object) -> str:
    """Write a text of others so that it is nothing but text, in Markdown and in HTML."""
    return _MARKS.sub(lambda mark: f"&#{ord(mark[0])};", one_line(text))


def write_card(run: Path, folder: Path, trained: TrainedModel, *, whole: bool, licence: str) -> None:
    """Write `README.md`.

    Args:
        run: the run's folder; where it is the folder of a model alone, the card has neither recipe nor figures.
        whole: whether timm loads all of the model.

    Raises:
        DataError: the licence is no name of one.
    """
    if not _LICENCE.fullmatch(licence):
        remedy = "Give its short name, such as mit, apache-2.0 or cc-by-4.0"
        raise DataError(f"'{one_line(licence)}' is not the name of a licence", key=option("licence"), remedy=remedy)
    place = RunFolder(run)
    recipe = load_stored_recipe(place.recipe).recipe if place.recipe.is_file() else None
    result, info = read_result(place) or {}, read_run_info(place) or {}
    parts = [
        f"---\ntags: [image-classification, {', '.join(dict.fromkeys((_TAGS[whole], 'tlscale')))}]\n"
        f"library_name: {_TAGS[whole]}\npipeline_tag: image-classification\nlicense: {licence}\n---",
        f"# {escaped(recipe.name if recipe is not None else 'An image classifier')}",
        _use(whole),
        _data(trained, recipe, info),
        _figures(trained, result),
        _probabilities(trained, result),
        _limits(trained, result, licence, [] if recipe is None else places_of(recipe)),
        _recipe(recipe),
    ]
    write_text(folder / FILE, "\n\n".join(part for part in parts if part) + "\n")


def _use(whole: bool) -> str:
    if whole:
        lines = 'import timm\n\nmodel = timm.create_model("local-dir:FOLDER", pretrained=True).eval()'
        also = "`tlscale.load(FOLDER)` loads it, too, and reads images as the run did."
        return f"## Use\n\n```python\n{lines}\n```\n\n{also}"
    lines = 'import tlscale\n\nmodel = tlscale.load("FOLDER")\nprint(model.predict(["a.jpg"]).labels)'
    return (
        f"## Use\n\n```python\n{lines}\n```\n\n**timm loads the backbone alone**, as it has no place for this model's "
        "head (`head.safetensors`)."
    )


def _data(trained: TrainedModel, recipe: Recipe | None, info: dict[str, Any]) -> str:
    spec = trained.input_spec
    lines = ["## Data", ""]
    if recipe is not None:
        lines.append(f"- source: {escaped(recipe.data.source)}, {escaped(data_name(recipe.data)['name'])}")
    counts = (info.get("data") or {}).get("num_images") or {}
    lines += [f"- {escaped(split)}: {count:,} images" for split, count in counts.items()]
    lines += _input(spec)
    lines.append(f"- {len(trained.classes):,} classes, in the order of the logits (all of them: `config.json`)")
    return "\n".join(lines)


def _input(spec: InputSpec) -> list[str]:
    """Return how images are prepared."""
    crop = f"{escaped(spec.interpolation)}, crop_mode {escaped(spec.crop_mode)}, crop_pct {spec.crop_pct:g}"
    low, high = (0, 255) if spec.range is None else spec.range
    mean, std = (", ".join(f"{value:.6g}" for value in values) for values in (spec.mean, spec.std))
    return [
        f"- input: {spec.in_chans} x {size_in_words(spec.image_size)}; {crop}",
        f"- values: range {low:g} to {high:g} is scaled to 0..1, then mean {mean} and std {std} of the channels",
    ]


def _probabilities(trained: TrainedModel, result: dict[str, Any]) -> str:
    """Return what makes probabilities and sets of the logits, and what these are worth."""
    chosen, told = trained.calibration, result.get("calibration") or {}
    function = "softmax" if trained.thresholds is None else "sigmoid"
    lines = ["## Probabilities", ""]
    if plain := _share(result.get("ece")):
        lines.append(f"- calibration error of the uncalibrated probabilities ({function} of the logits): {plain}")
    if chosen is None:
        return "\n".join([*lines, "- temperature: none was chosen"])
    people = "" if trained.thresholds is None else ", for people alone: the thresholds are of the logits as they are"
    cooled = _share(told.get("ece")) or "not known, as no images but those that chose it were scored"
    lines += [
        f"- temperature {chosen.temperature:.6g}, chosen by {chosen.num_images:,} images: divide the logits by it "
        f"before the {function}{people}",
        f"- calibration error with the temperature: {cooled}",
    ]
    if (sets := chosen.sets) is not None:
        found = _share((told.get("sets") or {}).get("coverage"))
        worth = f"; of the scored images {found} were" if found else ""
        lines.append(
            f"- set of labels: the classes with a calibrated probability of {sets.threshold:.6g} or more, and the "
            f"likeliest; the true label is to be in it for {sets.level:.0%} of images like those that chose it{worth}"
        )
    return "\n".join(lines)


def _figures(trained: TrainedModel, result: dict[str, Any]) -> str:
    if trained.thresholds is not None:
        return _figures_of_several(trained, result)
    if result.get("top1") is None:
        return "## Figures\n\nNone are known."
    low, high = result["top1_interval95"]
    lines = [
        "## Figures",
        "",
        f"Accuracy (top 1) {result['top1']:.4f}, 95 % interval {low:.4f} to {high:.4f}{over_groups(result)}, on the "
        f"{result['num_images']:,} images of the {escaped(result['split'])}"
        + ("." if result["split"] == FOLDS else " split."),
    ]
    if often := result.get("majority"):
        lines.append(f"Always saying {escaped(often['label'])} has {often['top1']:.4f}.")
    others = [
        (name, result.get(key))
        for name, key in (
            ("macro-F1", "macro_f1"),
            ("balanced accuracy", "balanced_accuracy"),
        )
    ]
    if told := [f"{name} {value:.4f}" for name, value in others if isinstance(value, float)]:
        lines.append(f"{', '.join(told)}.")
    rows = [(name, result.get("per_class", {}).get(name, {})) for name in trained.classes[:_MOST_CLASSES]]
    table = [f"| {escaped(name)} | {_share(row.get('accuracy'))} | {row.get('num_images', 0)} |" for name, row in rows]
    if (rest := len(trained.classes) - len(rows)) > 0:
        table.append(f"| and {rest:,} more | | |")
    return "\n".join([*lines, "", "| class | found | images |", "|---|---|---|", *table])


def _figures_of_several(trained: TrainedModel, result: dict[str, Any]) -> str:
    """Return the figures of several labels an image, with the threshold of each class."""
    assert trained.thresholds is not None
    lines = [
        "## Figures",
        "",
        "An image has the classes whose probability, the sigmoid of the logit, is their threshold or more.",
    ]
    if isinstance(result.get("mean_average_precision"), float):
        low, high = result.get("mean_average_precision_interval95") or (None, None)
        interval = "" if low is None else f", 95 % interval {low:.4f} to {high:.4f}{over_groups(result)}"
        split = FOLDS if result["split"] == FOLDS else f"{escaped(result['split'])} split"
        lines.append(
            f"Mean average precision {result['mean_average_precision']:.4f}{interval}, on the "
            f"{result['num_images']:,} images of the {split}; "
            f"{result['chance']['mean_average_precision']:.4f} by chance."
        )
    rows = list(zip(trained.classes, trained.thresholds, strict=True))[:_MOST_CLASSES]
    table = []
    for name, threshold in rows:
        row = result.get("per_class", {}).get(name, {})
        cells = f"{_share(row.get('average_precision'))} | {_share(row.get('f1'))} | {row.get('num_images', 0)}"
        table.append(f"| {escaped(name)} | {threshold:.4f} | {cells} |")
    if (rest := len(trained.classes) - len(rows)) > 0:
        table.append(f"| and {rest:,} more | | | | |")
    head = ["| class | threshold | average precision | F1 | images |", "|---|---|---|---|---|"]
    return "\n".join([*lines, "", *head, *table])


def _share(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else ""


def _limits(trained: TrainedModel, result: dict[str, Any], licence: str, places: Sequence[str]) -> str:
    answers = ", and answers with one of them whatever the image shows" if trained.thresholds is None else ""
    lines = ["## Limits", "", f"- It knows these classes alone{answers}."]
    lines.append("- Figures hold for images like those scored; from another camera, place or year they may be worse.")
    if trained.views:
        lines.append(
            "- The network scores one view of an image; the figures are of the mean of probabilities over views "
            f"({escaped(' x '.join(trained.views))}), which `tlscale.load(FOLDER).predict` gives."
        )
    if result.get("selected_on"):
        lines.append("- The scored images also chose the weights or settings, so the figures are too good.")
    if result.get("scored_model") == FOLDS:
        lines.append(f"- About the figures: {ABOUT_FOLDS}.")
    if result.get("scored_model") == "before_refit":
        lines.append("- The figures are of a classifier from before the last fit, which took the scored images in.")
    lines += [f"- {escaped(redact(without_places(note, places)))}" for note in result.get("notes", ())]
    if licence == "unknown":
        lines.append("- Licence: not given. Those of the data and of the pretrained weights may bind its use.")
    return "\n".join(lines)


def _recipe(recipe: Recipe | None) -> str:
    if recipe is None:
        return ""
    plain = {key: value for key, value in recipe.to_plain().items() if key != "wandb"}
    text = write_yaml(redact(without_places(plain, places_of(recipe))))
    shown = "\n".join(map(one_line, text.rstrip("\n").split("\n")))
    longest = max((len(run) for run in re.findall(r"`+", shown)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"## Recipe\n\n{fence}yaml\n{shown}\n{fence}"
