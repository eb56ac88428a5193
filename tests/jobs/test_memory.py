"""A device without memory: the keys that help, nothing lost, and the run resumes with less at once."""

import json
import subprocess
import sys

from tests.small_runs import REPO, result, small_recipe

# Only address space that is free after the imports is limited: 1 GiB, of which this run wants several.
_WITHIN_1_GIB = """
import resource, sys
import torch, timm, tlscale.commands.run, tlscale.training.loop
from tlscale.cli import main
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
sys.argv = ["tlscale", "run", *sys.argv[1:]]
main()
"""


def test_out_of_memory_names_what_saves_it_and_the_run_resumes_with_less(tmp_path, idx):
    changes = {"data": {"image_size": 224, "train_limit": 70}, "duration": "1 steps", "batch_size": 50}
    changes |= {"backbone": {"name": "resnet10t", "weights": "none"}, "checkpoint": {"every": "1 steps"}}
    small_recipe(tmp_path / "r.yaml", idx, **changes)
    arguments = [tmp_path / "r.yaml", "--out", tmp_path / "run"]
    command = [sys.executable, "-c", _WITHIN_1_GIB, *arguments]
    failed = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=200)
    assert failed.returncode == 1, failed.stderr
    assert "Traceback" not in failed.stderr
    for key in ("compute.micro_batch_size", "compute.gradient_checkpointing", "batch_size", "--resume"):
        assert key in failed.stderr
    less = [*command, "--resume", "compute.micro_batch_size=5", "compute.gradient_checkpointing=true"]
    resumed = subprocess.run(less, cwd=REPO, capture_output=True, text=True, timeout=200)
    assert resumed.returncode == 0, resumed.stderr
    assert result(tmp_path / "run")["steps"] == 1
    start = json.loads((tmp_path / "run" / "run.json").read_text())["computed"][-1]
    assert (start["micro_batch_size"], start["gradient_checkpointing"]) == (5, True)
