"""Report runs side by side: one table, one picture, and which differences are more than chance.

Promise: figures of runs are shown together only when they are of the same images. No run is called the best without
those that a paired test on these images does not tell from it. Nothing here runs anything.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from tlscale.commands.compare_outcomes import Outcome, Row
from tlscale.commands.compare_plot import draw
from tlscale.commands.paired_tests import LEVEL, Pair
from tlscale.data.sources.folds import FOLDS
from tlscale.errors import DataError, first_few, quoted
from tlscale.storage.files import naming_disk_errors, remove_left_overs, write_text
from tlscale.tracking.console import number
from tlscale.training.result import named

COLUMNS = (
    *("strategy", "images", "top1", "95% interval", "against the best", "held-out top1"),
    *("seconds", "trainable", "steps", "images seen", "layer"),
)


def columns_of(outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    """Return `COLUMNS` with the figure that these runs are compared by."""
    return tuple(name.replace("top1", _figure_of(outcomes)) for name in COLUMNS)


def _figure_of(outcomes: Sequence[Outcome]) -> str:
    """Return what people call the figure; of runs that all failed it is that of one label an image."""
    return named(next((outcome.figure for outcome in outcomes if outcome.error is None), "top1"))


def same_images(one: Outcome, other: Outcome) -> bool:
    """Report whether figures of two runs compare: of the same images, by the same figure.

    Held-out images follow from the size and the seed, so that those of the same data compare.
    """
    if (one.task, one.split) != (other.task, other.split):
        return False
    is_known = one.scored_sha256 is not None and other.scored_sha256 is not None
    if is_known and (one.split == "test" or (one.size, one.seed) == (other.size, other.seed)):
        return one.scored_sha256 == other.scored_sha256
    of_test = one.split != "test" or one.num_images == other.num_images
    return one.fingerprint == other.fingerprint and of_test


def refuse_other_images(outcomes: Sequence[Outcome]) -> None:
    """Refuse figures of different images, which do not compare; the `DataError` tells which runs are of what."""
    done = [outcome for outcome in outcomes if outcome.error is None]
    several = [outcome.folder for outcome in done if outcome.task == "multi_label"]
    if several and len(several) < len(done):
        others = [outcome.folder for outcome in done if outcome.task != "multi_label"]
        raise DataError(
            f"runs with several labels an image, {first_few(quoted(several))}, have no figure in common with runs with "
            f"one, {first_few(quoted(others))}",
            remedy="Compare those of one task (data.task) at a time",
        )
    by_content = all(outcome.scored_sha256 is not None for outcome in done)
    expected: dict[tuple[object, ...], str | None] = {}
    groups: dict[tuple[object, ...], list[Outcome]] = {}
    for outcome in done:
        identity = outcome.scored_sha256 if by_content else outcome.fingerprint
        # Held-out images follow from the size and the seed; those of a test split are the same for all.
        at = (outcome.size, outcome.seed) if by_content and outcome.split != "test" else ()
        is_expected = expected.setdefault((outcome.split, *at), identity) == identity
        count = outcome.num_images if outcome.split == "test" else None
        groups.setdefault((outcome.split, count, None if is_expected else identity), []).append(outcome)
    if len(groups) > 1:
        lines = [
            f"{split}, {group[0].num_images:,} images of data "
            f"{str(group[0].scored_sha256 if by_content else group[0].fingerprint)[:12]}: "
            + ", ".join(outcome.folder for outcome in group)
            for (split, _, _), group in groups.items()
        ]
        raise DataError(
            "the runs were not evaluated on the same images, so there is no table of them:\n  " + "\n  ".join(lines)
        )


def to_rows(outcomes: Sequence[Outcome]) -> list[Row]:
    """Group what did not fail into rows, by size, the best first."""
    groups: dict[tuple[str, int], list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.error is None:
            groups.setdefault((outcome.variant, outcome.size), []).append(outcome)
    rows = [Row(variant, size, tuple(runs)) for (variant, size), runs in groups.items()]
    return sorted(rows, key=lambda row: (row.size, -row.score))


def against_best(row: Row, rows: Sequence[Row], pairs: Sequence[Pair] = ()) -> str:
    """Return `best`, or how many points less, and whether a paired test distinguishes the two."""
    best = max((other for other in rows if other.size == row.size), key=lambda other: other.score)
    if row is best:
        return "best"
    points = f"{100 * (row.score - best.score):+.1f} points"
    pair = next((pair for pair in pairs if pair.size == row.size and pair.joins(row.variant, best.variant)), None)
    if pair is None:
        return f"{points}, no paired test"
    p = f"p {pair.p_corrected:.2g}" if pair.p_corrected >= 1e-4 else "p < 0.0001"
    return f"{points} ({p})" if pair.is_distinguishable else f"{points}, not distinguishable ({p})"


def table(outcomes: Sequence[Outcome], pairs: Sequence[Pair] = ()) -> list[tuple[str, ...]]:
    """Return cells under `COLUMNS`: for each size what ran, then its most frequent class; then what failed."""
    rows = to_rows(outcomes)
    cells: list[tuple[str, ...]] = []
    for size in dict.fromkeys(row.size for row in rows):
        own = [row for row in rows if row.size == size]
        cells += [_cells(row, against_best(row, own, pairs)) for row in own]
        cells += _baseline_cells(own)
    for outcome in outcomes:
        if outcome.error is not None:
            told = (outcome.variant, f"{outcome.size:,}" if outcome.size else "-", "-", "-", "failed, see below")
            cells.append(_filled(*told))
    return cells


def _baseline_cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Return a row on the most frequent training class, or on chance; none where an older tlscale made all runs."""
    known = [run.baseline for row in rows for run in row.runs if run.baseline is not None]
    if not known:
        return []
    labels = {run.majority["label"] for row in rows for run in row.runs if run.majority is not None}
    name = f"always {labels.pop()!r}" if len(labels) == 1 else "always the most frequent class"
    name = name if rows[0].figure == "top1" else "chance"
    share = fmean(known)
    points = f"{100 * (share - rows[0].score):+.1f} points"
    return [_filled(name, f"{rows[0].size:,}", f"{share:.4f}", "-", points)]


def _filled(*cells: str) -> tuple[str, ...]:
    return (*cells, *["-"] * (len(COLUMNS) - len(cells)))


def _cells(row: Row, verdict: str) -> tuple[str, ...]:
    layers = dict.fromkeys(run.layer for run in row.runs if run.layer is not None)
    over_seeds = f" ({min(row.scores):.4f} to {max(row.scores):.4f})" if len(row.runs) > 1 else ""
    return (
        row.variant,
        f"{row.size:,}",
        f"{row.score:.4f}{over_seeds}",
        f"{row.low:.4f} to {row.high:.4f}" if row.has_interval else "-",
        verdict,
        number(row.mean("held_out")),
        _count(row.mean("wall_s"), digits=1) + ("*" if row.found_codes else ""),
        _count(row.mean("trainable_params")),
        _count(row.mean("steps")),
        _count(row.mean("images_seen")),
        "; ".join(layers) or "-",
    )


def _count(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def notes(outcomes: Sequence[Outcome], pairs: Sequence[Pair] = ()) -> list[str]:
    """Return the notes below the table."""
    done = [outcome for outcome in outcomes if outcome.error is None]
    broken = [f"{outcome.folder} failed: {outcome.error}" for outcome in outcomes if outcome.error is not None]
    if not done:
        return ["No run came to its end.", *broken]
    rows = to_rows(outcomes)
    lines = [
        f"{_figure_of(done)} on {done[0].num_images:,} {_scored(done[0])}, with its 95% interval "
        f"({_interval_by(done)}): chance in which test images were drawn. "
        "'images': labelled training images, those held out to choose by included. "
        "'images seen': images that went through the backbone, to compute codes or to train.",
        *_notes_on_tests(rows, pairs),
    ]
    if max(len(row.runs) for row in rows) > 1:
        lines.append("Over several seeds: means; in brackets the least and the most, which the interval spans as well.")
    lines += _notes_on_selection(done)
    if any(outcome.found_codes for outcome in done):
        lines.append(
            "* its codes, or some, were there from another run or an earlier start; these seconds are without them."
        )
    return [*lines, *broken]


def _scored(outcome: Outcome) -> str:
    return "images of the folds" if outcome.split == FOLDS else f"{outcome.split} images"


def _interval_by(done: Sequence[Outcome]) -> str:
    numbers = {run.num_groups for run in done}
    if done[0].figure != "top1":
        return "normal, by a bootstrap over " + ("images" if numbers == {None} else "groups of images")
    if numbers == {None}:
        return "Wilson"
    how = "a bootstrap over groups of images"
    return f"Wilson, or {how}" if None in numbers else how


def _notes_on_tests(rows: Sequence[Row], pairs: Sequence[Pair]) -> list[str]:
    lines = []
    over = "groups of images" if any(pair.num_groups is not None for pair in pairs) else "images"
    if pairs and rows[0].figure != "top1":
        lines.append(
            "p: of the difference of mAP on the same images by its standard error (a bootstrap with the same draws of "
            f"{over} for both), corrected for the number of pairs of the same size (Holm). 'Not distinguishable': p is "
            f"{LEVEL:g} or more."
        )
    elif pairs:
        of = f"sign-flip tests over {over}" if any(pair.num_groups is not None for pair in pairs) else "McNemar tests"
        lines.append(
            f"p: exact {of} on the same images, corrected for the number of pairs of the same size (Holm). "
            f"'Not distinguishable': p is {LEVEL:g} or more."
        )
    others = [row for row in rows if "no paired test" in against_best(row, rows, pairs)]
    if others:
        names = ", ".join(run.folder for row in others for run in row.runs)
        lines.append(
            f"'No paired test': {names} or the best of the size has no predictions.parquet (an older tlscale made it), "
            "or the two were scored on different images, or in other repeats of folds. Nothing is said on whether they "
            "differ by more than chance."
        )
    return lines


def _note_on_folds(done: Sequence[Outcome]) -> list[str]:
    """Note runs of other numbers of folds: their models were fitted to other shares of the images."""
    numbers = {run.folder: run.folds[0] for run in done if run.folds is not None}
    if len(set(numbers.values())) < 2:
        return []
    listed = ", ".join(f"{folder}: {number}" for folder, number in numbers.items())
    return [f"The runs have other numbers of folds ({listed}): with more of them each model is fitted to more images."]


def _notes_on_selection(done: Sequence[Outcome]) -> list[str]:
    """Note what the scores of runs without a test split are of, and which of them are too good."""
    lent = ", ".join(dict.fromkeys(run.variant for run in done if run.selected_on == "earlier_run"))
    earlier = [
        f"Of {lent} some of these images have chosen a run that it starts or learns from (selected_on: earlier_run), "
        f"so that {_figure_of(done)} is likely somewhat too high."
    ]
    return [*_notes_on_split(done), *(earlier if lent else [])]


def _notes_on_split(done: Sequence[Outcome]) -> list[str]:
    if done[0].split == "test":
        return []
    if done[0].split == FOLDS:
        return [
            "Each image is answered by models of folds, which were not fitted to it and for which it chose nothing.",
            *_note_on_folds(done),
        ]
    chosen = ", ".join(dict.fromkeys(run.variant for run in done if run.selected_on == "validation"))
    refitted = ", ".join(dict.fromkeys(run.variant for run in done if run.scored_model == "before_refit"))
    figure = _figure_of(done)
    lines = [f"There is no test split: {figure} is of validation images."]
    if chosen:
        lines.append(
            f"Of {chosen} these images have also chosen the layer, the strength or the step (selected_on: validation), "
            f"so that {figure} is likely somewhat too high."
        )
    if refitted:
        lines.append(
            f"Of {refitted} {figure} is that of the classifier before it was fitted again to training and validation "
            "images; the exported one has no score of its own."
        )
    return lines


def markdown(title: str, outcomes: Sequence[Outcome], extra: Sequence[str] = (), pairs: Sequence[Pair] = ()) -> str:
    """Format the table as a page."""
    rows = [columns_of(outcomes), ("---",) * len(COLUMNS), *table(outcomes, pairs)]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    remarks = [
        line.replace("* ", "\\* ", 1) if line.startswith("* ") else line for line in (*notes(outcomes, pairs), *extra)
    ]
    picture = ["![accuracy by training-set size and by time](compare.png)", ""] if to_rows(outcomes) else []
    return "\n".join([f"# {title}", "", *picture, *lines, "", *(part for line in remarks for part in (line, ""))])


def write_comparison(
    out: Path,
    title: str,
    outcomes: Sequence[Outcome],
    extra: Sequence[str] = (),
    pairs: Sequence[Pair] = (),
    *,
    times: Callable[[], Mapping[str, Any]] = dict,
) -> dict[str, Any]:
    """Write `compare.json`, `compare.md`, `compare.png` and `compare.svg`; return what the first one holds.

    `times` gives `wall_s` and `seconds` of the comparison itself, when all but `compare.json` is written.

    Raises:
        TlscaleError: they cannot be written.
    """
    text_file, plain, pictures = out / "compare.md", out / "compare.json", [out / "compare.png", out / "compare.svg"]
    with naming_disk_errors(out):
        for path in (text_file, plain, *pictures):
            remove_left_overs(path)  # of a comparison that a disk failed
        write_text(text_file, markdown(title, outcomes, extra, pairs))
        if rows := to_rows(outcomes):
            draw(rows, pictures)
    figures = to_plain(title, outcomes, extra, pairs, times=times())
    with naming_disk_errors(out):
        write_text(plain, json.dumps(figures, indent=2, allow_nan=False) + "\n")
    return figures


def to_plain(
    title: str,
    outcomes: Sequence[Outcome],
    extra: Sequence[str] = (),
    pairs: Sequence[Pair] = (),
    *,
    times: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return what `compare.json` holds, as JSON has it."""
    figures = {
        "name": title,
        **(times or {}),
        "notes": [*notes(outcomes, pairs), *extra],
        "runs": [asdict(outcome) for outcome in outcomes],
        "pairs": [pair.to_plain() for pair in pairs],
    }
    return dict(json.loads(json.dumps(figures)))
