"""`accelerate launch` of one process: its end is the run's end too, saved."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import tlscale
from tests.small_runs import (
    REPO,
    assert_same_bits,
    environment,
    exported,
    last_checkpoint,
    logged,
    put_small_idx,
    small_recipe,
    wait_until,
)


def test_when_the_launcher_is_ended_the_run_saves_itself_and_can_be_resumed(tmp_path):
    idx, out, log = put_small_idx(tmp_path / "idx"), tmp_path / "run", tmp_path / "log"
    changes = {"duration": "400 steps", "checkpoint": {"every": "400 steps"}, "evaluate": {"every": "400 steps"}}
    recipe = small_recipe(tmp_path / "recipe.yaml", idx, **changes)
    accelerate = Path(sys.executable).parent / "accelerate"
    words = map(str, (accelerate, "launch", "tlscale/run.py", tmp_path / "recipe.yaml", "--out", out))
    on_cpu = environment(ACCELERATE_USE_CPU="true")
    with log.open("w") as file:
        launcher = subprocess.Popen(list(words), stdout=file, stderr=subprocess.STDOUT, env=on_cpu, cwd=REPO)
    wait_until(logged(out, 5), launcher)
    launcher.terminate()  # the launcher does not hand it on
    launcher.wait(30)
    end = time.monotonic() + 60
    while "--resume resumes it" not in log.read_text():
        assert time.monotonic() < end, log.read_text()[-2000:]
        time.sleep(0.05)
    stopped_at = int(last_checkpoint(out).name.removeprefix("step_"))
    assert 5 <= stopped_at < 400
    # The run ends in the weights of one that nobody stopped.
    tlscale.run(recipe, out, resume=True)
    tlscale.run(recipe, tmp_path / "whole")
    assert_same_bits(exported(tmp_path / "whole"), exported(out))
    assert json.loads((out / "result.json").read_text())["steps"] == 400
