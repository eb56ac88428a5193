"""Tell how many scored images had a part in an earlier run, which a run starts or learns from."""

from __future__ import annotations

from typing import Any, NamedTuple


class EarlierImages(NamedTuple):
    """Count scored images that had a part in an earlier run, or in one that this started or learned from."""

    key: str
    """The key of the recipe that names the run."""
    scored: str
    """`test` or `validation`; `folds`: all images of a cross-validation; `all`: those of an evaluation."""
    num_images: int
    """That are scored."""
    num_fitted: int
    num_chose: int
    """Validation images of the run, by which it chose its step or settings, and to which it was not fitted."""
    problems: tuple[str, ...] = ()
    """Why there may be more."""
    remarks: tuple[str, ...] = ()

    def notes(self) -> list[str]:
        """Tell it."""
        of, too_good = f"of {self.num_images:,} images of {self.scored}", f"figures on {self.scored} are too good"
        if self.scored == "all":
            of, too_good = f"of these {self.num_images:,} images", "the figures are too good"
        lines = []
        if self.num_fitted:
            what = f"LEAK: {self.num_fitted:,} {of} are among those that the run of {self.key} was fitted to"
            lines.append(f"{what}: {too_good}")
        if self.num_chose:
            lines.append(f"LEAK: {self.num_chose:,} {of} chose the weights of the run of {self.key}: {too_good}")
        told = f"{self.key}: whether it was fitted to images of {self.scored} cannot be told"
        lines += [f"{told}: {problem}" for problem in self.problems]
        return [*lines, *(f"the run of {self.key}: {remark}" for remark in self.remarks)]

    def to_plain(self) -> dict[str, Any]:
        """Return what `result.json` has under `earlier_runs`; None where some may be that are not known."""
        counts = {"num_trained_on": self.num_fitted, "num_selected_on": self.num_chose}
        known = {key: count if count or not self.problems else None for key, count in counts.items()}
        return {"key": self.key, "scored": self.scored, **known}
