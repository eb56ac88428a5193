"""Runs side by side: one table, one picture, and what of the differences is more than chance.

Promise: figures of runs are shown together only when they are of the same images. No run is called the best without
those that its interval does not tell from it. Nothing here runs anything.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib import rc_context, ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tlscale.errors import DataError
from tlscale.metrics_file import read_metrics
from tlscale.model.layers import PENULTIMATE
from tlscale.progress import number
from tlscale.run_folder import RunFolder, naming_disk_errors, write_text

COLUMNS = (
    *("strategy", "images", "top1", "95% interval", "against the best", "held-out top1"),
    *("seconds", "trainable", "steps", "images seen", "layer"),
)
# Okabe and Ito's colours that keep apart for the colour-blind and on white; a marker says the same without colour.
_STYLES = (
    ("#0072B2", "o"),
    ("#56B4E9", "s"),
    ("#009E73", "^"),
    ("#E69F00", "D"),
    ("#D55E00", "v"),
    ("#555555", "X"),
    ("#CC79A7", "P"),
)
_OWN_STYLE = {"codes": 0, "early_codes": 1, "mlp": 2, "head": 3, "finetune": 4, "scratch": 5}
_FONT: Any = {"font.size": 10, "font.family": "DejaVu Sans", "svg.hashsalt": "tlscale", "svg.fonttype": "path"}
_DPI = 200


@dataclass(frozen=True)
class Outcome:
    """What became of one run; figures are None where it failed, and `error` says why."""

    variant: str
    """A strategy, or the name of a recipe."""
    size: int
    """Labelled training images, those that are held out included."""
    seed: int
    folder: str
    recipe_sha256: str
    error: str | None = None
    top1: float | None = None
    interval95: tuple[float, float] | None = None
    held_out_top1: float | None = None
    wall_s: float | None = None
    trainable_params: int | None = None
    steps: int | None = None
    images_seen: int | None = None
    """Images that went through the backbone while codes were computed or the network was trained."""
    found_codes: bool = False
    """Whether codes that another run had computed were used, so that `wall_s` is without that."""
    seconds: dict[str, float] | None = None
    """The parts of `wall_s`; None of a run of an older version."""
    layer: str | None = None
    split: str | None = None
    num_images: int | None = None
    fingerprint: str | None = None


@dataclass(frozen=True)
class Row:
    """A variant at one size, over its seeds; `low` and `high` span the intervals and the seeds."""

    variant: str
    size: int
    runs: tuple[Outcome, ...]
    """Those that did not fail, of which there is at least one."""

    def mean(self, name: str) -> float | None:
        values = [value for run in self.runs if (value := getattr(run, name)) is not None]
        return fmean(values) if values else None

    @property
    def top1(self) -> float:
        return fmean(run.top1 for run in self.runs if run.top1 is not None)

    @property
    def least(self) -> float:
        return min(run.top1 for run in self.runs if run.top1 is not None)

    @property
    def most(self) -> float:
        return max(run.top1 for run in self.runs if run.top1 is not None)

    @property
    def found_codes(self) -> bool:
        return any(run.found_codes for run in self.runs)

    @property
    def low(self) -> float:
        return min(self.least, fmean(run.interval95[0] for run in self.runs if run.interval95 is not None))

    @property
    def high(self) -> float:
        return max(self.most, fmean(run.interval95[1] for run in self.runs if run.interval95 is not None))


def finished(variant: str, size: int | None, seed: int, folder: RunFolder, result: dict[str, Any]) -> Outcome:
    """The outcome of a complete run.

    Args:
        size: None: as many training and held-out images as `run.json` counts.
        result: what its `result.json` holds.
    """
    record = json.loads(folder.run_json.read_text())
    counts, codes = record["data"]["num_images"], result.get("codes")
    whole_is_frozen = result["strategy"] not in ("finetune", "stages", "scratch")
    computed = codes["num_computed"] if codes is not None else None
    return Outcome(
        variant=variant,
        size=size if size is not None else counts["train"] + counts.get("validation", 0),
        seed=seed,
        folder=str(folder.path),
        recipe_sha256=record["recipe_sha256"],
        top1=result["top1"],
        interval95=tuple(result["top1_interval95"]),
        held_out_top1=_held_out_top1(folder, result),
        wall_s=result["wall_s"],
        seconds=result.get("seconds"),
        trainable_params=result["trainable_params"],
        steps=result["steps"],
        images_seen=computed if computed is not None and whole_is_frozen else result["images_seen"],
        found_codes=computed is not None and computed < sum(counts.values()),
        layer=_layer(result),
        split=result["split"],
        num_images=result["num_images"],
        fingerprint=record["data"]["fingerprint"],
    )


def _held_out_top1(folder: RunFolder, result: dict[str, Any]) -> float | None:
    """Of the weights that were kept, on the images that chose them."""
    if "probe" in result:
        figure = result["probe"]["held_out_top1"]
        return figure if figure is None else float(figure)
    step = result["best"]["step"]
    records = [record for record in read_metrics(folder.metrics) if record.get("split") == "validation"]
    return next((float(record["top1"]) for record in records if record["step"] == step), None)


def _layer(result: dict[str, Any]) -> str | None:
    probe = result.get("probe")
    return probe and (PENULTIMATE if probe["layer"] == PENULTIMATE else f"{probe['layer']}, {probe['pool']}")


def refuse_other_images(outcomes: Sequence[Outcome]) -> None:
    """Figures of different images do not compare.

    Raises:
        DataError: which runs were evaluated on what.
    """
    groups: dict[tuple[object, ...], list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.error is None:
            # Held-out images follow from the size and the seed; those of a test split are the same for all.
            count = outcome.num_images if outcome.split == "test" else None
            groups.setdefault((outcome.split, count, outcome.fingerprint), []).append(outcome)
    if len(groups) > 1:
        lines = [
            f"{split}, {group[0].num_images:,} images of data {str(fingerprint)[:12]}: "
            + ", ".join(outcome.folder for outcome in group)
            for (split, _, fingerprint), group in groups.items()
        ]
        raise DataError(
            "the runs were not evaluated on the same images, so there is no table of them:\n  " + "\n  ".join(lines)
        )


def to_rows(outcomes: Sequence[Outcome]) -> list[Row]:
    """What did not fail, by size, the best first."""
    groups: dict[tuple[str, int], list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.error is None:
            groups.setdefault((outcome.variant, outcome.size), []).append(outcome)
    rows = [Row(variant, size, tuple(runs)) for (variant, size), runs in groups.items()]
    return sorted(rows, key=lambda row: (row.size, -row.top1))


def against_best(row: Row, rows: Sequence[Row]) -> str:
    """`best`, or how many points less; and whether the intervals of the two overlap."""
    best = max((other for other in rows if other.size == row.size), key=lambda other: other.top1)
    if row is best:
        return "best"
    points = f"{100 * (row.top1 - best.top1):+.1f} points"
    return f"{points}, not distinguishable" if row.high >= best.low else points


def table(outcomes: Sequence[Outcome]) -> list[tuple[str, ...]]:
    """Cells under `COLUMNS`: what ran, then what failed."""
    cells = [_cells(row, against_best(row, rows)) for rows in [to_rows(outcomes)] for row in rows]
    for outcome in outcomes:
        if outcome.error is not None:
            told = (outcome.variant, f"{outcome.size:,}" if outcome.size else "-", "-", "-", "failed, see below")
            cells.append((*told, *["-"] * (len(COLUMNS) - len(told))))
    return cells


def _cells(row: Row, verdict: str) -> tuple[str, ...]:
    layers = dict.fromkeys(run.layer for run in row.runs if run.layer is not None)
    over_seeds = f" ({row.least:.4f} to {row.most:.4f})" if len(row.runs) > 1 else ""
    return (
        row.variant,
        f"{row.size:,}",
        f"{row.top1:.4f}{over_seeds}",
        f"{row.low:.4f} to {row.high:.4f}",
        verdict,
        number(row.mean("held_out_top1")),
        _count(row.mean("wall_s"), digits=1) + ("*" if row.found_codes else ""),
        _count(row.mean("trainable_params")),
        _count(row.mean("steps")),
        _count(row.mean("images_seen")),
        "; ".join(layers) or "-",
    )


def _count(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def notes(outcomes: Sequence[Outcome]) -> list[str]:
    """What to know of the table."""
    done = [outcome for outcome in outcomes if outcome.error is None]
    broken = [f"{outcome.folder} failed: {outcome.error}" for outcome in outcomes if outcome.error is not None]
    if not done:
        return ["No run came to its end.", *broken]
    many = max(len(row.runs) for row in to_rows(outcomes)) > 1
    lines = [
        f"top1 on {done[0].num_images:,} {done[0].split} images, with its 95% interval (Wilson): chance in which test "
        "images were drawn. 'Not distinguishable': the interval overlaps that of the best of the same size. 'images': "
        "labelled training images, those held out to choose by included. 'images seen': images that went through the "
        "backbone, to compute codes or to train."
    ]
    if many:
        lines.append("Over several seeds: means; in brackets the least and the most, which the interval spans as well.")
    if done[0].split != "test":
        lines.append("There is no test split: these images have also chosen between layers, strengths and steps.")
    if any(outcome.found_codes for outcome in done):
        lines.append(
            "* its codes, or some, were there from another run or an earlier start; these seconds are without them."
        )
    return [*lines, *broken]


def markdown(title: str, outcomes: Sequence[Outcome], extra: Sequence[str] = ()) -> str:
    """The table as a page."""
    rows = [COLUMNS, ("---",) * len(COLUMNS), *table(outcomes)]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    remarks = [line.replace("* ", "\\* ", 1) if line.startswith("* ") else line for line in (*notes(outcomes), *extra)]
    picture = ["![accuracy by training-set size and by time](compare.png)", ""] if to_rows(outcomes) else []
    return "\n".join([f"# {title}", "", *picture, *lines, "", *(part for line in remarks for part in (line, ""))])


def write_comparison(
    out: Path,
    title: str,
    outcomes: Sequence[Outcome],
    extra: Sequence[str] = (),
    *,
    times: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """`compare.json`, `compare.md`, `compare.png` and `compare.svg` in the folder `out`.

    Args:
        times: `wall_s` and `seconds` of the comparison itself.

    Returns:
        What `compare.json` holds.

    Raises:
        TlscaleError: they cannot be written.
    """
    figures = {
        "name": title,
        **(times or {}),
        "notes": [*notes(outcomes), *extra],
        "runs": [asdict(outcome) for outcome in outcomes],
    }
    text = json.dumps(figures, indent=2, allow_nan=False) + "\n"
    with naming_disk_errors(out):
        write_text(out / "compare.json", text)
        write_text(out / "compare.md", markdown(title, outcomes, extra))
        if rows := to_rows(outcomes):
            draw(rows, [out / "compare.png", out / "compare.svg"])
    return dict(json.loads(text))


# -- the picture ------------------------------------------------------------------------------------------------------


def draw(rows: Sequence[Row], paths: Sequence[Path]) -> None:
    """Accuracy by training-set size and by time; with one size only, a line of dots for each.

    Args:
        rows: at least one.
        paths: files; their endings name the formats.
    """
    sizes = sorted({row.size for row in rows})
    with rc_context(_FONT):
        figure = _lines(rows, sizes) if len(sizes) > 1 else _dots(rows)
        for path in paths:
            # Without a date, the same figures give the same bytes.
            figure.savefig(path, dpi=_DPI, metadata={"Date": None} if path.suffix == ".svg" else None)


def _style(variant: str, variants: Sequence[str]) -> tuple[str, str]:
    known = all(name in _OWN_STYLE for name in variants)
    return _STYLES[_OWN_STYLE[variant] if known else variants.index(variant) % len(_STYLES)]


def _plain_axes(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)


def _lines(rows: Sequence[Row], sizes: Sequence[int]) -> Figure:
    figure = Figure(figsize=(9.0, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    by_end = sorted(rows, key=lambda row: (-row.size, -row.top1))  # as the lines end, from the top
    variants = list(dict.fromkeys(row.variant for row in by_end))
    span = math.log(max(sizes) / min(sizes))
    handles = []
    for position, variant in enumerate(variants):
        own = sorted((row for row in rows if row.variant == variant), key=lambda row: row.size)
        colour, marker = _style(variant, variants)
        # Side by side, so that no interval hides another.
        aside = math.exp((position - (len(variants) - 1) / 2) * span * 0.014)
        tops, bars = [row.top1 for row in own], _bars(own)
        line = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.3, "elinewidth": 1.2}
        drawn = left.errorbar([row.size * aside for row in own], tops, yerr=bars, **line)
        right.errorbar([_seconds(row) for row in own], tops, yerr=bars, **(line | {"linewidth": 0.8}))
        _hollow(right, [(_seconds(row), row.top1, row) for row in own], colour, marker, 5)
        handles.append(drawn)
    for axes, label in ((left, "labelled training images"), (right, _seconds_label(rows))):
        _plain_axes(axes)
        axes.set_xscale("log")
        axes.set_xlabel(label)
    left.set_ylabel("top-1 accuracy")
    left.xaxis.set_major_locator(ticker.FixedLocator(list(sizes)))
    left.xaxis.set_major_formatter(ticker.FuncFormatter(lambda size, _: f"{size:,.0f}"))
    left.xaxis.set_minor_locator(ticker.NullLocator())
    _log_seconds(right, rows)
    figure.legend(handles, variants, loc="outside upper center", ncols=min(len(variants), 6), frameon=False)
    return figure


def _bars(rows: Sequence[Row]) -> list[list[float]]:
    """How far the intervals go down and up, as matplotlib takes it."""
    return [[row.top1 - row.low for row in rows], [row.high - row.top1 for row in rows]]


def _seconds(row: Row) -> float:
    return max(row.mean("wall_s") or 0.0, 0.01)


def _seconds_label(rows: Sequence[Row]) -> str:
    hollow = " (hollow: its codes were there already)" if any(row.found_codes for row in rows) else ""
    return f"seconds{hollow}" if hollow else "seconds of the run"


def _hollow(axes: Axes, points: Sequence[tuple[float, float, Row]], colour: str, marker: str, size: float) -> None:
    """Marks the runs whose time is without the computing of their codes."""
    for x, y, row in points:
        if row.found_codes:
            axes.plot([x], [y], color=colour, marker=marker, markersize=size, markerfacecolor="white", zorder=3)


def _log_seconds(axes: Axes, rows: Sequence[Row]) -> None:
    """As many numbers as fit; a decade alone would often leave the axis without any."""
    seconds = [_seconds(row) for row in rows]
    decades = math.log10(max(seconds) / min(seconds))
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if decades < 2 else (1, 3) if decades < 4 else (1,)))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    if decades < 0.5:  # runs of much the same length: room on both sides
        axes.set_xlim(min(seconds) / 2, max(seconds) * 2)


def _dots(rows: Sequence[Row]) -> Figure:
    ordered = sorted(rows, key=lambda row: row.top1)
    variants = [row.variant for row in rows]
    figure = Figure(figsize=(9.0, 1.5 + 0.42 * len(ordered)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for height, row in enumerate(ordered):
        colour, marker = _style(row.variant, variants)
        line = {"color": colour, "marker": marker, "markersize": 7, "elinewidth": 1.6}
        left.errorbar([row.top1], [height], xerr=_bars([row]), **line)
        right.plot([_seconds(row)], [height], color=colour, marker=marker, markersize=7)
        _hollow(right, [(_seconds(row), height, row)], colour, marker, 7)
    for axes in (left, right):
        _plain_axes(axes)
        axes.tick_params(axis="y", length=0)
    left.set_yticks(range(len(ordered)), [row.variant for row in ordered])
    left.set_ylim(-0.6, len(ordered) - 0.4)
    left.set_xlabel(f"top-1 accuracy with {ordered[0].size:,} labelled training images")
    right.set_xscale("log")
    right.set_xlabel(_seconds_label(rows))
    _log_seconds(right, rows)
    return figure
