"""Draw a comparison: the score by training-set size and by time, with what the most frequent class scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from matplotlib import rc_context, rcdefaults, rcParams, ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tlscale.storage.files import replacing

if TYPE_CHECKING:
    from tlscale.commands.compare_outcomes import Row

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
_BASELINE: Any = {"color": "#555555", "linestyle": "--", "linewidth": 1.0}


class _Names(NamedTuple):
    figure: str
    baseline: str


_NAMES = {
    "top1": _Names("top-1 accuracy", "majority class"),
    "mean_average_precision": _Names("mean average precision", "chance"),
}


def draw(rows: Sequence[Row], paths: Sequence[Path]) -> None:
    """Draw the score by training-set size and by time to files; with one size only, a line of dots for each."""
    sizes = sorted({row.size for row in rows})
    with rc_context():
        rcdefaults()  # the working folder may hold a `matplotlibrc` of anybody's, which can have it run LaTeX
        rcParams.update(_FONT)
        figure = _lines(rows, sizes) if len(sizes) > 1 else _dots(rows)
        for path in paths:
            kind = path.suffix.removeprefix(".")
            # Without a date, the same figures give the same bytes.
            with replacing(path) as aside:
                figure.savefig(aside, format=kind, dpi=_DPI, metadata={"Date": None} if kind == "svg" else None)


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
    by_end = sorted(rows, key=lambda row: (-row.size, -row.score))  # as the lines end, from the top
    variants = list(dict.fromkeys(row.variant for row in by_end))
    span = math.log(max(sizes) / min(sizes))
    handles = []
    for position, variant in enumerate(variants):
        own = sorted((row for row in rows if row.variant == variant), key=lambda row: row.size)
        colour, marker = _style(variant, variants)
        # Side by side, so that no interval hides another.
        aside = math.exp((position - (len(variants) - 1) / 2) * span * 0.014)
        scores, bars = [row.score for row in own], _bars(own)
        line = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.3, "elinewidth": 1.2}
        drawn = left.errorbar([row.size * aside for row in own], scores, yerr=bars, **line)
        right.errorbar([_seconds(row) for row in own], scores, yerr=bars, **(line | {"linewidth": 0.8}))
        _hollow(right, [(_seconds(row), row.score, row) for row in own], colour, marker, 5)
        handles.append(drawn)
    shares = {size: share for size in sizes if (share := _baseline(rows, size)) is not None}
    if shares:
        handles += left.plot(list(shares), list(shares.values()), **_BASELINE)
        variants.append(_NAMES[rows[0].figure].baseline)
    for axes, label in ((left, "labelled training images"), (right, _seconds_label(rows))):
        _plain_axes(axes)
        axes.set_xscale("log")
        axes.set_xlabel(label)
    left.set_ylabel(_NAMES[rows[0].figure].figure)
    left.xaxis.set_major_locator(ticker.FixedLocator(list(sizes)))
    left.xaxis.set_major_formatter(ticker.FuncFormatter(lambda size, _: f"{size:,.0f}"))
    left.xaxis.set_minor_locator(ticker.NullLocator())
    _log_seconds(right, rows)
    figure.legend(handles, variants, loc="outside upper center", ncols=min(len(variants), 7), frameon=False)
    return figure


def _baseline(rows: Sequence[Row], size: int) -> float | None:
    """Return what the most frequent class, or chance, scores at a size; None where an older tlscale made all runs."""
    runs = [run for row in rows if row.size == size for run in row.runs]
    shares = [run.baseline for run in runs if run.baseline is not None]
    return fmean(shares) if shares else None


def _bars(rows: Sequence[Row]) -> list[list[float]]:
    """Return how far the intervals go down and up, as matplotlib takes it."""
    return [[row.score - row.low for row in rows], [row.high - row.score for row in rows]]


def _seconds(row: Row) -> float:
    return max(row.mean("wall_s") or 0.0, 0.01)


def _seconds_label(rows: Sequence[Row]) -> str:
    hollow = " (hollow: its codes were there already)" if any(row.found_codes for row in rows) else ""
    return f"seconds{hollow}" if hollow else "seconds of the run"


def _hollow(axes: Axes, points: Sequence[tuple[float, float, Row]], colour: str, marker: str, size: float) -> None:
    """Mark the runs whose time is without the computing of their codes."""
    for x, y, row in points:
        if row.found_codes:
            axes.plot([x], [y], color=colour, marker=marker, markersize=size, markerfacecolor="white", zorder=3)


def _log_seconds(axes: Axes, rows: Sequence[Row]) -> None:
    """Show as many numbers as fit; a decade alone would often leave the axis without any."""
    seconds = [_seconds(row) for row in rows]
    decades = math.log10(max(seconds) / min(seconds))
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if decades < 2 else (1, 3) if decades < 4 else (1,)))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    if decades < 0.5:  # runs of much the same length: room on both sides
        axes.set_xlim(min(seconds) / 2, max(seconds) * 2)


def _dots(rows: Sequence[Row]) -> Figure:
    ordered = sorted(rows, key=lambda row: row.score)
    variants = [row.variant for row in rows]
    figure = Figure(figsize=(9.0, 1.5 + 0.42 * len(ordered)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for height, row in enumerate(ordered):
        colour, marker = _style(row.variant, variants)
        line = {"color": colour, "marker": marker, "markersize": 7, "elinewidth": 1.6}
        left.errorbar([row.score], [height], xerr=_bars([row]), **line)
        right.plot([_seconds(row)], [height], color=colour, marker=marker, markersize=7)
        _hollow(right, [(_seconds(row), height, row)], colour, marker, 7)
    share = _baseline(rows, ordered[0].size)
    if share is not None:
        name = _NAMES[rows[0].figure].baseline
        figure.legend([left.axvline(share, **_BASELINE)], [name], loc="outside upper left", frameon=False)
    for axes in (left, right):
        _plain_axes(axes)
        axes.tick_params(axis="y", length=0)
    left.set_yticks(range(len(ordered)), [row.variant for row in ordered])
    left.set_ylim(-0.6, len(ordered) - 0.4)
    left.set_xlabel(f"{_NAMES[rows[0].figure].figure} with {ordered[0].size:,} labelled training images")
    right.set_xscale("log")
    right.set_xlabel(_seconds_label(rows))
    _log_seconds(right, rows)
    return figure
