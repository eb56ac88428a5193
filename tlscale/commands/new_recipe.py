"""Write the first recipe for a data set, with what was found in it as comments.

Promise: the recipe runs as it is. Its strategy is the one that was best at that number of images where it was measured
(docs/strategies.md), and a comment says so and names the other one.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tlscale.data.formats.unread import Reason
from tlscale.data.input_spec import SMALL_SHARE
from tlscale.data.survey import Place, Survey
from tlscale.errors import first_few, one_line
from tlscale.recipe.yaml_text import write_yaml

BUNDLED = "resnet10t"
FEW_IMAGES = 500
"""Up to so many training images a fifth is held out to choose by, and without a test split all are scored by folds: of
500 a held-out fifth gives an interval of 16 points at an accuracy of 0.8, and all of them one of 7."""
NUM_FOLDS = 5
MOST_PROBED = {"bundled": 200, "other": 500}
"""Up to so many training images a probe is written, and above them fine-tuning. For the bundled network the two were
compared at 60 to 1,000 images (benchmarks/new_threshold.py), for another one at 100 and 1,000 (docs/strategies.md)."""
_MEASURED = {
    "bundled": "With this network each was better once at 125 images, and fine-tuning from 250 on",
    "other": "Where it was measured, a probe was best at 100 images, and fine-tuning at 1,000",
}
_MOST_CLASSES = 8  # in a line
_MOST_REASONS = 8
_WIDTH = 110
# Long images were told apart best in their own proportions (benchmarks/long_pictures.py).
_MOST_LONG, _SHORTEST_PX = 6, 32
_LEAST_PX, _MOST_PX = 48, 96  # of the bundled network, which was pretrained at 48
_PROBED = {"layer": ["layer2", "layer3", "layer4"], "pool": ["avg", "max"]}
_EARLY = r"(conv1|bn1|layer[12])\..*"


def keys_by_number(num_train: int) -> dict[str, Any]:
    """Return keys whose value follows from the number of training images: the share held out, and the batch size."""
    few = num_train <= FEW_IMAGES
    return {"data.validation_fraction": 0.2 if few else 0.1, "batch_size": 32 if num_train < 5000 else 128}


def recipe_name(place: str) -> str:
    """Return a name for the recipe of the data at a place, as `name` takes it."""
    path = Path(place).expanduser()
    stem = path.resolve().name if path.is_dir() else path.stem
    return re.sub(r"[^A-Za-z0-9._-]+", "_", stem).strip("._-")[:80] or "images"


def recipe_text(
    name: str, survey: Survey, backbone: str, layers: tuple[list[str], str | None], command: str
) -> tuple[str, str]:
    """Return the recipe, and its strategy in words.

    Args:
        name: of the run.
        survey: of the data.
        backbone: a timm model; `BUNDLED` comes with its weights.
        layers: of the backbone, earlier ones whose codes are worth a try, and the rule of those to freeze; None: none.
        command: that was typed.
    """
    num_train = survey.num_images["train"]
    network_kind = "bundled" if backbone == BUNDLED else "other"
    is_probe, is_few = num_train <= MOST_PROBED[network_kind], num_train <= FEW_IMAGES
    # Each fold has images of each class.
    has_folds = is_few and set(survey.counts) == {"train"} and min(survey.counts["train"].values()) >= NUM_FOLDS
    data, comment = _data_keys(survey, backbone, num_train, has_folds=has_folds)
    network: dict[str, Any] = {"name": backbone, **({"weights": "bundled"} if backbone == BUNDLED else {})}
    network |= {} if survey.in_chans is None else {"in_chans": survey.in_chans}
    strategy, words = _probe(backbone, layers[0]) if is_probe else _fine_tuning(backbone, layers[1], num_train)
    parts = [
        _comment([f"Written by `{command}`.", "", *describe(survey), "", *_why(is_probe, network_kind, survey)]),
        write_yaml({"name": name}),
        _comment(comment),
        write_yaml({"data": data}),
        _groups_to_uncomment(survey),
        write_yaml({"backbone": network}),
        strategy,
        _folds() if has_folds else "",
    ]
    return "".join(parts), f"{words}, in {NUM_FOLDS} folds" if has_folds else words


def describe(survey: Survey) -> list[str]:
    """Return what is in the data, in lines of text."""
    heights_N, widths_N = survey.sizes_N2.T
    areas_N = heights_N * widths_N
    least, most = (f"{widths_N[i]} x {heights_N[i]}" for i in (areas_N.argmin(), areas_N.argmax()))
    sizes = least if least == most else f"{least} to {most} pixels"
    formats = ", ".join(f"{name} {count:,}" for name, count in survey.formats.most_common())
    train = survey.counts["train"]
    in_classes = "with any number of" if survey.keys.get("task") == "multi_label" else "in"
    lines = [
        f"{sum(survey.num_images.values()):,} images {in_classes} {len(train)} classes: {_counts(train)}",
        f"{formats}; {sizes}" + (f"; {survey.num_grey:,} grey" if survey.num_grey else ""),
    ]
    shown = {"train": "to train on", "validation": "to validate", "test": "to test"}
    if len(survey.counts) > 1:
        given = [f"{count:,} {shown[role]}" for role, count in survey.num_images.items()]
        lines.append(f"splits: {', '.join(given)}")
    return [one_line(line) for line in (*lines, *survey.notes, *_equal(survey.equal), *_groups(survey))]


def describe_left_out(survey: Survey) -> list[str]:
    """Return what is left out, and why, in lines of text: what was found in images first."""
    kinds: dict[str, list[tuple[str, Reason]]] = {}
    for path, reason in reversed(survey.left_out.items()):
        kinds.setdefault(reason.kind, []).append((path, reason))
    lines = []
    for found in list(kinds.values())[:_MOST_REASONS]:
        path, reason = found[-1]
        lines.append(one_line(f"left out  {len(found):,}: {path}: {reason}{' (and others)' if len(found) > 1 else ''}"))
    rest = len(kinds) - _MOST_REASONS
    return [*lines, *([f"left out  for {rest} other reasons"] if rest > 0 else [])]


def _groups(survey: Survey) -> list[str]:
    if survey.groups is None:
        return []
    return [f"groups?   {survey.groups.about}: then data.{survey.groups.key} keeps each on one side of a hold-out"]


def _counts(counts: Mapping[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return first_few([f"{name} {count:,}" for name, count in ordered], _MOST_CLASSES)


def _equal(groups: list[list[Place]]) -> list[str]:
    """Return what is to be said of equal images: those that make a score or a label wrong first."""
    kinds = (
        ("are in training and in what is scored, which makes scores too high", _across_splits),
        ("have different labels, one of which is wrong", lambda places: len({place.label for place in places}) > 1),
        ("are there more than once", lambda places: True),
    )
    lines, left = [], groups
    for what, is_one in kinds:
        found = [places for places in left if is_one(places)]
        left = [places for places in left if not is_one(places)]
        if found:
            places = found[0][:3]
            names = [f" ({place.label!r})" if len({one.label for one in places}) > 1 else "" for place in places]
            shown = " = ".join(f"{place.path}{name}" for place, name in zip(places, names, strict=True))
            lines.append(f"EQUAL IMAGES: {len(found):,} {what} ({shown}{', ...' if len(found) > 1 else ''})")
    return lines


def _across_splits(places: list[Place]) -> bool:
    roles = {place.role for place in places}
    return "train" in roles and len(roles) > 1


def _data_keys(survey: Survey, backbone: str, num_train: int, *, has_folds: bool) -> tuple[dict[str, Any], list[str]]:
    """Return the section `data`, and comments on it."""
    keys, comment = dict(survey.keys), []
    if survey.left_out:
        comment += [f"exclude: {len(survey.left_out):,} paths, each with the reason; edit that file to change it."]
    if keys.get("task") == "multi_label":
        comment += ["task: an image has any number of labels, also none. Where each has one, take it out."]
    if keys.get("on_bad_image") == "skip":
        comment += [f"on_bad_image: {survey.num_bad:,} images cannot be read; each run skips and counts them."]
    if "class_folder" in keys:
        other = "parent" if keys["class_folder"] == "top" else "top"
        comment += [f"class_folder: the other reading of this folder is {other}."]
    if backbone == BUNDLED:
        keys["image_size"] = _image_size(survey)
        shape = "height and width, in the proportions of the images; " if isinstance(keys["image_size"], list) else ""
        comment += [f"image_size: {shape}more than {_MOST_PX} pixels show more detail, and take longer."]
    if (share := survey.shown_by_centre_crop) < SMALL_SHARE:
        keys["crop_mode"] = "squash"
        shown = f"crop_mode: the usual centre crop would show {share:.0%} of a typical image, squash shows all"
        comment += [f"{shown}; border does without changing its proportions."]
    if "validation" not in survey.counts:
        keys["validation_fraction"] = keys_by_number(num_train)["data.validation_fraction"]
        of = "what a fold is trained on" if has_folds else "the training images"
        held = f"validation_fraction: this share of {of} is held out to choose by"
        is_scored = "test" not in survey.counts and not has_folds
        comment += [held + (", and the score is of it, as there is no test split." if is_scored else ".")]
    if survey.groups is not None:
        comment += [
            f"{survey.groups.key}: {survey.groups.about}. Uncomment it where they are of one patient, animal or scene: "
            "a hold-out that divides them makes scores too high."
        ]
    return keys, comment


def _image_size(survey: Survey) -> int | list[int]:
    """Return a size for the bundled network: a square's side, or height and width with about as many pixels."""
    side = min(max(-(-survey.median_side_px // 16) * 16, _LEAST_PX), _MOST_PX)
    ratio = survey.proportions
    if survey.shown_by_centre_crop >= SMALL_SHARE or ratio is None:
        return side
    longer = min(max(ratio, 1 / ratio), _MOST_LONG) ** 0.5
    short, long = (max(_SHORTEST_PX, round(px / 16) * 16) for px in (side / longer, side * longer))
    return [short, long] if ratio < 1 else [long, short]


def _groups_to_uncomment(survey: Survey) -> str:
    """Return a comment that is a key of the section `data`, which is written just above it."""
    if survey.groups is None:
        return ""
    _, line = write_yaml({"data": {survey.groups.key: survey.groups.value}}).splitlines()
    return f"  # {line.strip()}\n"


def _why(is_probe: bool, network_kind: str, survey: Survey) -> list[str]:
    chosen = "a probe" if is_probe else "fine-tuning"
    for_images = f"for {survey.num_images['train']:,} images"
    why = [f"Strategy: {chosen}, {for_images}. {_MEASURED[network_kind]} (docs/strategies.md)."]
    of_one = ["It was measured with one label an image."] if survey.keys.get("task") == "multi_label" else []
    return [*why, *of_one, "`tlscale compare` on this recipe shows which is best here."]


def _probe(backbone: str, layers: list[str]) -> tuple[str, str]:
    codes = dict(_PROBED) if backbone == BUNDLED else {"layer": [*layers, "penultimate"], "pool": ["avg", "max"]}
    text = _comment(
        ["Codes: what a layer gives for an image, computed once. Validation images choose layer and pooling."]
    )
    text += write_yaml({"codes": codes}) + write_yaml({"probe": {"kind": "logistic"}})
    return text, f"codes of {backbone} and a linear classifier"


def _folds() -> str:
    text = _comment(
        [
            f"folds: there is no test split, so each image is scored by the one of {NUM_FOLDS} models that was not "
            "fitted to it; the model that is exported is fitted to all. Without folds only a held-out share is scored."
        ]
    )
    return text + write_yaml({"evaluate": {"folds": NUM_FOLDS}})


def _fine_tuning(backbone: str, rule: str | None, num_train: int) -> tuple[str, str]:
    rule = _EARLY if backbone == BUNDLED else rule
    frozen = {"freeze": rule} if rule else {}
    text = _comment(["freeze: a regular expression on whole parameter names; what it matches is computed once."])
    text += write_yaml(frozen) if frozen else ""
    text += write_yaml({"head": [{"linear": 256}, "relu", {"dropout": 0.2}, "linear"]})
    text += write_yaml({"duration": "10 epochs", "batch_size": keys_by_number(num_train)["batch_size"]})
    text += write_yaml({"optim": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.05}})
    text += write_yaml({"schedule": {"warmup": "10%", "decay": "cosine"}})
    return text, f"the upper layers of {backbone} are fine-tuned"


def _comment(lines: list[str]) -> str:
    wrapped = (
        textwrap.wrap(one_line(line), _WIDTH, break_long_words=False, break_on_hyphens=False) or [""] for line in lines
    )
    return "".join(f"# {line}".rstrip() + "\n" for lines_of_one in wrapped for line in lines_of_one)
