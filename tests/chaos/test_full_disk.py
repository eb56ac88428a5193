"""A disk that is full at any place of a run: the message, and nothing lost. `tests/jobs/test_disks.py` has the rest."""

import re

import pytest

from tests.chaos.killing import Place, assert_ended_as, drawing
from tests.checkpoints import newest_valid
from tests.jobs.test_disks import resize, size_of
from tlscale.errors import EXIT_FAILED

pytestmark = pytest.mark.long
NUM_SIZES = 12


@pytest.fixture(scope="module")
def whole(forks, idx, tmp_path_factory):
    place = Place(tmp_path_factory.mktemp("whole") / "place", "staged", idx)
    assert forks.wait(place.start(forks)) == 0, place.output()
    return place


@pytest.mark.parametrize("number", range(NUM_SIZES))
def test_a_disk_that_is_full_at_any_place(forks, whole, small_disk, idx, number):
    """Codes, checkpoints, log and model are on the one small disk, which grows a little three times."""
    resize(small_disk, 2**30)
    place = Place(small_disk / "place", "staged", idx)
    place.log = small_disk.parent / "log"
    draw, needed = drawing(f"disk {number}"), size_of(whole.out) + size_of(whole.cache)
    shares = sorted(draw.uniform(0.01, 0.95) for _ in range(3))
    print(shares)
    for share in shares:
        resize(small_disk, int(share * needed))
        status = forks.wait(place.start(forks))
        if status == 0:
            break  # pages that the other run's old checkpoints took
        output = place.log.read_text()
        assert status == EXIT_FAILED, output[-3000:]
        assert "Traceback" not in output, output[-3000:]
        assert re.search("disk is full|No space left|os error 28|has room for|left. Make", output), output[-3000:]
        assert newest_valid(place.out / "checkpoints")[1] == []
    resize(small_disk, 2**30)
    assert forks.wait(place.start(forks)) == 0, place.output()
    assert_ended_as(whole.out, place.out)
