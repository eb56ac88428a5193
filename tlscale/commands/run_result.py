"""Hold the figures of a run or an evaluation as Python gives them back: a mapping that a notebook shows.

Promise: it is the dictionary that its file on disk holds. Text of others (class names, paths) is escaped where it is
shown.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tlscale.commands.tables import class_columns, class_rows, interval_text
from tlscale.data.sources.folds import FOLDS
from tlscale.errors import one_line
from tlscale.tracking.console import number
from tlscale.training.result import score_of

_MOST_ROWS = 20  # of a table in a notebook


class RunResult(dict[str, Any]):
    """Figures of a run or of an evaluation: a dictionary with what `result.json` or `figures.json` holds."""

    def __init__(self, figures: Mapping[str, Any], folder: Path) -> None:
        super().__init__(figures)
        self.folder = folder
        """The run's, or that of the evaluation."""

    @property
    def top1(self) -> float:
        """Return the share of the scored images that are answered right.

        Raises:
            AttributeError: the images have several labels each; `mean_average_precision` stands in its place.
        """
        return float(self._figure("top1"))

    @property
    def mean_average_precision(self) -> float:
        """Return that of several labels an image.

        Raises:
            AttributeError: the images have one label each, or no image has any; `top1` is that of one label.
        """
        return float(self._figure("mean_average_precision"))

    @property
    def interval(self) -> tuple[float, float] | None:
        """Return the 95 % interval of `top1`, or of `mean_average_precision`; None of too few images or groups."""
        ends = self.get(f"{score_of(self)}_interval95")
        return None if ends is None else (float(ends[0]), float(ends[1]))

    @property
    def per_class(self) -> dict[str, dict[str, Any]]:
        """Return the figures of each class, by its name."""
        by_name: dict[str, dict[str, Any]] = self._figure("per_class")
        return by_name

    def _figure(self, name: str) -> Any:  # noqa: ANN401 (as JSON has it)
        """Return a figure; an AttributeError names what there is in its place, so that `hasattr` can be asked."""
        if (value := self.get(name)) is None:
            score = score_of(self)
            there = "" if name == score or self.get(score) is None else f"; there is {score!r}"
            raise AttributeError(f"these figures have no {name!r}{there}", name=name, obj=self)
        return value

    def __repr__(self) -> str:
        return f"{type(self).__name__}({one_line(self.folder)!r}: {self._score()})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self), self.folder)

    def _score(self) -> str:
        of = "" if self["split"] in ("all", FOLDS) else f"{self['split']} "
        interval = interval_text(self).removeprefix("95% interval ")
        by = " by models of folds" if self["split"] == FOLDS else ""
        if score_of(self) == "mean_average_precision":
            score = f"mAP {number(self['mean_average_precision'])} ({interval})"
            chance = number(self["chance"]["mean_average_precision"])
            return f"{score} on {self['num_images']:,} {of}images{by}, {chance} by chance"
        often = self.get("majority")
        against = "" if often is None else f", {number(often['top1'])} for always saying {one_line(often['label'])!r}"
        return f"top1 {number(self.top1)} ({interval}) on {self['num_images']:,} {of}images{by}{against}"

    def _repr_html_(self) -> str:
        rows = class_rows(self)
        rest = f"<p>and {len(rows) - _MOST_ROWS:,} more classes</p>" if len(rows) > _MOST_ROWS else ""
        head = f"<p><b>{escaped(self._score())}</b> &nbsp; {escaped(self.folder)}</p>"
        return head + html_table(class_columns(self), rows[:_MOST_ROWS]) + rest


def escaped(text: object) -> str:
    """Return text as a page shows it, with nothing that a browser would obey."""
    return html.escape(one_line(text))


def html_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Write a table as HTML."""
    head = "".join(f"<th>{escaped(name)}</th>" for name in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escaped(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
