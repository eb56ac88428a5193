"""metrics.jsonl: flushed lines, valid JSON whatever the numbers, cut back on resume, whole after a crash."""

import json
import math
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlscale.errors import TlscaleError
from tlscale.tracking.metrics_log import MetricsFile, read_metrics


def record(step, kind="train", **figures):
    return {"kind": kind, "step": step, "epoch": step / 10, "images_seen": step * 8, "time_s": 0.5, **figures}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def test_every_record_is_on_the_disk_when_write_returns(path):
    with closing(MetricsFile(path)) as file:
        for step in range(3):
            file.write(record(step, loss=0.1))
            assert [r["step"] for r in read_metrics(path)] == list(range(step + 1))


def test_a_record_without_its_place_in_the_run_is_refused(path):
    with closing(MetricsFile(path)) as file, pytest.raises(AssertionError, match="images_seen"):
        file.write({"kind": "train", "step": 1, "epoch": 0.1, "time_s": 1.0})


def test_what_json_lacks_is_written_as_strings_that_float_reads(path):
    with closing(MetricsFile(path)) as file:
        file.write(record(1, a=math.nan, b=math.inf, c=-math.inf, nested={"d": [math.nan, 1.0]}))

    def refuse(constant):
        raise AssertionError(constant)

    found = json.loads(path.read_text(), parse_constant=refuse)
    assert (found["a"], found["b"], found["c"]) == ("NaN", "Infinity", "-Infinity")
    assert found["nested"] == {"d": ["NaN", 1.0]}
    assert math.isnan(float(found["a"]))
    assert (float(found["b"]), float(found["c"])) == (math.inf, -math.inf)


@given(st.floats())
def test_floats_come_back_bit_equal(tmp_path_factory, number):
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    with closing(MetricsFile(path)) as file:
        file.write(record(1, x=number))
    found = float(read_metrics(path)[0]["x"])
    assert found == number or (math.isnan(found) and math.isnan(number))


def test_resume_keeps_what_was_done_and_goes_on(path):
    with closing(MetricsFile(path)) as file:
        for step in (10, 20, 30):
            file.write(record(step))
        file.write(record(20, kind="evaluate"))
    with closing(MetricsFile(path)) as file:
        assert file.truncate_after(20) == {"train": 30, "evaluate": 20}
        file.write(record(30, again=True))
    assert [(r["kind"], r["step"]) for r in read_metrics(path)] == [
        ("train", 10),
        ("train", 20),
        ("evaluate", 20),
        ("train", 30),
    ]
    assert read_metrics(path)[-1]["again"] is True


@pytest.mark.parametrize(
    "torn", [b'{"kind": "train", "step": 3', b'{"kind": "train", "step": 3}', b"\0" * 40, b"\xff\n", b"[1]\n", b"7\n"]
)
def test_a_torn_last_line_is_dropped(path, torn):
    with closing(MetricsFile(path)) as file:
        file.write(record(1))
        file.write(record(2))
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    with closing(MetricsFile(path)) as file:
        assert file.truncate_after(100) == {"train": 2}
        assert path.read_bytes() == whole
        file.write(record(3))
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3]
    assert list(path.parent.iterdir()) == [path]


@given(steps=st.lists(st.integers(0, 50), max_size=12), after=st.integers(-1, 51), cut=st.integers(0, 40))
def test_cutting_anywhere_keeps_exactly_the_whole_early_records(tmp_path_factory, steps, after, cut):
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    with closing(MetricsFile(path)) as file:
        for step in steps:
            file.write(record(step))
    whole = path.read_bytes()
    content = whole[: len(whole) - min(cut, len(whole))]
    path.write_bytes(content)
    complete = steps[: content.count(b"\n")]
    with closing(MetricsFile(path)) as file:
        assert file.truncate_after(after) == ({"train": max(complete)} if complete else {})
    assert [r["step"] for r in read_metrics(path)] == [step for step in complete if step <= after]


def test_a_killed_writer_loses_nothing_that_was_written(path):
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from tlscale.tracking.metrics_log import MetricsFile\n"
        "file = MetricsFile(Path(sys.argv[1]))\n"
        "for step in range(5):\n"
        "    file.write({'kind': 'train', 'step': step, 'epoch': 0, 'images_seen': 0, 'time_s': 0})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", program, str(path)], check=False).returncode == -9
    assert len(read_metrics(path)) == 5


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_named():
    with closing(MetricsFile(Path("/dev/full"))) as file, pytest.raises(TlscaleError, match="/dev/full.*No space left"):
        file.write(record(1))
