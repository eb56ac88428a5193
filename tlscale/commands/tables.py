"""Show the tables that a person reads: the plan before a run, the figures after it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tlscale.data.input_spec import SMALL_SHARE, InputSpec
from tlscale.data.sampler import DataOrder
from tlscale.data.sources.folds import ABOUT_FOLDS
from tlscale.data.sources.tables import Labels
from tlscale.data.stored_numbers import bits_of
from tlscale.errors import DataError, flag
from tlscale.models.features import PENULTIMATE
from tlscale.recipe.image_size import size_in_words
from tlscale.recipe.schema import Recipe
from tlscale.tracking.console import Console, number
from tlscale.tracking.stopwatch import describe_seconds, format_duration
from tlscale.training.distillation.student import Student
from tlscale.training.result import named, score_of
from tlscale.training.setup import RunSetup, strategy_of
from tlscale.training.stages import Stage, to_steps

_WORST_SHOWN = 5
_FILES_OF_BITS = 8
_IN_SHORT = ("strategy", "data", "backbone", "weights", "teacher", "trainable", "batch", "steps", "probe", "device")
_FIGURES = {"top1": ("accuracy", "accuracy"), "mean_average_precision": ("average_precision", "AP")}
"""The figure that stands for all, to that of a class, and its title."""


def show_plan(setup: RunSetup, console: Console, *, device: str, whole: bool = True) -> None:
    """Show what is about to happen, with the arithmetic of every derived number.

    Args:
        device: that it happens on.
        whole: else what is trained, on what and for how long, which is enough where it happens at once.
    """
    recipe, data = setup.recipe, setup.data
    for note in data.notes:
        is_loud = note.split(":")[0].isupper()
        console.say(note, style="bold red" if data.is_sample or is_loud else None)
    for reason in islice(setup.bad_images.reasons(), _WORST_SHOWN):
        console.say(f"skipped, {reason}", style="yellow")
    if setup.frozen_params and recipe.backbone.weights == "none":
        console.say("the frozen layers are random: backbone.weights is none", style="yellow")
    for note in setup.weights.notes:
        console.say(f"backbone.weights: {note}", style="bold yellow")
    if setup.seen_share < SMALL_SHARE:
        shown = f"of a typical image the network is shown {setup.seen_share:.0%}, in the middle"
        console.say(f"{shown}; data.crop_mode=squash or border shows all of it", style="yellow")
    rows = _plan_rows(setup, device)
    console.table("Plan", ("what", "how"), rows if whole else [row for row in rows if row[0] in _IN_SHORT])
    for stage in setup.stages if whole else ():
        _show_stage(stage, setup, console)


def _show_stage(stage: Stage, setup: RunSetup, console: Console) -> None:
    many = len(setup.stages) > 1
    of = f" of stage {stage.number + 1}, steps {stage.start_step:,} to {stage.stop_step:,}" if many else ""
    rows = [(row.rule, row.num_tensors, f"{row.num_params:,}", row.norm_mode) for row in stage.freeze_rows]
    head = [param for name, param in setup.classifier.head.named_parameters()]
    rows.append(("head  (train)", len(head), f"{sum(param.numel() for param in head):,}", "train"))
    if isinstance(setup.classifier, Student):
        taught = list(setup.classifier.projections.parameters())
        rows.append(("projections  (train)", len(taught), f"{sum(param.numel() for param in taught):,}", "-"))
    console.table(f"Parameters{of}", ("freeze rule", "tensors", "parameters", "norm layers"), rows)
    groups = [(g["base_lr"], g["weight_decay"], len(g["names"]), _names(g["names"])) for g in stage.groups]
    console.table(f"Groups of {stage.optim.name}{of}", ("peak lr", "weight decay", "tensors", "such as"), groups)


def _plan_rows(setup: RunSetup, device: str) -> list[tuple[str, str]]:
    recipe, data, order, spec = setup.recipe, setup.data, setup.order, setup.spec
    splits = [split for split in (data.train, data.validation, data.test) if split is not None]
    trained, total = setup.trainable_params, setup.total_params
    return [
        ("strategy", strategy_of(setup)),
        ("data", f"{recipe.data.source}: " + ", ".join(f"{split.name} {len(split):,}" for split in splits)),
        ("classes", f"{len(data.classes)}: {', '.join(data.classes[:10])}{' ...' if len(data.classes) > 10 else ''}"),
        *([("labels", _describe_label_sets(data.train.labels_N))] if data.has_several_labels else []),
        ("input", _describe_input(spec, setup.seen_share)),
        ("numbers", _describe_numbers(setup)),
        *([("views", describe_views(setup))] if len(setup.views) > 1 else []),
        ("augment", ", ".join(_augmentation(*item) for item in setup.augment.items()) or "none"),
        ("backbone", f"{recipe.backbone.name}, {setup.code_width} features"),
        ("weights", str(setup.weights)),
        *([("teacher", str(setup.teacher))] if setup.teacher is not None else []),
        *(_training_rows(setup, order, trained, total) if setup.stages else _probe_rows(recipe)),
        ("device", f"{device}, {recipe.compute.precision}"),
    ]


def describe_views(setup: RunSetup) -> str:
    """Tell how many passes an evaluation over several views takes."""
    names, count = " x ".join(setup.view_names), len(setup.views)
    held = [split for split in (setup.data.validation, setup.data.test) if split is not None]
    passes = ", ".join(f"{split.name} {count * len(split):,}" for split in held)
    return f"{count} of each evaluated image ({names}), which is as many passes: {passes}"


def _describe_label_sets(labels_NC: Labels) -> str:
    counts_N = labels_NC.sum(axis=1)
    none = int((counts_N == 0).sum())
    of_none = f"; {none:,} have none" if none else ""
    return f"{counts_N.mean():.2f} an image on average, at most {counts_N.max()}{of_none}"


def _describe_input(spec: InputSpec, seen_share: float) -> str:
    return (
        f"{spec.in_chans} x {size_in_words(spec.image_size)}, {spec.interpolation}, crop_pct {spec.crop_pct:g}, "
        f"{spec.crop_mode} (shows {seen_share:.0%} of a typical image), mean {_numbers(spec.mean)}, "
        f"std {_numbers(spec.std)}"
    )


def _describe_numbers(setup: RunSetup) -> str:
    """Return in how many bits some of the training images are stored, and what becomes of their numbers."""
    table, value_range = setup.data.train.table, setup.spec.range
    rows = np.unique(np.linspace(0, len(table) - 1, _FILES_OF_BITS).astype(int)).tolist()
    bits = dict.fromkeys(["not known"])
    with suppress(DataError):  # a file that is gone is told by who reads it
        bits = dict.fromkeys(bits_of(table.read(row)) for row in rows)
    stored = " and ".join(bits) + (f" (by {len(rows)} training images)" if len(table) > len(rows) else "")
    if value_range is not None:
        low, high = value_range
        return f"{stored}; data.range: {low:g} is black and {high:g} is white"
    wide = any(name.startswith("16") for name in bits)
    scaled = "; 16 bits are scaled to 8, by which 65,535 is white: data.range sets another white" if wide else ""
    return f"{stored}{scaled}"


def _training_rows(setup: RunSetup, order: DataOrder, trained: int, total: int) -> list[tuple[str, str]]:
    of = " in any stage" if len(setup.stages) > 1 else ""
    lengths = " + ".join(f"{stage.num_steps:,}" for stage in setup.stages)
    rows = [
        ("trainable", f"{trained:,} of {total:,} parameters ({trained / total:.1%}){of}"),
        ("batch", setup.split.describe()),
        (
            "steps",
            f"{setup.total_steps:,} steps{f' = {lengths}' if of else ''} ({order.steps_per_epoch:,} an epoch of "
            f"{order.images_per_epoch:,} images)",
        ),
    ]
    return rows + [_schedule_row(stage, setup) for stage in setup.stages]


def _schedule_row(stage: Stage, setup: RunSetup) -> tuple[str, str]:
    warmup = stage.schedule.warmup
    steps = to_steps(warmup, setup.order, stage.num_steps) if warmup.amount > 0 else 0
    name = f"schedule {stage.number + 1}" if len(setup.stages) > 1 else "schedule"
    return name, f"{warmup} warm-up = {steps} steps, then {stage.schedule.decay}, peak lr {stage.optim.lr:g}"


def _probe_rows(recipe: Recipe) -> list[tuple[str, str]]:
    assert recipe.probe is not None
    layers = ", ".join(recipe.codes.layer or [PENULTIMATE])
    return [("probe", f"{recipe.probe.kind} on codes of {layers}, pooled by {', '.join(recipe.codes.pool)}")]


def _augmentation(name: str, value: float | None) -> str:
    return name if value is None else f"{name} {value:g}"


def _numbers(values: tuple[float, ...]) -> str:
    return "/".join(f"{value:.3f}" for value in values)


def _names(names: list[str]) -> str:
    return ", ".join(names[:2]) + (" ..." if len(names) > 2 else "")


def show_result(result: dict[str, Any], console: Console, *, folder: Path, how_to_load: str) -> None:
    """Show the final figures, and where everything is."""
    if result["split"] is None:  # of a cross-validation, resumed by itself
        console.say(f"{ABOUT_FOLDS}. The whole is resumed by {flag('resume').shell} as well")
        console.say(f"model: {folder / 'model'}; load it with {how_to_load}")
        return
    if "folds" in result:
        _show_folds(result, console)
    rows, score = [], score_of(result)
    for name in ("best", "last"):
        figures = result[name]
        rows.append(
            (name, figures["step"], number(figures[score]), number(figures["loss"]), number(figures["macro_f1"]))
        )
    rows.append((*_without_looking(result), "-", "-"))
    title = f"{result['num_images']:,} {result['split']} images"
    if result["steps"] and "folds" not in result:  # a probe has no steps, and so only one set of weights
        console.table(title, ("weights", "step", named(score), "loss", "macro-F1"), rows)
    if result.get("choice") is not None:
        console.say(_choice(result["choice"]))
    show_classes(result, console)
    how = f"with the {result['weights']} weights; {result['epochs']:g} epochs" if result["steps"] else "by the probe"
    how = "by the models of the folds; all of it" if "folds" in result else how
    console.say(
        f"{score_text(result)}, {how} in {format_duration(result['wall_s'])}, {result['images_per_s']:.0f} images/s",
        style="bold",
    )
    console.say(_probabilities(result))
    console.say(f"seconds: {describe_seconds(result)}")
    _show_what_the_score_is_of(result, console)
    if result["is_sample"]:
        console.say(
            "FALLBACK SAMPLE: these are figures of the small shipped sample, not of Fashion-MNIST", style="bold red"
        )
    console.say(f"next: {shlex.join(['tlscale', 'predict', str(folder), 'NEW_IMAGES', '--out', 'labels.csv'])}")
    curves = folder / "folds" / "*" if "folds" in result else folder
    console.say(f"figures: {folder / 'result.json'}   curves: {curves / 'metrics.jsonl'}   model: {folder / 'model'}")
    console.say(f"load it with {how_to_load}")


def _probabilities(result: Mapping[str, Any]) -> str:
    """Tell what the probabilities that `predict` gives are worth."""
    told = result["calibration"]
    own = f"calibration error {number(result['ece'])}{interval_of(result, 'ece')}"
    if told["temperature"] is None:
        return f"probabilities: {own}, not calibrated: {told['why']}"
    by = "validation images"
    if "folds" in result:
        by = "images of the folds, each of which is scored with that of the others"
    chosen = f"temperature {told['temperature']:.3g}, chosen by {told['num_images']:,} {by}"
    if told["ece"] is None:
        return f"probabilities: {own} before {chosen}; after it not known, as these images chose it"
    after = f"{number(told['ece'])}{interval_of(told, 'ece')}"
    if "sets" not in told:  # of several labels
        return f"probabilities: {own}, {after} with {chosen}; the mean over the classes"
    sets = told["sets"]
    if "why" in sets:
        return f"probabilities: {own}, {after} with {chosen}; sets of labels: {sets['why']}"
    return (
        f"probabilities: {own}, {after} with {chosen}; sets for "
        f"{sets['level']:.0%} hold the true label in {number(sets['coverage'])} of cases and "
        f"{sets['mean_size']:.2f} labels on average"
    )


def _show_folds(result: dict[str, Any], console: Console) -> None:
    """Show the mean over folds, each of which has had its line, and the score of a test split."""
    folds = result["folds"]
    score, name = score_of(result), named(score_of(result))
    mean, spread = number(folds[f"{score}_mean"]), number(folds[f"{score}_sd"])
    console.say(f"mean of the folds: {name} {mean}, from fold to fold ± {spread} (standard deviation)")
    if (test := result.get("test")) is not None:
        console.say(
            f"test: {name} {number(test[score])} ({interval_text(test)}) on {test['num_images']:,} images, of the "
            "exported model",
            style="bold",
        )


def _without_looking(figures: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return cells on an answer that learns nothing from an image."""
    if score_of(figures) == "mean_average_precision":
        return "chance", "-", number(figures["chance"]["mean_average_precision"])
    return f"always {figures['majority']['label']!r}", "-", number(figures["majority"]["top1"])


def score_text(figures: Mapping[str, Any]) -> str:
    """Return the score with its interval, and what it has to be compared with, as far as that is known."""
    score = score_of(figures)
    text = f"{named(score)} {number(figures[score])} ({interval_text(figures)})"
    if score == "mean_average_precision":
        return f"{text} against {number(figures['chance']['mean_average_precision'])} by chance"
    often = figures["majority"]
    against = "" if often is None else f" against {number(often['top1'])} for always saying {often['label']!r}"
    return text + against


def interval_text(figures: Mapping[str, Any]) -> str:
    """Return the interval of a score, and of how many groups it is made."""
    interval = figures[f"{score_of(figures)}_interval95"]
    if interval is None:
        return "no interval: too few images"
    low, high = interval
    return f"95% interval {low:.4f} to {high:.4f}{over_groups(figures)}"


def interval_of(figures: Mapping[str, Any], name: str) -> str:
    """Return the interval of another figure, in brackets; an empty text where it has none."""
    interval = figures.get(f"{name}_interval95")
    return "" if interval is None else f" ({number(interval[0])} to {number(interval[1])})"


def over_groups(figures: Mapping[str, Any]) -> str:
    """Return what is added to an interval that is over groups; an empty text for one over images."""
    return _over(figures.get(f"{score_of(figures)}_interval95_by"))


def _over(by: Mapping[str, int] | None) -> str:
    groups = (by or {}).get("groups")
    return "" if groups is None else f", over {groups:,} group{'s' if groups != 1 else ''}"


def _show_what_the_score_is_of(result: dict[str, Any], console: Console) -> None:
    score = named(score_of(result))
    for note in result["notes"]:
        if note.startswith(("LEAK", "DUPLICATES", "LABELS")):
            console.say(note, style="bold red")
    if result["selected_on"] == "validation":
        chosen = "layer, pooling or strength" if "probe" in result else "the step of these weights"
        chosen += " and the thresholds" if score == "mAP" else ""
        console.say(
            f"selected on {result['selected_on']}: without a test split these images also chose {chosen}, so {score} "
            "is likely somewhat too high",
            style="yellow",
        )
    if views := result.get("views"):
        console.say(f"each answer is a mean over views of the image ({' x '.join(views)}), as in predict")
    if "folds" in result:
        console.say(
            f"{score} is of the models of the folds, each on images that it was not fitted to; the exported model was "
            f"fitted to all of them{'' if 'test' in result else ', and has no score of its own'}",
            style="yellow",
        )
    if result["scored_model"] == "before_refit":
        console.say(
            f"{score} is of the classifier that was fitted to the training images alone. The exported model was fitted "
            "again, to training and validation images, and has no score of its own (probe.refit: false exports the "
            "one that was scored)",
            style="yellow",
        )


def _choice(choice: dict[str, Any]) -> str:
    """Tell by which validation figure the weights were chosen, and how sure that is."""

    def figure(of: dict[str, Any]) -> str:
        return f"{number(of['figure'])} ± {number(of['standard_error'])} at step {of['step']:,}"

    best, over = figure(choice["best"]), _over(choice.get("standard_error_by"))
    if choice["step"] == choice["best"]["step"]:
        return f"the best validation {choice['select']} chose the weights: {best}{over}"
    return (
        f"the latest validation {choice['select']} within one standard error of the best chose the weights: "
        f"{figure(choice)}; the best is {best}{over}"
    )


def show_classes(figures: dict[str, Any], console: Console) -> None:
    """Show the classes that are recognised worst."""
    console.table("Hardest classes", class_columns(figures), class_rows(figures)[:_WORST_SHOWN])


def class_columns(figures: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the titles of `class_rows`."""
    return "class", "images", _FIGURES[score_of(figures)][1], "F1"


def class_rows(figures: Mapping[str, Any]) -> list[tuple[str, int, str, str]]:
    """Return cells on the classes that have images, those recognised worst first."""
    key, _ = _FIGURES[score_of(figures)]
    known = [(name, row) for name, row in figures["per_class"].items() if row[key] is not None]
    worst = sorted(known, key=lambda item: item[1][key])
    return [(name, row["num_images"], number(row[key]), number(row["f1"])) for name, row in worst]
