"""A power loss at any moment of a run: it goes on to the same weights, or begins anew, and is never complete falsely.

A sample of the states that a disk may be in then; tests/chaos/test_power_loss.py has all.
"""

import os

import pytest

import tlscale
from tests.power_loss import KINDS, Moment, Recorder, put, states
from tests.small_runs import assert_same_runs, small_recipe

# The head alone is trained, on cached codes.
CHANGES = {
    "freeze": r"(?!head\.).*",
    "codes": {"keep": "always"},
    "duration": "6 steps",
    "checkpoint": {"every": "2 steps", "keep": 1},
    "evaluate": {"every": "3 steps"},
}


def record(place, idx) -> tuple[Recorder, object]:
    """Make the run `place/disk/run`, its cache next to it."""
    disk = place / "disk"
    disk.mkdir()
    recipe = small_recipe(place / "recipe.yaml", idx, **CHANGES)
    with pytest.MonkeyPatch.context() as patch, Recorder(disk) as recorder:
        patch.setenv("TLSCALE_CACHE", str(disk / "cache"))
        tlscale.run(recipe, disk / "run")
    return recorder, recipe


@pytest.fixture(scope="module")
def recorded(idx, tmp_path_factory):
    place = tmp_path_factory.mktemp("recorded")
    return place, *record(place, idx)


@pytest.fixture
def goes_on(recorded, tmp_path, monkeypatch):
    """Resume from a state, and compare with the run that nothing happened to."""
    place, _, recipe = recorded

    def resume(tree):
        disk = put(tree, tmp_path / "disk")
        monkeypatch.setenv("TLSCALE_CACHE", str(disk / "cache"))
        tlscale.run(recipe, disk / "run", resume=True)
        assert_same_runs(place / "disk" / "run", disk / "run")

    return resume


def test_the_recorder_sees_what_was_flushed_and_what_was_not(tmp_path):
    with Recorder(tmp_path) as recorder:
        (tmp_path / "a").write_text("never flushed")
        with (tmp_path / "b.new").open("w") as file:
            file.write("flushed")
            file.flush()
            os.fsync(file.fileno())
        (tmp_path / "b.new").rename(tmp_path / "b")
    end = recorder.moments[-1]
    assert end.tree("only what was flushed") == {}
    assert end.tree("all names, empty files") == {"a": b"", "b": b"flushed"}
    assert end.tree("all names, half of the files") == {"a": b"never ", "b": b"flushed"}
    with Recorder(tmp_path) as again:
        os.replace(tmp_path / "b", tmp_path / "a")
    assert again.moments[-1].tree("only what was flushed") == {"a": b"never flushed", "b": b"flushed"}
    assert again.moments[-1].tree("no new names, without the old ones") == {"a": b"never flushed"}


def last(moments: list[Moment], part: str) -> Moment:
    return [moment for moment in moments if part in moment.what][-1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_complete_run_is_so_after_a_power_loss(recorded, goes_on, capsys, kind):
    _, recorder, _ = recorded
    goes_on(recorder.moments[-1].tree(kind))
    assert "is complete already" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("kind", ["only what was flushed", "all names, empty files", "new names, and the old ones"])
@pytest.mark.parametrize("after", ["after replace", "step_00000004"])
def test_a_power_loss_at_some_moments(recorded, goes_on, kind, after):
    """When `result.json` had just got its name, and in the middle of a checkpoint."""
    _, recorder, _ = recorded
    goes_on(last(recorder.moments, after).tree(kind))


def test_there_are_many_states(recorded):
    _, recorder, _ = recorded
    assert len(recorder.moments) > 100
    assert len(list(states(recorder.moments))) > 150
