"""Durations: how long, in the unit that the user thinks in, turned into steps once.

Promise: a duration is a value (`10 epochs`, `500 steps`, `64000 images`, `5%`), never a bare number, and
`Duration.to_steps` is the only place where units become optimizer steps.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from tlscale.recipe.mistakes import InvalidValueError

Unit = Literal["epochs", "steps", "images", "%"]
_UNITS: dict[str, Unit] = {
    "epoch": "epochs",
    "epochs": "epochs",
    "step": "steps",
    "steps": "steps",
    "image": "images",
    "images": "images",
    "%": "%",
    "percent": "%",
}
FORM = re.compile(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?)\s*(%|[A-Za-z]+)\s*")
_MAX_CHARS = 300
MOST = 10**15
REMEDY = "Write a number and a unit: '10 epochs', '500 steps', '64000 images' or '5%'."


def _decimal(amount: Fraction) -> str:
    """Return all digits, never an exponent, so that `parse_duration` reads the same amount back."""
    places = next((places for places in range(400) if (amount * 10**places).denominator == 1), 17)
    digits = f"{round(amount * 10**places):0{places + 1}d}"
    return f"{digits[: len(digits) - places]}.{digits[len(digits) - places :]}" if places else digits


@dataclass(frozen=True, slots=True)
class Duration:
    """Hold `amount` of `unit`; exact (a fraction), so that 0.1 epochs of 60,000 images is 6,000 images."""

    amount: Fraction
    unit: Unit

    def __str__(self) -> str:
        number = _decimal(self.amount)
        return f"{number}%" if self.unit == "%" else f"{number} {self.unit}"

    def to_steps(self, *, num_images: int, batch_size: int, total_steps: int | None = None) -> int:
        """Return the number of optimizer steps, rounded up, so that at least this much is done.

        Args:
            batch_size: images in one full step, over all processes.
            total_steps: what 100% is; only a share of a run needs it.

        Raises:
            ValueError: a share of nothing (`%` without `total_steps`).
        """
        steps_per_epoch = math.ceil(num_images / batch_size)
        match self.unit:
            case "steps":
                return math.ceil(self.amount)
            case "epochs":
                # The last step of an epoch may be short, so whole epochs count in whole epochs of steps.
                return math.ceil(self.amount * steps_per_epoch)
            case "images":
                epochs, rest = divmod(math.ceil(self.amount), num_images)
                return epochs * steps_per_epoch + math.ceil(rest / batch_size)
            case "%":
                if total_steps is None:
                    raise ValueError(f"'{self}' is a share of a run, so it cannot be the length of the run")
                return math.ceil(self.amount * total_steps / 100)


def parse_duration(value: object) -> Duration:
    """Read a `Duration` from recipe text; zero is allowed (`0 steps` of warm-up), negative numbers are not."""
    if isinstance(value, Duration):
        return value
    if not isinstance(value, str):
        raise InvalidValueError("a duration needs a unit", REMEDY)
    match = FORM.fullmatch(value)
    if match is None:
        raise InvalidValueError("not a duration", REMEDY)
    number, word = match.groups()
    if len(number) > _MAX_CHARS:
        raise InvalidValueError(f"a number of {len(number)} digits", REMEDY)
    unit = _UNITS.get(word.lower())
    if unit is None:
        raise InvalidValueError(f"unknown unit {word!r}", REMEDY)
    amount = Fraction(number.replace("_", ""))
    if amount > MOST:
        raise InvalidValueError(f"more than {MOST:,} {unit}", REMEDY)
    if unit == "%" and amount > 100:
        raise InvalidValueError("more than 100%", "Write a share from 0% to 100%.")
    return Duration(amount, unit)
