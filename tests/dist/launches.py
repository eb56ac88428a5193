"""Several processes, started as users start them, and what is done with the folders that they leave."""

import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.small_runs import REPO, as_after, environment

BIN = Path(sys.executable).parent


@contextmanager
def launch(processes, *words, log, launcher="accelerate", cpu="true", kind=("--multi_gpu",), **changes):
    """Within: `words`, started by a launcher, its output in the file `log`; ended, if it still runs, afterwards."""
    if launcher == "accelerate":
        command = ["accelerate", "launch", *kind, "--num_processes", processes, "--main_process_port", "0"]
    else:
        command = ["torchrun", "--standalone", "--nproc-per-node", processes]
    changes |= {"ACCELERATE_USE_CPU": cpu} if cpu else {}
    with log.open("w") as file:
        launched = subprocess.Popen(
            [BIN / command[0], *map(str, command[1:]), *map(str, words)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment(**changes),
            cwd=REPO,
        )
    try:
        yield launched
    finally:
        if launched.poll() is None:
            launched.terminate()  # the launcher ends its workers, which are not of its process group
            launched.wait(60)


def exit_code_of(launched, log, timeout_s=280):
    """Waits; a launch that hangs is a failure."""
    try:
        return launched.wait(timeout_s)
    except subprocess.TimeoutExpired:
        pytest.fail(f"hangs: {log.read_text()[-3000:]}")


def facts_of(processes, script, folder, *words, timeout_s=280, **options):
    """Runs a script of this folder to its end: what each rank wrote to `facts<rank>.json` in `folder`, by rank."""
    log = folder / "log"
    with launch(processes, REPO / "tests" / "dist" / script, folder, *words, log=log, **options) as launched:
        exit_code = exit_code_of(launched, log, timeout_s)
    assert exit_code == 0, log.read_text()[-5000:]
    facts = [json.loads((folder / f"facts{rank}.json").read_text()) for rank in range(processes)]
    assert [fact["world_size"] for fact in facts] == [processes] * processes
    assert [fact["rank"] for fact in facts] == list(range(processes))
    return facts


def workers_of(launcher):
    """rank -> process id of a launcher's workers."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            variables = (entry / "environ").read_bytes().split(b"\0")
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        ranks = [variable for variable in variables if variable.startswith(b"RANK=")]
        if parent == launcher and ranks:
            found[int(ranks[0][5:])] = int(entry.name)
    return found


def back_at_first_checkpoint(done, out):
    """A copy of a complete run as it was after its first checkpoint."""
    first = min((done / "checkpoints").glob("step_*"))
    as_after(int(first.name[5:]), done, out)
    for pointer in ("LATEST", "BEST"):
        (out / "checkpoints" / pointer).write_text(first.name + "\n")
    return out
