"""A power loss while codes are stored costs at most computing them again: no state of the disk gives other codes.

A shard's files have their names on the disk before its record is written (`shards.place_shard`). Nobody waits for the
name of the folder of an entry: codes that are not there are computed again.
"""

import pytest

from tests.power_loss import KINDS, Recorder, put, states
from tests.unit.codes.test_extract import BLOCK, IDS, KEY, Run, assert_equal
from tlscale.codes.store import CodesStore

ROWS = range(3 * BLOCK)


@pytest.fixture(scope="module")
def moments(tmp_path_factory):
    """Of a run that finds the first block, and stores two shards."""
    disk = tmp_path_factory.mktemp("disk")
    Run(disk / "codes")(ROWS[:BLOCK])
    with Recorder(disk) as recorder:
        Run(disk / "codes")(ROWS)
    return recorder.moments


def test_no_state_gives_other_codes(moments, tmp_path):
    opened, found = 0, list(states(moments))
    for number, (_, tree) in enumerate(found):
        disk = put(tree, tmp_path / str(number))
        for rows in (ROWS[:BLOCK], ROWS):
            codes = CodesStore(disk / "codes").open(KEY, IDS[rows])
            if codes is not None:
                assert_equal(codes, rows)
                opened += 1
        if number % 3 == 0:  # and a run there goes on
            assert_equal(Run(disk / "codes")(ROWS), ROWS)
    assert len(found) > 5
    assert opened > 5


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_finished_is_there(kind, moments, tmp_path):
    disk = put(moments[-1].tree(kind), tmp_path / "disk")
    assert_equal(CodesStore(disk / "codes").open(KEY, IDS[ROWS]), ROWS)
