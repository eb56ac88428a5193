"""One process that hangs does not keep the others waiting for ever."""

import json
import time

import pytest

from tests.dist.launches import exit_code_of, launch
from tests.small_runs import REPO, lines

pytestmark = pytest.mark.dist


def test_a_process_that_hangs_ends_the_run_and_is_named(idx, tmp_path):
    log = tmp_path / "log"
    began = time.monotonic()
    script = REPO / "tests" / "dist" / "trouble.py"
    with launch(2, script, tmp_path, idx, "hangs", log=log, launcher="torchrun") as launched:
        assert exit_code_of(launched, log, 150) != 0
    output = log.read_text()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["world_size"] == 2
    # Five steps; one pass more was on trial, before the first.
    assert max(record["step"] for record in lines(tmp_path / "run")) == 5
    assert "Timeout (0:00:06)!" in output
    assert "in wait_for_ever" in output, output[-3000:]
    assert time.monotonic() - began < 120
