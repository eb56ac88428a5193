"""The run folder: one job at a time, and nothing of anybody else's is touched."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.small_runs import environment
from tlscale.distributed.signals import StopRequest
from tlscale.errors import EXIT_BAD_INPUT, RunFolderError
from tlscale.storage.files import write_json
from tlscale.storage.run_folder import RunFolder, claim, clear, forget_stop
from tlscale.training.run_files import read_result
from tlscale.training.run_info import read_run_info

HOLD = """
import sys
from pathlib import Path
from tlscale.storage.run_folder import claim
with claim(Path(sys.argv[1]), "fresh"):
    print("held", flush=True)
    sys.stdin.read()
"""


def put_run(path):
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / "run.json", {"tlscale": "0.1.0"})
    (path / "checkpoints").mkdir()
    (path / "checkpoints" / "LATEST").write_text("step_00000001\n")


def contents(path):
    return {str(entry.relative_to(path)): entry.read_bytes() if entry.is_file() else None for entry in path.rglob("*")}


@pytest.mark.parametrize("mode", ["fresh", "resume", "overwrite"])
def test_a_new_or_empty_folder_is_taken(tmp_path, mode):
    with claim(tmp_path / "deep" / "run", mode) as folder:
        assert folder.path.is_dir()
    with claim(tmp_path / "deep" / "run", mode):  # only the lock's file is there
        pass


def test_fresh_refuses_a_run_and_says_the_ways_out(tmp_path):
    put_run(tmp_path / "run")
    before = contents(tmp_path / "run")
    with pytest.raises(RunFolderError, match="already holds a run") as caught, claim(tmp_path / "run", "fresh"):
        pass
    (tmp_path / "run" / ".lock").unlink(missing_ok=True)
    assert all(word in str(caught.value) for word in ("--resume", "--overwrite", "--out"))
    assert caught.value.exit_code == EXIT_BAD_INPUT
    assert contents(tmp_path / "run") == before


def test_resume_keeps_and_overwrite_clears(tmp_path):
    put_run(tmp_path / "run")
    before = contents(tmp_path / "run")
    with claim(tmp_path / "run", "resume"):
        assert contents(tmp_path / "run") == {**before, ".lock": b""}
    with claim(tmp_path / "run", "overwrite") as folder:
        assert contents(tmp_path / "run") == {**before, ".lock": b""}  # until the new run is ready
        clear(folder)
        assert contents(tmp_path / "run") == {".lock": b""}


@pytest.mark.parametrize("mode", ["fresh", "resume", "overwrite"])
def test_a_run_that_was_killed_before_its_first_file_is_none(tmp_path, mode):
    """What it was writing aside must not turn the folder into somebody else's."""
    run = tmp_path / "run"
    run.mkdir()
    (run / ".run.json.4711").write_text('{"tlsc')
    (run / "STOP").touch()
    with claim(run, mode):
        assert contents(run) == {".lock": b"", "STOP": b""}


def test_what_killed_writers_left_goes_and_nothing_else(tmp_path):
    put_run(tmp_path / "run")
    left = (".run.json.1", ".recipe.yaml.22", ".result.json.333", ".STOPPED.4444", ".predictions.parquet.5")
    others = (".run.json", ".run.json.old", ".notes.txt.55", "run.json.66")
    for name in left + others:
        (tmp_path / "run" / name).write_text("x")
    with claim(tmp_path / "run", "resume"):
        assert {name for name in left + others if (tmp_path / "run" / name).exists()} == set(others)


def test_who_is_killed_while_a_run_is_removed_leaves_one_that_never_began(tmp_path, monkeypatch):
    """Neither a foreign folder, nor one whose checkpoints are gone and whose result says that it is complete."""
    put_run(tmp_path / "run")
    for name in ("recipe.yaml", "result.json", "metrics.jsonl"):
        (tmp_path / "run" / name).write_text("x")
    folder, seen = RunFolder(tmp_path / "run"), []
    unlink, rmtree = type(tmp_path).unlink, shutil.rmtree

    def look(remove):
        def spy(path, *args, **options):
            seen.append((folder.recipe.exists() and len(seen) > 0, read_run_info(folder), folder.run_json.exists()))
            remove(path, *args, **options)

        return spy

    monkeypatch.setattr(type(tmp_path), "unlink", look(unlink))
    monkeypatch.setattr(shutil, "rmtree", look(rmtree))
    clear(folder)
    assert contents(tmp_path / "run") == {}
    assert len(seen) == 5
    first, *later = seen
    assert first[1] is not None, "as it was"
    assert later == [(False, None, True)] * 4


def test_clear_follows_no_link(tmp_path):
    put_run(tmp_path / "run")
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("x")
    (tmp_path / "run" / "link").symlink_to(precious)
    clear(RunFolder(tmp_path / "run"))
    assert (precious / "thesis.tex").read_text() == "x"
    assert contents(tmp_path / "run") == {}


@pytest.mark.parametrize("mode", ["fresh", "resume", "overwrite"])
@pytest.mark.parametrize("run_json", [None, "{}", "[]", "not json", "null", '"tlscale', "3", b"\xff\xfe"])
def test_a_foreign_folder_is_never_touched(tmp_path, mode, run_json):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").write_bytes(b"x")
    if run_json is not None:
        (tmp_path / "run.json").write_bytes(run_json if isinstance(run_json, bytes) else run_json.encode())
    before = contents(tmp_path)
    with pytest.raises(RunFolderError, match="is not empty and not a run of tlscale"), claim(tmp_path, mode):
        pass
    assert contents(tmp_path) == before


def test_a_second_job_is_refused_until_the_first_has_ended(tmp_path):
    run = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        for mode in ("fresh", "resume", "overwrite"):
            with pytest.raises(RunFolderError, match=r"another job is writing to .*--out DIR"), claim(run, mode):
                pass
    finally:
        holder.kill()  # a job that is killed holds nothing
        holder.communicate()
    with claim(run, "fresh"):
        pass


def test_the_lock_goes_when_the_job_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), claim(tmp_path / "run", "fresh"):
        raise ZeroDivisionError
    with claim(tmp_path / "run", "fresh"):
        pass


def test_a_link_to_a_folder_is_that_folder(tmp_path):
    put_run(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(RunFolderError, match="already holds a run"), claim(tmp_path / "link", "fresh"):
        pass
    with claim(tmp_path / "link", "resume"), pytest.raises(RunFolderError, match="another job"):  # noqa: SIM117
        with claim(tmp_path / "real", "resume"):
            pass


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    (tmp_path / "circle").symlink_to("circle")
    os.mkfifo(tmp_path / "pipe")
    names = ("file", "file/run", "dangling", "dangling/run", "circle", "circle/run", "pipe", "x" * 300, "caf\udce9")
    places = [tmp_path / name for name in names]
    if os.path.isdir("/proc"):
        places.append(RunFolder(type(tmp_path)("/proc/tlscale")).path)
    for place in places:
        with pytest.raises(RunFolderError, match="cannot write to") as raised, claim(place, "fresh"):
            pass
        assert raised.value.exit_code == 2, place
        assert raised.value.remedy.startswith("Give another "), place


@pytest.mark.parametrize("put", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "contents.npy", "STOPPED", ".spent.json", ".fits", "model/config.json"]
)
def test_what_is_no_file_is_never_read(tmp_path, name, put):
    with claim(tmp_path / "run", "fresh") as folder:
        folder.run_json.write_text('{"tlscale": "1"}')
        folder.model.mkdir()
    path = folder.path / name
    put(path)
    for use in (lambda: claim(folder.path, "resume").__enter__(), lambda: read_result(folder)):
        with pytest.raises(RunFolderError, match=rf"{name}' is a (named pipe|device), no regular file") as raised:
            use()
        assert raised.value.exit_code == 2
    path.unlink()
    folder.stop.symlink_to("/dev/zero")  # a request to stop may be anything
    (folder.path / "wandb").mkdir()
    os.mkfifo(folder.path / "wandb" / "pipe")  # of a tracker
    with claim(folder.path, "resume"):
        assert read_result(folder) is None


@pytest.mark.parametrize("what", ["file", "link", "dangling link", "folder"])
def test_a_request_to_stop_is_heard_and_removed_whatever_it_is(tmp_path, what):
    folder = RunFolder(tmp_path)
    (tmp_path / "kept").write_text("kept")
    put = {
        "file": folder.stop.touch,
        "link": lambda: folder.stop.symlink_to("kept"),
        "dangling link": lambda: folder.stop.symlink_to("gone"),
        "folder": folder.stop.mkdir,
    }
    assert not StopRequest(folder.stop).requested
    put[what]()
    assert StopRequest(folder.stop).requested
    assert forget_stop(folder)
    assert not StopRequest(folder.stop).requested
    assert not forget_stop(folder)
    assert (tmp_path / "kept").read_text() == "kept"


def test_a_request_to_stop_that_holds_something_is_not_removed(tmp_path):
    folder = RunFolder(tmp_path)
    folder.stop.mkdir()
    (folder.stop / "mine").write_text("mine")
    with pytest.raises(RunFolderError, match="cannot be removed") as caught:
        forget_stop(folder)
    assert caught.value.exit_code == EXIT_BAD_INPUT
    assert (folder.stop / "mine").read_text() == "mine"
