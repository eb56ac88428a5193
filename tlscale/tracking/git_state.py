"""Commit of the checkout that a run is started in, and whether it has changes.

Promise: nothing that the checkout holds is run. The folder one stands in may be an unpacked data set with a `.git` of
its own, whose configuration can name programs for `git status` to run: a file-system monitor, filters, hooks, what
fetches missing objects, and the same in its submodules. So only the commit is asked of it (which runs none of these),
and its files are compared through an empty repository of ours that lends its index and its objects, and knows no
configuration but some plain switches.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

# Without these, files would count as changed where git was told how they lie on the disk. None of them runs anything.
_SWITCHES = {
    "core.autocrlf": ("true", "false", "input"),
    "core.eol": ("lf", "crlf", "native"),
    "core.filemode": ("true", "false"),
    "core.ignorecase": ("true", "false"),
    "core.symlinks": ("true", "false"),
    "core.trustctime": ("true", "false"),
    "core.checkstat": ("default", "minimal"),
}
_OFF = ("core.fsmonitor=false", f"core.hooksPath={os.devnull}", "submodule.recurse=false", "protocol.allow=never")
_TIMEOUT_S = 10


def git_state() -> dict[str, Any] | None:
    """Return the `commit`, and whether files that git knows have changed; None outside of a checkout.

    `changed` is None where that cannot be told without running what the checkout names.
    """
    try:
        asked = ["--show-toplevel", "--git-path", "index", "--git-path", "objects", "HEAD"]
        top, index, objects, commit = _git(["rev-parse", *asked], {}).split("\n")
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    try:
        return {"commit": commit, "changed": _is_changed(commit, top, Path(index).resolve(), Path(objects).resolve())}
    except (OSError, subprocess.SubprocessError):
        return {"commit": commit, "changed": None}


def _is_changed(commit: str, top: str, index: Path, objects: Path) -> bool:
    # The plain switches of the checkout's configuration (and the user's) whose values are known.
    switches: dict[str, str] = {}
    for entry in _git(["config", "--list", "-z"], {}).split("\0"):
        key, _, value = entry.partition("\n")
        if value.lower() in _SWITCHES.get(key.lower(), ()):
            switches[key.lower()] = value.lower()
    with tempfile.TemporaryDirectory(prefix="tlscale-git-") as folder:
        lent = Path(folder)
        (lent / "refs").mkdir()
        (lent / "objects").mkdir()
        (lent / "HEAD").write_text(f"{commit}\n")
        for shared in index.parent.glob("sharedindex.*"):  # of a split index
            (lent / shared.name).symlink_to(shared)
        version = "[core]\n\trepositoryformatversion = 1\n[extensions]\n\tobjectFormat = sha256\n"
        (lent / "config").write_text(version if len(commit) == 64 else "")
        environment = {
            "GIT_DIR": folder,
            "GIT_WORK_TREE": top,
            "GIT_INDEX_FILE": str(index),
            "GIT_OBJECT_DIRECTORY": str(objects),
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_CONFIG_SYSTEM": os.devnull,
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_ATTR_NOSYSTEM": "1",
        }
        words = ["status", "--porcelain", "--untracked-files=no", "--ignore-submodules=all"]
        return bool(_git(words, environment, [f"{key}={value}" for key, value in switches.items()], folder=top))


def _git(words: list[str], environment: dict[str, str], switches: list[str] | None = None, folder: str = ".") -> str:
    """Return what git prints. Git's own variables are not handed on: they may name programs or repositories."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    clean |= {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "GIT_NO_LAZY_FETCH": "1", **environment}
    options = [word for switch in (*(switches or ()), *_OFF) for word in ("-c", switch)]
    command = ["git", "--no-pager", *options, *words]
    done = subprocess.run(
        command, cwd=folder, env=clean, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TIMEOUT_S, check=True
    )
    return os.fsdecode(done.stdout).removesuffix("\n")
