"""What all sections of the recipe are: strict, closed and frozen models."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from tlscale.recipe.duration import Duration
from tlscale.recipe.mistakes import InvalidValueError


class Section(BaseModel):
    """A part of the recipe; strict, closed and frozen."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        arbitrary_types_allowed=True,
        use_attribute_docstrings=True,
    )


def check_no_share(duration: Duration) -> None:
    """Check that the length of a run or a stage is no share of one.

    Raises:
        InvalidValueError: it is given in percent.
    """
    if duration.unit == "%":
        problem = f"{duration} is a share of nothing"
        raise InvalidValueError(problem, "Write epochs, steps or images.", keys=["duration"])
