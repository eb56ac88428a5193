"""Kill -9 while codes are computed: nothing half is read, and the next run ends with the files of a clean one."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.small_runs import environment

NUM_IMAGES, NUM_SHARDS = 300, 5
# One process, which has everything loaded, forks each run: an import of torch for each would take minutes. A victim
# ends itself at its n-th operation on a file, or is killed from outside after some seconds.
DRIVER = """
import hashlib, json, os, signal, sys, time, traceback
from dataclasses import replace
from pathlib import Path
from tests.unit.codes.test_extract import KEY, Run, Tiny

ROWS = range(int(sys.argv[1]))
FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.utime"}

class Slow(Tiny):
    def forward(self, images):
        for _ in range(4):  # long enough to be hit in the middle
            super().forward(images.repeat(4, 1, 1, 1))
        self.sizes.clear()
        return super().forward(images)

def fork(job):
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return pid, os.fdopen(read)
    try:
        os.close(read)
        sys.stdout = open(os.devnull, "w")
        os.write(write, json.dumps(job()).encode())
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)

def run(root, module):
    codes = Run(Path(root), module=module, shard_bytes=1)(ROWS)
    values = hashlib.sha256(b"".join(value.numpy().tobytes() for value in codes.take(list(ROWS)))).hexdigest()
    return {"num_computed": codes.num_computed, "values": values}

def die_at(root, number):
    count = 0
    def hook(event, args):
        nonlocal count
        if event in FILE_EVENTS and str(args[0]).startswith(root):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    run(root, Tiny())
    return count

for line in sys.stdin:
    order = json.loads(line)
    root = order["root"]
    job = {
        "run": lambda: run(root, Slow()),
        "run fast": lambda: run(root, Tiny()),
        "die": lambda: die_at(root, order["at"]),
    }[order["job"]]
    began = time.monotonic()
    pid, answer = fork(job)
    if order.get("kill_after_s") is not None:
        time.sleep(order["kill_after_s"])
        os.kill(pid, signal.SIGKILL)
    text = answer.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    wall_s = time.monotonic() - began
    print(json.dumps({"status": status, "answer": json.loads(text) if text else None, "wall_s": wall_s}), flush=True)
"""


@pytest.fixture(scope="module")
def order():
    """Has the driver do something: `order(root, job, ...)`."""
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(NUM_IMAGES)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )

    def give(root: Path, job: str, **more):
        process.stdin.write(json.dumps({"root": str(root), "job": job, **more}) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield give
    process.stdin.close()
    process.stdout.close()
    assert process.wait(30) == 0


@pytest.fixture(scope="module")
def clean(order, tmp_path_factory):
    """A run that nobody disturbed: its files, its answer, its time."""
    root = tmp_path_factory.mktemp("clean")
    done = order(root, "run")
    assert done["answer"]["num_computed"] == NUM_IMAGES
    files = files_of(root)
    assert len([name for name in files if name.endswith(".json")]) == NUM_SHARDS
    return files, done["answer"]["values"], done["wall_s"]


def files_of(root):
    """All files but the empty lock of a request: that of a killed run goes when another one looks at the entry."""
    files = {str(path.relative_to(root)): path for path in sorted(root.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith("locks/") or "." not in name}


def num_finished(root):
    """Shards that a killed run finished."""
    return len(list(root.glob("*/[0-9a-f]*.json")))


def assert_finishes_as_a_clean_run(order, root, clean):
    files, values, _ = clean
    finished = num_finished(root)
    answer = order(root, "run fast")["answer"]
    assert answer["values"] == values
    assert files_of(root) == files
    assert (answer["num_computed"] < NUM_IMAGES) == (finished > 0)
    assert NUM_IMAGES - 64 * finished <= answer["num_computed"] <= NUM_IMAGES - 64 * finished + 64


def test_killed_at_ten_random_moments(order, clean, tmp_path):
    draw = random.Random(7)
    in_the_middle = 0
    for number in range(60):
        if number >= 10 and in_the_middle >= 3:
            break  # on a busy machine some come too early or too late
        root = tmp_path / str(number)
        root.mkdir()
        moment_s = draw.uniform(0.0, clean[2])
        killed = order(root, "run", kill_after_s=moment_s)
        assert killed["status"] in (-9, 0)
        in_the_middle += killed["status"] == -9 and 0 < num_finished(root) < NUM_SHARDS
        assert_finishes_as_a_clean_run(order, root, clean)
        assert order(root, "run fast")["answer"]["num_computed"] == 0
    assert in_the_middle >= 3


def test_killed_again_and_again(order, clean, tmp_path):
    draw = random.Random(8)
    for _ in range(5):
        order(tmp_path, "run", kill_after_s=draw.uniform(0.1, 0.5) * clean[2])
    assert num_finished(tmp_path) > 0
    assert_finishes_as_a_clean_run(order, tmp_path, clean)


def test_killed_before_every_operation_on_a_file(order, clean, tmp_path):
    (tmp_path / "count").mkdir()
    total = order(tmp_path / "count", "die", at=0)["answer"]
    assert total > 5 * NUM_SHARDS
    # The first shards and the end; what is between is like the first shard.
    for at in [*range(1, 17), *range(total - 17, total + 1)]:
        root = tmp_path / str(at)
        root.mkdir()
        assert order(root, "die", at=at)["status"] == -9
        assert_finishes_as_a_clean_run(order, root, clean)
