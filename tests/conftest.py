"""What holds for every test: no network, no home directory, and nothing left behind for the next test."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.forks import Forks

IDX_FILES = tuple(f"{split}-{what}-ubyte.gz" for split in ("train", "t10k") for what in ("images-idx3", "labels-idx1"))
# Keys and addresses that would take a test online, or let a result depend on who runs it.
_TAKEN_OUT = (
    "WANDB_API_KEY",
    "WANDB_BASE_URL",
    "WANDB_MODE",
    "HF_TOKEN",
    "HF_HOME",
    "HF_DATASETS_CACHE",
    "TLSCALE_DATA",
)
# A test may leave these set: the libraries named do so on import or first use, once a process.
_SET_BY_OTHERS = (
    "PYTEST_",
    "KMP_",  # scikit-learn
    "TORCHINDUCTOR_CACHE_DIR",  # torch, on the first look at the compiler
    "WANDB_SERVICE",  # wandb's background process
)


def _real_fashion_mnist_dirs() -> list[Path]:
    cache = Path(os.environ.get("TLSCALE_CACHE") or Path.home() / ".cache" / "tlscale")
    data = os.environ.get("TLSCALE_DATA")
    named = [Path(data) / "fashion-mnist", Path(data)] if data else []
    return [*named, cache / "data" / "fashion-mnist", Path("/usr/share/datasets/fashion-mnist")]


# Looked up before the home directory is taken away. Test processes that xdist starts inherit an environment in which it
# already is, so the first process hands the answer down.
_HANDED_DOWN = "TLSCALE_TESTS_FASHION_MNIST"


def pytest_configure(config: pytest.Config) -> None:
    """Give this test process a home of its own and take it off the network, before anything else is imported."""
    if _HANDED_DOWN not in os.environ:
        found = [folder for folder in _real_fashion_mnist_dirs() if all((folder / f).is_file() for f in IDX_FILES)]
        os.environ[_HANDED_DOWN] = str(found[0]) if found else ""
    home = Path(tempfile.mkdtemp(prefix="tlscale-tests-"))
    config.add_cleanup(lambda: shutil.rmtree(home, ignore_errors=True))
    for key in _TAKEN_OUT:
        os.environ.pop(key, None)
    os.environ.update(
        HOME=str(home),
        TLSCALE_CACHE=str(home / "tlscale"),
        # huggingface_hub and datasets read these once, on import.
        HF_HUB_OFFLINE="1",
        HF_DATASETS_OFFLINE="1",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        # wandb would send its own errors home.
        WANDB_ERROR_REPORTING="false",
    )


@pytest.fixture(autouse=True)
def _leaves_nothing_behind() -> Iterator[None]:
    """Fail a test that leaves an environment variable changed or a process group open; repair both for the next.

    Accelerate keeps the state of the process (device, precision) in class attributes; a test starts without it.
    """
    before = dict(os.environ)
    yield
    left = _changed_environment(before)
    for key in left:
        if key in before:
            os.environ[key] = before[key]
        else:
            del os.environ[key]
    group_open = _close_process_group()
    _forget_accelerate()
    assert not left, f"the test left environment variables changed: {left}; use monkeypatch.setenv"
    assert not group_open, "the test left a torch.distributed process group open"


def _changed_environment(before: dict[str, str]) -> list[str]:
    names = before.keys() | os.environ.keys()
    changed = (name for name in names if before.get(name) != os.environ.get(name))
    return sorted(name for name in changed if not name.startswith(_SET_BY_OTHERS))


def _close_process_group() -> bool:
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return False
    distributed.destroy_process_group()
    return True


def _forget_accelerate() -> None:
    state = sys.modules.get("accelerate.state")
    if state is not None:
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


@pytest.fixture(scope="session")
def fashion_mnist_dir() -> Path:
    """The folder with the four real gzipped IDX files of Fashion-MNIST; skips where they are not on this machine."""
    found = os.environ.get(_HANDED_DOWN)
    if not found:
        pytest.skip("the files of Fashion-MNIST are not on this machine; scripts/get_fashion_mnist.sh fetches them")
    return Path(found)


@pytest.fixture(scope="module")
def idx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set of real images as IDX files; a test that changes it takes a copy."""
    from tests.small_runs import put_small_idx  # imports torch, which must find the environment that is set above

    return put_small_idx(tmp_path_factory.mktemp("idx"))


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    """Starts runs without the seconds that an import takes."""
    from tests.forks import Forks  # inherits the environment that is set above

    forks = Forks()
    yield forks
    forks.close()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("a small file system cannot be mounted here (not root?)")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)
