"""How often files of checkpoints are read: once by a save, and once by a start that resumes."""

import shutil
from collections import Counter

import pytest

import tlscale
from tests.checkpoints import Reads, opens
from tests.small_runs import as_after, assert_same_runs, small_recipe

CHANGES = {
    "duration": "8 steps",
    "checkpoint": {"every": "2 steps", "keep": 2},
    "evaluate": {"every": "100 epochs"},  # the last step is the best one, so that no other is loaded in the end
    "optim": {"ema_decay": 0.9},
}
FILES = {"model.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json"}


@pytest.fixture(scope="module")
def whole(idx, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    with Reads() as reads:
        tlscale.run(small_recipe(folder / "recipe.yaml", idx, **CHANGES), folder / "run")
    return folder / "run", reads.counts


def test_a_save_reads_each_file_back_once_and_no_other(whole):
    """Also where older ones are removed, of which `keep` have to be valid."""
    out, counts = whole
    steps = [f"step_{step:08}" for step in (2, 4, 6, 8)]
    assert [folder.name for folder in sorted((out / "checkpoints").glob("step_*"))] == steps[
        1:
    ]  # the best, and two besides
    assert counts == Counter({(step, name): 1 for step in steps for name in FILES})


def test_a_resume_reads_each_file_once(whole, idx, tmp_path):
    out, _ = whole
    as_after(6, out, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints" / "step_00000006"
    with opens(folder) as counts, Reads() as reads:
        tlscale.run(small_recipe(tmp_path / "recipe.yaml", idx, **CHANGES), tmp_path / "run", resume=True)
    assert counts == Counter(dict.fromkeys((*FILES, "manifest.json"), 1))
    assert {name: count for (step, name), count in reads.counts.items() if step == folder.name} == counts
    assert_same_runs(out, tmp_path / "run")


def test_one_that_is_corrupt_costs_no_second_read_of_the_one_before(whole, idx, tmp_path):
    out, _ = whole
    shutil.copytree(out, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    newest, before = (tmp_path / "run" / "checkpoints" / f"step_{step:08}" for step in (8, 6))
    (newest / "state.json").write_text("{}")
    with opens(before) as counts:
        tlscale.run(small_recipe(tmp_path / "recipe.yaml", idx, **CHANGES), tmp_path / "run", resume=True)
    assert counts == Counter(dict.fromkeys((*FILES, "manifest.json"), 1))
    assert_same_runs(out, tmp_path / "run")
