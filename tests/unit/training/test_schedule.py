"""The learning rate is a function of the step: its corners by hand, its shape for any recipe."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tlscale.recipe.duration import parse_duration
from tlscale.recipe.schema import ScheduleSection
from tlscale.training.stages import make_lr_factor


def factors(total_steps, **keys):
    keys = {key: parse_duration(value) if key in ("warmup", "step_every") else value for key, value in keys.items()}
    section = ScheduleSection(**keys)
    to_steps = make_to_steps(total_steps)
    lr_factor = make_lr_factor(section, total_steps=total_steps, to_steps=to_steps)
    return [lr_factor(step) for step in range(total_steps)]


def make_to_steps(total_steps):
    """Ten steps an epoch of 160 images in batches of 16."""
    return lambda duration: duration.to_steps(num_images=160, batch_size=16, total_steps=total_steps)


def test_warm_up_wastes_no_step_at_zero_and_ends_at_the_peak():
    found = factors(10, warmup="4 steps", decay="constant")
    assert found == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert factors(3, warmup="0 steps", decay="constant") == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("warmup", "steps"), [("2 epochs", 20), ("32 images", 2), ("25%", 10), ("7 steps", 7), ("100%", 40)]
)
def test_warm_up_in_any_unit(warmup, steps):
    found = factors(40, warmup=warmup, decay="constant")
    assert found.index(1.0) == steps - 1


def test_cosine_by_hand():
    found = factors(8, warmup="0 steps", decay="cosine")
    assert found == pytest.approx([(1 + math.cos(math.pi * s / 8)) / 2 for s in range(8)])
    assert found[0] == 1.0
    assert found[4] == pytest.approx(0.5)
    assert found[7] > 0  # the floor is reached after the last step, which so still learns


def test_cosine_is_pytorchs():
    found = factors(50, warmup="0 steps", decay="cosine", min_factor=0.1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=0.1)
    for factor in found:
        assert factor == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()


def test_linear_by_hand():
    assert factors(4, warmup="0 steps", decay="linear") == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert factors(4, warmup="0 steps", decay="linear", min_factor=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4])


def test_stairs_by_hand():
    found = factors(9, warmup="2 steps", decay="step", step_every="3 steps", step_factor=0.1)
    assert found == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, 0.1, 0.1, 0.1, 0.01])


SECTIONS = st.fixed_dictionaries(
    {
        "warmup": st.sampled_from(["0 steps", "1 steps", "5%", "50%", "3 epochs", "100 images", "100%"]),
        "min_factor": st.floats(0, 1),
        "decay": st.sampled_from(["cosine", "linear"]),
    }
)


@settings(max_examples=200, deadline=None)
@given(keys=SECTIONS, total_steps=st.integers(1, 300))
def test_up_to_the_peak_then_down_to_the_floor(keys, total_steps):
    found = factors(total_steps, **keys)
    warmup = make_to_steps(total_steps)(parse_duration(keys["warmup"]))
    up, down = found[:warmup], found[warmup:]
    assert all(0 < factor <= 1 for factor in up)
    assert all(later > earlier for earlier, later in zip(up, up[1:], strict=False))
    assert all(later <= earlier for earlier, later in zip(down, down[1:], strict=False))
    assert all(keys["min_factor"] - 1e-12 <= factor <= 1 for factor in down)
    if down:
        assert down[0] == 1.0


@settings(max_examples=50, deadline=None)
@given(keys=SECTIONS, total_steps=st.integers(1, 100), steps=st.lists(st.integers(0, 99), max_size=20))
def test_asked_in_any_order_it_says_the_same(keys, total_steps, steps):
    """Which is what a resumed run does."""
    in_order = factors(total_steps, **keys)
    keys = {**keys, "warmup": parse_duration(keys["warmup"])}
    lr_factor = make_lr_factor(ScheduleSection(**keys), total_steps=total_steps, to_steps=make_to_steps(total_steps))
    for step in steps:
        if step < total_steps:
            assert lr_factor(step) == in_order[step]
