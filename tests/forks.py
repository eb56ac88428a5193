"""Runs of tlscale as forks of one process that has everything imported: an import of torch for each would take minutes.

`Forks` is for tests; below it is what the process behind it does, `python -m tests.forks`.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path

from tests.failing_disk import Failing, fail_here

REPO = Path(__file__).parent.parent
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.utime"}
HANGS = "hangs"


class Forks:
    """Starts `tlscale ...` without the seconds that an import takes. For one thread at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPO,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)},
            start_new_session=True,  # a Ctrl-C is for pytest, which ends this one
        )

    def start(
        self,
        *words,
        log: Path,
        die_at: int | None = None,
        within=(),
        signals=(),
        failing: Failing | None = None,
        **variables: str,
    ) -> int:
        """Start `tlscale words...`; the process id.

        Args:
            log: gets the output.
            die_at: the process kills itself before the n-th operation on a file below `within`; 0: it counts them, and
                writes their number to `<log>.count` in the end.
            signals: (part of a path, signal) in turn: before it opens such a file it sends itself the signal.
            failing: which operation on files fails; `<log>.trace` has all that were counted.
        """
        order = {"words": list(map(str, words)), "log": str(log), "die_at": die_at, "variables": variables}
        order["failing"] = None if failing is None else asdict(failing)
        return self._ask({**order, "within": list(map(str, within)), "signals": list(signals)})

    def wait(self, pid: int, timeout_s: float = 120) -> int | str:
        """Exit code, or minus the signal that ended it; one that hangs is killed, and that is said."""
        return self._ask({"wait": pid, "timeout_s": timeout_s})

    def run(self, *words, log: Path, **options) -> int | str:
        return self.wait(self.start(*words, log=log, **options))

    def close(self) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        assert self._process.wait(60) == 0

    def _ask(self, order: dict):
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


# --- The process behind it --------------------------------------------------------------------------------------------


def main() -> None:
    import tlscale.cli
    import tlscale.commands.run  # noqa: F401 (the import is what this process is for)

    _warm_up()
    # A fork has one thread: what another one held would be held for ever. PyArrow's allocator knows about forks.
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    assert len([name for name in threads if name != "jemalloc_bg_thd"]) == 1, threads
    alive: set[int] = set()
    try:
        for line in sys.stdin:
            order = json.loads(line)
            if "wait" in order:
                answer = _wait(order["wait"], order["timeout_s"])
                alive.discard(order["wait"])
            else:
                answer = os.fork()
                if not answer:
                    _be_a_run(order)
                alive.add(answer)
            print(json.dumps(answer), flush=True)
    finally:
        for pid in alive:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        gc.unfreeze()  # or modules of others would tell what they take for leaks


def _warm_up() -> None:
    """Do once what each fork would do again, and what no file that it writes depends on: half of a short run's time."""
    import timm

    from tlscale.models.partition.fingerprint import _source

    for name in ("test_vit", "test_resnet"):
        for module in timm.create_model(name).modules():
            _source(type(module))  # parses the files of torch and timm for the code of a class
    gc.collect()
    gc.freeze()  # a collection in a fork would go through, and copy, all that was imported


def _wait(pid: int, timeout_s: float) -> int | str:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.003)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return HANGS


def _be_a_run(order: dict) -> None:
    """What the program does from its start to its end, in this process."""
    code = 1
    try:
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for target in (1, 2):
            os.dup2(log, target)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(order["variables"])
        count = _watch_files(order)
        if order["failing"]:
            fail_here(Failing(**order["failing"]), Path(order["log"] + ".trace"))
        from tlscale.cli import main
        from tlscale.tracking.stopwatch import process_began_s

        try:
            main.main(order["words"], prog_name="tlscale", obj=process_began_s())  # as it is called as a program
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        atexit._run_exitfuncs()
        if order["die_at"] is not None:
            Path(order["log"] + ".count").write_text(str(count[0]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _watch_files(order: dict) -> list[int]:
    """Count operations on files, die before one of them, and send signals before others; the count so far."""
    count, signals, within = [0], list(order["signals"]), tuple(order["within"])

    def hook(event: str, args: tuple) -> None:
        if event not in FILE_EVENTS:
            return
        path = str(args[0])
        if event == "open" and signals and signals[0][0] in path:
            os.kill(os.getpid(), signal.Signals[signals.pop(0)[1]])
        # A tree is removed by names within open folders.
        if within and (path.startswith(within) or (event in ("os.remove", "os.rmdir") and args[1] != -1)):
            count[0] += 1
            if count[0] == order["die_at"]:
                os.kill(os.getpid(), signal.SIGKILL)

    if order["die_at"] is not None or signals:
        sys.addaudithook(hook)
    return count


if __name__ == "__main__":
    main()
