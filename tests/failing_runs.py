"""One operation on files of one start fails, of any verb that writes: it must be said, and nothing be lost.

The rule: no traceback; exit code 1 and a message with the file and the reason, or success with nothing missing; and the
same line again, on a disk that is well, ends as if nothing had happened. A success may leave what the disk refused to
remove if it names it, and the same line again removes it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from tests.chaos.killing import assert_ended_as
from tests.failing_disk import Failing, read_trace
from tests.forks import Forks
from tests.small_runs import assert_same_bits, exported, result, small_recipe
from tlscale.errors import EXIT_BAD_INPUT, EXIT_FAILED

_PROBED = {"probe": {"kind": "ridge"}, "codes": {"layer": "penultimate"}}
_RECIPES = {
    # Codes, checkpoints, the best one of them, two stages, a moving average, export, predictions.
    "run": {
        "codes": {"keep": "always"},
        "checkpoint": {"every": "2 steps", "keep": 1},
        "evaluate": {"every": "3 steps"},
        "stages": [{"freeze": ".*", "duration": "3 steps", "lr": 5e-3}, {"duration": "3 steps"}],
        "optim": {"ema_decay": 0.9},
    },
    "probe": _PROBED,
    "codes": _PROBED,
    "compare": {"duration": "2 steps"},
}
VERBS = tuple(_RECIPES)
_REASONS = "Input/output error|No space left|disk is full|Disk quota|Read-only|os error"


class Job:
    """A verb with folders of its own, all that it writes to among them."""

    def __init__(self, folder: Path, verb: str, data: Path) -> None:
        folder.mkdir(parents=True)
        self.verb, self.folder, self.out, self.cache = verb, folder, folder / "run", folder / "cache"
        small_recipe(folder / "recipe.yaml", data, **_RECIPES[verb])
        (folder / "tmp").mkdir()
        self._starts = 0

    def start(self, forks: Forks, failing: Failing | None = None) -> tuple[int | str, str]:
        """Run it once; its exit code and what it said."""
        self._starts += 1
        log = self.folder / f"log{self._starts}"
        more = {"codes": (), "compare": ("--strategies", "scratch")}.get(self.verb, ())
        where = () if self.verb == "codes" else ("--out", self.out, "--resume")
        words = (self.verb, self.folder / "recipe.yaml", *more, *where)
        places = {"TLSCALE_CACHE": str(self.cache), "TMPDIR": str(self.folder / "tmp")}
        return forks.run(*words, log=log, failing=failing, **places), log.read_text()

    def failing(self, at: int = 0, name: str = "EIO", *, lasting: bool = False) -> Failing:
        return Failing([str(self.folder / name) for name in ("run", "cache", "tmp")], at, name, lasting)

    def trace(self) -> list[tuple[str, str, bool]]:
        """The operations on files of the last start, with paths below this folder."""
        found = read_trace(self.folder / f"log{self._starts}.trace")
        return [(call, str(Path(path).relative_to(self.folder)), failed) for call, path, failed in found]

    def assert_ended_as(self, whole: Job) -> None:
        """Nothing tells it from a job that met no failure."""
        match self.verb:
            case "run":
                assert_ended_as(whole.out, self.out)
            case "probe":
                assert_same_bits(exported(whole.out), exported(self.out))
                ends = [{key: result(job.out)[key] for key in ("top1", "loss", "confusion")} for job in (whole, self)]
                assert ends[0] == ends[1]
            case "compare":
                ends = [json.loads((job.out / "compare.json").read_text())["runs"] for job in (whole, self)]
                assert [(run["variant"], run["top1"]) for run in ends[0]] == [
                    (run["variant"], run["top1"]) for run in ends[1]
                ]
        assert _names(whole.out) == _names(self.out)
        if self.verb == "codes":
            assert _names(whole.cache / "codes") == _names(self.cache / "codes")


def _names(folder: Path) -> list[str]:
    """What is there, but for locks, logs of processes and checkpoints, whose own test is above."""
    found = (str(path.relative_to(folder)) for path in folder.rglob("*"))
    return sorted(name for name in found if not re.search(r"(^|/)(checkpoints|locks)/", name))


def site_of(call: str, path: str) -> str:
    """The place in the program that an operation comes from, about: without numbers and digests."""
    return f"{call} {re.sub(r'[0-9a-f]{16,}|[0-9]+|tmp[A-Za-z0-9]{6}', '*', path)}"


def first_and_last_of_each_site(trace: Sequence[tuple[str, str, bool]]) -> list[int]:
    """Numbers of operations, from 1."""
    places: dict[str, list[int]] = {}
    for number, (call, path, _) in enumerate(trace, start=1):
        places.setdefault(site_of(call, path), []).append(number)
    return sorted({number for numbers in places.values() for number in (numbers[0], numbers[-1])})


def faults_of(forks: Forks, job: Job, whole: Job, failing: Failing) -> tuple[str, list[str]]:
    """Start it with the failure, and again without.

    Returns:
        How the first start ended (success, error, or that nothing failed), and what is wrong.
    """
    code, said = job.start(forks, failing)
    if not any(failed for *_, failed in job.trace()):
        return "not reached", []
    wrong = ["a traceback"] if "Traceback" in said else []
    if code != 0:
        wrong += _faults_of_message(code, said, failing)
        again, then_said = job.start(forks)
        wrong += [] if again == 0 else [f"not resumed ({again}): {then_said[-500:]}"]
    elif left := _left_over(job, whole):
        wrong += [f"left, and not named: {name}" for name in left if f"{name}' cannot be removed" not in said]
        again, then_said = job.start(forks)
        wrong += [] if again == 0 else [f"not tidied ({again}): {then_said[-500:]}"]
    try:
        job.assert_ended_as(whole)
    except (AssertionError, OSError) as error:
        wrong.append(f"{'success' if code == 0 else 'the same line again'}, and not the same end: {error}"[:500])
    return "success" if code == 0 else "error", wrong


def _left_over(job: Job, whole: Job) -> list[str]:
    """What a success left besides, outermost folders alone."""
    more = sorted(set(_names(job.out)) - set(_names(whole.out)))
    return [name for name in more if not any(name.startswith(f"{above}/") for above in more)]


def _faults_of_message(code: int | str, said: str, failing: Failing) -> list[str]:
    # A run folder that is read-only from the start is a wrong argument.
    expected = (EXIT_FAILED, EXIT_BAD_INPUT) if failing.name == "EROFS" else (EXIT_FAILED,)
    last = [line for line in said.splitlines() if line.startswith("tlscale: ")][-1:]
    wrong = [] if code in expected else [f"exit code {code}"]
    if not last or not re.search(_REASONS, last[0]) or "'/" not in last[0]:
        wrong.append(f"a message without file or reason: {last or said[-300:]}")
    return wrong
