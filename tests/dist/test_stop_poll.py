"""Processes that are asked to stop at different times stop after the same step, and do not ask each other in each."""

import pytest

from tests.dist.launches import facts_of
from tests.dist.stop_poll import EVERY_S

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    return facts_of(2, "stop_poll.py", tmp_path_factory.mktemp("by2"))


@pytest.mark.parametrize("kind", ["fast", "slow"])
def test_both_stop_after_the_same_step_and_soon(by_two, kind):
    one, other = (fact[kind] for fact in by_two)
    assert one["last"] == other["last"] is not None
    assert one["asked"] == other["asked"]
    assert one["last"] == one["asked"][-1]
    assert (one["waited_s"], other["waited_s"] < EVERY_S + 1.5) == (None, True)


def test_fast_steps_are_asked_of_seldom(by_two):
    fact = by_two[0]["fast"]
    assert 7 in fact["asked"], "an evaluation is due"
    assert len(fact["asked"]) < fact["last"] / 5
    gaps = [later - earlier for earlier, later in zip(fact["asked"], fact["asked"][1:], strict=False)]
    assert max(gaps) > 20


def test_slow_steps_are_asked_of_each(by_two):
    fact = by_two[0]["slow"]
    assert fact["asked"] == list(range(1, fact["last"] + 1))
