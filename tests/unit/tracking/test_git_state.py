"""The commit of the folder one stands in, without running anything that the folder names."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tlscale.tracking.git_state import git_state

PLAIN = {
    **{key: value for key, value in os.environ.items() if not key.startswith("GIT_")},
    **{f"GIT_{who}_{what}": "someone" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_NOSYSTEM": "1",
}


def git(folder: Path, *words: str, **kinds: str) -> str:
    done = subprocess.run(
        ["git", *words], cwd=folder, env={**PLAIN, **kinds}, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def put_checkout(folder: Path, *options: str) -> Path:
    folder.mkdir(parents=True)
    git(folder, "init", "-q", *options)
    (folder / "a.txt").write_text("a\n")
    (folder / "b.txt").write_text("b\n")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def touch(folder: Path) -> None:
    """Times as an unpacked archive has them: git has to compare the content of every file."""
    for path in folder.glob("*.txt"):
        os.utime(path, (1, 1))


@pytest.fixture
def canary(tmp_path):
    """A program that leaves a file behind, and that file."""
    ran, program = tmp_path / "ran", tmp_path / "program.sh"
    program.write_text(f"#!/bin/sh\necho \"$0 $*\" >> '{ran}'\ncat 2>/dev/null\nexit 0\n")
    program.chmod(0o755)
    return program, ran


def name_everything(folder: Path, program: Path) -> None:
    """All that git's configuration can name for it to run, and that a repository can bring along."""
    for key in (
        "core.fsmonitor", "core.sshCommand", "core.gitProxy", "core.pager", "core.editor", "core.askPass",
        "filter.x.clean", "filter.x.smudge", "filter.x.process", "diff.external", "diff.x.textconv", "diff.x.command",
        "merge.x.driver", "credential.helper", "gpg.program", "interactive.diffFilter", "sequence.editor",
        "alias.status", "alias.rev-parse", "alias.config", "remote.origin.uploadpack", "remote.origin.vcs",
    ):  # fmt: skip
        value = f"!{program}" if key.startswith(("alias.", "credential.")) else str(program)
        git(folder, "config", key, value)
    for key, value in {
        "filter.x.required": "true", "status.submoduleSummary": "true", "submodule.recurse": "true",
        "remote.origin.url": "ext::" + str(program), "remote.origin.promisor": "true",
        "extensions.partialClone": "origin", "protocol.ext.allow": "always",
    }.items():  # fmt: skip
        git(folder, "config", key, value)
    (folder / ".gitattributes").write_text("* filter=x diff=x merge=x\n")
    hooks = folder / ".git" / "hooks"
    hooks.mkdir(exist_ok=True)
    for name in ("post-index-change", "fsmonitor-watchman", "post-checkout", "reference-transaction", "pre-auto-gc"):
        shutil.copy(program, hooks / name)


@pytest.mark.parametrize("included", [False, True])
def test_nothing_that_a_checkout_names_is_run(tmp_path, monkeypatch, canary, included):
    program, ran = canary
    folder = put_checkout(tmp_path / "data")
    inner = put_checkout(folder / "inner")
    name_everything(inner, program)
    git(folder, "-c", "protocol.file.allow=always", "submodule", "add", "-q", "./inner", "inner")
    git(folder, "commit", "-q", "-m", "a submodule")
    commit = git(folder, "rev-parse", "HEAD")
    name_everything(folder, program)
    if included:
        config = folder / ".git" / "config"
        config.rename(folder / "settings")
        config.write_text("[include]\n\tpath = ../settings\n")
    touch(folder)
    touch(inner)
    monkeypatch.chdir(folder)
    ran.unlink(missing_ok=True)  # setting up may have run it
    subprocess.run(["git", "status"], env=PLAIN, capture_output=True, check=False)
    assert ran.exists(), "the checkout is harmless: this test shows nothing"
    ran.unlink()
    assert git_state() == {"commit": commit, "changed": False}
    assert not ran.exists(), ran.read_text()


def test_programs_in_the_environment_are_not_run_either(tmp_path, monkeypatch, canary):
    program, ran = canary
    monkeypatch.chdir(put_checkout(tmp_path / "data"))
    touch(Path())
    for key, value in {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": "core.fsmonitor",
        "GIT_CONFIG_VALUE_0": str(program),
    }.items():
        monkeypatch.setenv(key, value)
    assert git_state() == {"commit": git(Path(), "rev-parse", "HEAD"), "changed": False}
    assert not ran.exists()


@pytest.mark.parametrize("kind", ["plain", "sha256", "split index", "worktree", "below", "crlf", "modes"])
def test_commit_and_changes_are_those_of_git(tmp_path, monkeypatch, kind):
    folder = put_checkout(tmp_path / "here", *(["--object-format=sha256"] if kind == "sha256" else []))
    if kind == "split index":
        git(folder, "update-index", "--split-index")
    if kind == "worktree":
        git(folder, "worktree", "add", "-q", "../there")
        folder = tmp_path / "there"
    if kind == "crlf":
        git(folder, "config", "core.autocrlf", "true")
        (folder / "a.txt").unlink()
        git(folder, "checkout", "-q", "a.txt")
        assert (folder / "a.txt").read_bytes() == b"a\r\n"
    if kind == "modes":
        git(folder, "config", "core.fileMode", "false")
        (folder / "a.txt").chmod(0o755)
    touch(folder)
    (folder / "below").mkdir()
    monkeypatch.chdir(folder / "below" if kind == "below" else folder)
    (folder / "untracked.txt").write_text("")
    index = Path(git(Path(), "rev-parse", "--path-format=absolute", "--git-path", "index"))
    before = index.read_bytes()
    commit = git(Path(), "rev-parse", "HEAD")
    assert git_state() == {"commit": commit, "changed": False}
    assert index.read_bytes() == before
    (folder / "b.txt").write_text("other\n")
    assert git_state() == {"commit": commit, "changed": True}
    (folder / "b.txt").unlink()
    assert git_state() == {"commit": commit, "changed": True}


def test_outside_of_a_checkout_there_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert git_state() is None
    git(tmp_path, "init", "-q")
    assert git_state() is None  # no commit yet


def test_a_pipe_in_place_of_the_configuration_does_not_hang(tmp_path, monkeypatch):
    folder = put_checkout(tmp_path / "data")
    os.mkfifo(folder / "pipe")
    (folder / ".git" / "config").write_text("[include]\n\tpath = ../pipe\n")
    monkeypatch.setattr("tlscale.tracking.git_state._TIMEOUT_S", 0.3)
    monkeypatch.chdir(folder)
    assert git_state() is None
