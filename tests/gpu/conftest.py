"""Tests of a GPU: skipped where there is none, unless TLSCALE_GPU_TESTS=cpu asks for them at toy size on a CPU.

With TLSCALE_GPU_RESULTS=FILE each outcome is appended to that file, and a test that has passed by it is left out:
scripts/gpu_kit.sh goes on where its time was up.
"""

import json
import os
from pathlib import Path

import pytest
import torch

_RESULTS = os.environ.get("TLSCALE_GPU_RESULTS")


def _passed() -> set[str]:
    if _RESULTS is None or not Path(_RESULTS).exists():
        return set()
    lines = [json.loads(line) for line in Path(_RESULTS).read_text().splitlines()]
    return {line["test"] for line in lines if line["outcome"] in ("passed", "skipped")}


@pytest.fixture(autouse=True)
def environment_as_before():
    """Put back what libraries of a GPU write into the environment: torch's compiler and Triton name their folders."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def pytest_collection_modifyitems(config, items) -> None:
    passed = _passed()
    here = [item for item in items if item.path.parent == Path(__file__).parent]
    done = [item for item in here if item.name in passed]
    if done:
        config.hook.pytest_deselected(items=done)
        items[:] = [item for item in items if item not in done]
    if not torch.cuda.is_available() and os.environ.get("TLSCALE_GPU_TESTS") != "cpu":
        for item in here:
            item.add_marker(pytest.mark.skip(reason="needs a GPU (TLSCALE_GPU_TESTS=cpu: at toy size without one)"))


def pytest_runtest_logreport(report) -> None:
    # Where pytest-xdist runs them, each line is written by the process that gathers the reports, and once.
    if _RESULTS is None or "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and report.passed):
        return
    line = {"test": report.nodeid.split("::")[-1], "outcome": report.outcome, "seconds": round(report.duration, 1)}
    if report.failed:
        line["why"] = str(report.longrepr)[-3000:]
    elif report.skipped:
        line["why"] = str(report.longrepr[-1])
    with Path(_RESULTS).open("a") as file:
        file.write(json.dumps(line) + "\n")
