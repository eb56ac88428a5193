"""A comparison that is asked to stop between two runs: alone it stops there; several processes hear it in the next."""

from __future__ import annotations

import os
import signal

import pytest

from tests.small_runs import small_recipe
from tlscale.commands.compare import compare
from tlscale.distributed.signals import StopRequest, check_stop
from tlscale.errors import Stopped


@pytest.mark.parametrize(("world_size", "num_begun"), [("1", 1), ("2", 2)])
def test_processes_that_wait_for_each_other_stop_in_the_same_run(world_size, num_begun, tmp_path, monkeypatch):
    """One of several that left between two runs would leave the others waiting for it in the next one."""
    recipe, begun = small_recipe(tmp_path / "r.yaml", tmp_path), []
    monkeypatch.setenv("WORLD_SIZE", world_size)
    monkeypatch.setenv("RANK", "1")  # which reads no folder of a run that has ended

    def run(recipe, folder, *, resume):
        begun.append(recipe.name)
        if len(begun) > 1:
            check_stop("training")  # as a run asks, with all processes together
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

    with StopRequest(), pytest.raises(Stopped) as stopped:
        compare([recipe], run=run, strategies=["scratch"], seeds=[0, 1, 2], out=tmp_path / "all")
    assert len(begun) == num_begun
    assert ("comparing" in str(stopped.value)) == (world_size == "1")
