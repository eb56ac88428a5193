"""Durations: text to value and back, and value to steps."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlscale.recipe.duration import Duration, parse_duration

UNITS = ["epochs", "steps", "images", "%"]
# All amounts that a recipe can hold: decimal fractions.
DECIMALS = st.builds(lambda n, places: Fraction(n, 10**places), st.integers(0, 10**15), st.integers(0, 12))


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [
        ("10 epochs", 10, "epochs"),
        ("1 epoch", 1, "epochs"),
        ("0.1 epochs", Fraction(1, 10), "epochs"),
        ("500steps", 500, "steps"),
        (" 64_000 Images ", 64000, "images"),
        ("5%", 5, "%"),
        ("2.5 percent", Fraction(5, 2), "%"),
        ("0 steps", 0, "steps"),
    ],
)
def test_parse(text, amount, unit):
    assert parse_duration(text) == Duration(Fraction(amount), unit)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (10, "needs a unit"),
        (None, "needs a unit"),
        ("10", "not a duration"),
        ("-1 epochs", "not a duration"),
        ("1e3 steps", "not a duration"),
        ("ten epochs", "not a duration"),
        ("10 days", "unknown unit 'days'"),
        ("101%", "more than 100%"),
        ("9" * 5000 + " steps", "a number of 5000 digits"),
    ],
)
def test_wrong(value, said):
    with pytest.raises(ValueError, match=said):
        parse_duration(value)


@given(DECIMALS, st.sampled_from(UNITS))
def test_text_reads_back(amount, unit):
    duration = Duration(min(amount, Fraction(100)) if unit == "%" else amount, unit)
    assert parse_duration(str(duration)) == duration


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("3 epochs", 3 * 8),  # 1000 images in batches of 128: 7 full and a short one
        ("0.5 epochs", 4),
        ("500 steps", 500),
        ("0.5 steps", 1),
        ("1000 images", 8),
        ("2000 images", 16),
        ("1001 images", 9),
        ("128 images", 1),
        ("5%", 5),
        ("0.5%", 1),
        ("0%", 0),
        ("0 steps", 0),
    ],
)
def test_steps(text, steps):
    assert parse_duration(text).to_steps(num_images=1000, batch_size=128, total_steps=100) == steps


def test_a_tenth_of_an_epoch_is_exact():
    # In floating point 0.1 * 30 is 3.0000000000000004, and that would be rounded up to four steps.
    assert parse_duration("0.1 epochs").to_steps(num_images=30, batch_size=1) == 3


def test_a_share_needs_a_whole():
    with pytest.raises(ValueError, match="share of a run"):
        parse_duration("5%").to_steps(num_images=10, batch_size=1)


@given(st.integers(1, 10**6), st.integers(1, 10**4), st.integers(0, 50))
def test_whole_epochs_are_whole_epochs_of_images(num_images, batch_size, epochs):
    by_epochs = parse_duration(f"{epochs} epochs").to_steps(num_images=num_images, batch_size=batch_size)
    by_images = parse_duration(f"{epochs * num_images} images").to_steps(num_images=num_images, batch_size=batch_size)
    assert by_epochs == by_images == epochs * math.ceil(num_images / batch_size)


@given(DECIMALS, DECIMALS, st.sampled_from(["epochs", "steps", "images"]), st.integers(1, 1000), st.integers(1, 100))
def test_longer_is_never_fewer_steps(one, other, unit, num_images, batch_size):
    short, long = (
        Duration(amount, unit).to_steps(num_images=num_images, batch_size=batch_size) for amount in sorted((one, other))
    )
    assert 0 <= short <= long
