"""Disks that fill up or turn read-only under a run: it ends with one message, and goes on when there is room again."""

import contextlib
import subprocess

import pytest

import tlscale
from tests.checkpoints import newest_valid
from tests.small_runs import assert_same_runs, lines, small_recipe
from tlscale.errors import EXIT_BAD_INPUT, EXIT_FAILED, RunFolderError, TlscaleError
from tlscale.storage import faults
from tlscale.training.checkpoint.files import list_checkpoints

CHANGES = {"duration": "12 steps", "checkpoint": {"every": "2 steps"}, "evaluate": {"every": "3 steps"}}


def resize(disk, num_bytes):
    subprocess.run(["mount", "-o", f"remount,size={num_bytes}", disk], check=True)


def size_of(folder):
    """Bytes on a file system of pages."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def whole(idx, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    tlscale.run(small_recipe(folder / "recipe.yaml", idx, **CHANGES), folder / "run")
    return folder / "run"


# As shares of what the complete run takes: in the first checkpoint, in a later one, and in the export.
@pytest.mark.parametrize("share", [0.1, 0.62, 0.9])
def test_a_disk_that_is_full(whole, idx, small_disk, tmp_path, share):
    recipe = small_recipe(tmp_path / "recipe.yaml", idx, **CHANGES)
    out = small_disk / "run"
    resize(small_disk, int(share * size_of(whole)))
    with pytest.raises(TlscaleError) as caught:
        tlscale.run(recipe, out)
    assert caught.value.exit_code == EXIT_FAILED
    assert any(words in str(caught.value) for words in ("disk is full", "No space left", "os error 28"))
    assert str(out) in str(caught.value)
    newest, faults = newest_valid(out / "checkpoints")
    assert faults == [], "what is there is whole"
    assert (newest is not None) == (share > 0.2)
    assert not (out / "result.json").exists()
    resize(small_disk, 2**30)
    tlscale.run(recipe, out, resume=True)
    assert_same_runs(whole, out)


@contextlib.contextmanager
def read_only(folder):
    """Root writes whatever the mode says; a mount that is read-only stops it, too."""
    mounted = []
    try:
        for options in (["--bind", folder, folder], ["-o", "remount,ro,bind", folder]):
            done = subprocess.run(["mount", *options], capture_output=True, check=False)
            if done.returncode:
                pytest.skip("a folder cannot be mounted read-only here (not root?)")
            mounted.append(folder)
        yield
    finally:
        if mounted:
            subprocess.run(["umount", folder], check=True)


def test_a_folder_that_is_read_only_from_the_start(idx, tmp_path):
    recipe = small_recipe(tmp_path / "recipe.yaml", idx, **CHANGES)
    (tmp_path / "disk").mkdir()
    with read_only(tmp_path / "disk"), pytest.raises(RunFolderError, match="cannot write to the run folder") as caught:
        tlscale.run(recipe, tmp_path / "disk" / "run")
    assert "Read-only file system" in str(caught.value)
    assert caught.value.exit_code == EXIT_BAD_INPUT


def test_a_run_whose_folder_was_made_read_only_is_not_resumed_and_not_harmed(whole, idx, tmp_path):
    """Not even the lock can be taken."""
    recipe = small_recipe(tmp_path / "recipe.yaml", idx, **{**CHANGES, "duration": "12 steps"})
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    with read_only(whole), pytest.raises(RunFolderError, match="cannot write to the run folder"):
        tlscale.run(recipe, whole, resume=True)
    assert {path: path.read_bytes() for path in before} == before


def test_checkpoints_that_turn_read_only_in_the_middle(whole, idx, tmp_path, monkeypatch):
    recipe = small_recipe(tmp_path / "recipe.yaml", idx, **CHANGES)
    out = tmp_path / "run"
    checkpoints = out / "checkpoints"
    with contextlib.ExitStack() as mounts:
        plain_at, turned = faults.at, []

        def at(point: str) -> None:
            """Mount the folder read-only at the first step after a checkpoint: a thread could come too late."""
            plain_at(point)
            if point == "step" and not turned and list_checkpoints(checkpoints):
                turned.append(mounts.enter_context(read_only(checkpoints)))

        monkeypatch.setattr(faults, "at", at)
        with pytest.raises(TlscaleError, match="Read-only file system.*resume=True") as caught:
            tlscale.run(recipe, out)
        assert turned
        assert caught.value.exit_code == EXIT_FAILED
        reached = max(record["step"] for record in lines(out))
        assert reached < 12
        # Still so: the same line fails in the same way, and takes nothing away.
        with pytest.raises(TlscaleError, match="Read-only file system"):
            tlscale.run(recipe, out, resume=True)
    assert newest_valid(checkpoints)[0] is not None
    tlscale.run(recipe, out, resume=True)
    assert_same_runs(whole, out)
