"""Hold a comparison as Python gives it back: a mapping that a notebook shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tlscale.commands.compare_outcomes import Outcome
from tlscale.commands.compare_report import columns_of, table
from tlscale.commands.paired_tests import Pair
from tlscale.commands.run_result import escaped, html_table
from tlscale.errors import one_line


class Comparison(dict[str, Any]):
    """Runs side by side: a dictionary with what `compare.json` holds."""

    def __init__(self, figures: Mapping[str, Any], folder: Path | None) -> None:
        super().__init__(figures)
        self.folder = folder
        """Holds the table and the picture; None where none were written."""

    @property
    def tables(self) -> list[Comparison]:
        """Return one comparison for each set of scored images; this one alone, where there is one."""
        several = self.get("tables")
        if several is None:
            return [self]
        return [
            Comparison(one, None if self.folder is None else self.folder / f"table_{number}")
            for number, one in enumerate(several, start=1)
        ]

    @property
    def table(self) -> list[dict[str, str]]:
        """Return the rows of the table (of all), the best first: a data frame takes them as they are."""
        return [dict(zip(one._columns(), cells, strict=True)) for one in self.tables for cells in one._cells()]

    def __repr__(self) -> str:
        if "tables" in self:
            return f"Comparison({len(self['runs'])} runs in {len(self['tables'])} tables)"
        failed = sum(run["error"] is not None for run in self["runs"])
        best = next((cells for cells in self._cells()), None)
        ahead = (
            ""
            if best is None or failed == len(self["runs"])
            else f"; {one_line(best[0])!r} has {self._columns()[2]} {best[2]}"
        )
        broken = f", {failed} failed" if failed else ""
        return f"Comparison({len(self['runs'])} runs{broken}{ahead})"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self), self.folder)

    def _outcomes(self) -> list[Outcome]:
        return [Outcome(**run) for run in self["runs"]]

    def _columns(self) -> tuple[str, ...]:
        return columns_of(self._outcomes())

    def _cells(self) -> list[tuple[str, ...]]:
        return table(self._outcomes(), [_pair(plain) for plain in self["pairs"]])

    def _repr_html_(self) -> str:
        if "tables" in self:
            return "".join(one._repr_html_() for one in self.tables)
        notes = "".join(f"<p>{escaped(note)}</p>" for note in self["notes"])
        return f"<p><b>{escaped(self['name'])}</b></p>{html_table(self._columns(), self._cells())}{notes}"


def together(name: str, notes: Sequence[str], tables: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Put several tables into one mapping; runs and pairs of all of them stand where those of a single one do."""
    runs, pairs = ([item for one in tables for item in one[key]] for key in ("runs", "pairs"))
    return {"name": name, "notes": list(notes), "runs": runs, "pairs": pairs, "tables": [dict(one) for one in tables]}


def _pair(plain: Mapping[str, Any]) -> Pair:
    return Pair(**{key: value for key, value in plain.items() if key != "distinguishable"})
