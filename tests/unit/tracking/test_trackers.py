"""Trackers with the real libraries: what W&B and TensorBoard wrote is read back, and failures do not end a run."""

import contextlib
import http.server
import json
import math
import os
import pty
import re
import sqlite3
import subprocess
import sys
import threading

import pytest

from tests.small_runs import REPO
from tests.wandb_records import BLOCK, CHUNK, HEADER, OfflineRun, offline_runs, payloads
from tlscale.errors import EXIT_BAD_INPUT, EXIT_STOPPED, RecipeError
from tlscale.recipe.schema import WandbSection
from tlscale.tracking.trackers import open_trackers

CANARY = "canary0123456789abcdef0123456789abcdef00"  # 40 characters, as an API key has

# Each segment of a W&B run is a process of its own: W&B keeps a service and settings for the life of a process.
SEGMENT = """
import json, os, sys
from pathlib import Path
from tlscale.recipe.schema import WandbSection
from tlscale.tracking.trackers import open_trackers

plan = json.loads(Path(sys.argv[1]).read_text())
before = dict(os.environ)
trackers = open_trackers(
    ["wandb"], wandb=WandbSection(**plan.get("section", {})), run_name="resnet", run_dir=Path(plan["run_dir"]),
    config=plan.get("config", {}), wandb_run_id=plan.get("run_id"), is_main=True, seen=plan.get("seen"),
)
print("print of the program")
for step, record in plan.get("records", []):
    trackers.log(record, step)
exec(plan.get("then", ""))
trackers.summary(plan.get("summary", {}))
trackers.close(plan.get("exit_code", 0))
trackers.close(1)
trackers.log({"train/loss": 0.0}, 10**6)
left = {key for key in os.environ if key not in before} - {"WANDB_SERVICE"}  # that one is W&B's own
Path(plan["out"]).write_text(json.dumps(
    {"notes": trackers.notes, "run_id": trackers.wandb_run_id, "left": sorted(left)}))
"""


@pytest.fixture
def segment(tmp_path):
    """Runs a segment in a clean home; gives what it reported, and its output as `stderr`."""
    for name in ("home", "tmp", "run"):
        (tmp_path / name).mkdir()

    def run(environment=None, on_terminal=False, arguments=(), folder=None, **plan):
        plan_file, out = tmp_path / "plan.json", tmp_path / "out.json"
        plan_file.write_text(json.dumps({"run_dir": str(tmp_path / "run"), "out": str(out), **plan}))
        clean = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
        clean |= {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp"), **(environment or {})}
        terminal = pty.openpty() if on_terminal else None
        done = subprocess.run(
            [sys.executable, "-c", SEGMENT, str(plan_file), *arguments],
            env={**clean, "PYTHONPATH": str(REPO)},
            cwd=folder,
            stdin=terminal[1] if terminal else subprocess.DEVNULL,
            stdout=terminal[1] if terminal else subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
        for end in terminal or ():
            os.close(end)
        assert done.returncode == 0, done.stderr
        return {**json.loads(out.read_text()), "stderr": done.stderr}

    return run


def assert_nothing_holds(folder, secret):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    assert [path for path in files if secret.encode() in path.read_bytes()] == []


def files_below(folder):
    return [path for path in folder.rglob("*") if not path.is_dir()]


@pytest.mark.slow
def test_an_offline_run_in_two_segments_read_back_record_by_record(segment, tmp_path):
    config = {
        "name": "resnet",
        "optim": {"name": "adamw", "lr": 1e-3},
        "data": {"path": f"https://user:{CANARY}@host.example/data"},
        "run": {"git_sha": "0123abc", "world_size": 2, "versions": {"torch": "2.15"}},
    }
    # More than one block of the file, so that its records are cut into chunks too.
    first_records = [(step, {"train/loss": 1 / step, "train/lr": 1e-3}) for step in range(1, 301)]
    secret = {"HUB_TOKEN": CANARY, "AWS_SECRET_ACCESS_KEY": CANARY}
    first = segment(
        environment=secret,
        on_terminal=True,  # where W&B would ask for a key
        arguments=("--password", CANARY),
        config=config,
        records=[*first_records, (300, {"evaluate/top1": 0.5, "evaluate/loss": float("nan")})],
        exit_code=EXIT_STOPPED,
    )
    # Resumed from a checkpoint of step 290: 291 to 300 come again, and only what is new is sent.
    second = segment(
        environment=secret,
        config=config,
        run_id=first["run_id"],
        seen={"train": 300, "evaluate": 300},
        records=[(step, {"train/loss": 1 / step}) for step in range(291, 311)],
        summary={"top1": 0.91, "split": "test", "confusion": [[1]], "data": f"s3://u:{CANARY}@h"},
    )

    runs = offline_runs(tmp_path / "run")
    assert len(runs) == 2
    assert runs[0].path.stat().st_size > BLOCK
    assert re.fullmatch(r"[a-z0-9]{8}", first["run_id"])
    assert second["run_id"] == first["run_id"]
    assert [run.run.run_id for run in runs] == [first["run_id"]] * 2
    assert all(run.run.resume and run.run.project == "tlscale" and run.run.display_name == "resnet" for run in runs)

    for run in runs:
        assert run.config["name"] == "resnet"
        assert run.config["optim"] == {"name": "adamw", "lr": 1e-3}
        assert run.config["run"] == {"git_sha": "0123abc", "world_size": 2, "versions": {"torch": "2.15"}}
        assert run.config["data"] == {"path": "https://host.example/data"}
        assert {metric.glob_name or metric.name: metric.step_metric for metric in run.metrics} == {
            "trainer/step": "",
            "*": "trainer/step",
        }

    rows = [row for run in runs for row in run.rows()]
    assert rows[:300] == [{**record, "trainer/step": step} for step, record in first_records]
    assert math.isnan(rows[300].pop("evaluate/loss"))
    assert rows[300] == {"evaluate/top1": 0.5, "trainer/step": 300}
    assert rows[301:] == [{"train/loss": 1 / step, "trainer/step": step} for step in range(301, 311)]
    train_steps = [row["trainer/step"] for row in rows if "train/loss" in row]
    assert train_steps == list(range(1, 311))

    assert [run.exit_code for run in runs] == [EXIT_STOPPED, 0]
    assert ["preempting" in run.kinds for run in runs] == [True, False]
    assert runs[1].summary["top1"] == 0.91
    assert runs[1].summary["split"] == "test"
    assert runs[1].summary["data"] == "s3://h"
    assert "confusion" not in runs[1].summary

    for run in runs:
        # No argv, host, git, code, console or packages; what is left are figures and W&B's own bookkeeping.
        assert set(run.kinds) <= {
            *("header", "run", "telemetry", "stats", "metric", "summary", "history", "exit", "preempting"),
        }
        assert run.run.host == "-"
        assert not run.run.HasField("git")
    assert_nothing_holds(tmp_path / "run", CANARY)
    assert files_below(tmp_path / "home") == []
    assert files_below(tmp_path / "tmp") == []
    assert first["left"] == second["left"] == []
    assert len(first["notes"]) == 1
    assert "offline (nobody is logged in)" in first["notes"][0]
    assert f"wandb sync {runs[0].path.parent}" in first["notes"][0]
    assert first["stderr"] == second["stderr"] == ""


def test_without_a_network_the_run_is_recorded_offline(segment, tmp_path):
    report = segment(
        environment={
            "WANDB_BASE_URL": "http://127.0.0.1:9",  # nobody listens
            "WANDB_API_KEY": CANARY,
            "WANDB_INIT_TIMEOUT": "1",
        },
        records=[(1, {"train/loss": 0.5})],
    )
    (run,) = offline_runs(tmp_path / "run")
    assert run.rows() == [{"train/loss": 0.5, "trainer/step": 1}]
    assert run.run.run_id == report["run_id"]
    assert len(report["notes"]) == 1
    assert "the start online failed" in report["notes"][0]
    assert_nothing_holds(tmp_path / "run", CANARY)
    assert files_below(tmp_path / "home") == []


@pytest.fixture
def listener():
    """A server that answers nothing; its address, and what it was sent."""
    heard = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            heard.append(f"{self.requestline}\n{self.headers}")
            self.send_error(404)

        do_GET = do_HEAD = do_CONNECT = do_POST

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", heard
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", ".wandb"])
def test_settings_in_the_working_folder_do_not_get_the_key(segment, tmp_path, listener, name):
    address, heard = listener
    own = tmp_path / "home" / ".config" / "wandb" / "settings"
    folder = tmp_path / "unpacked"
    for path, base_url in ((own, "http://127.0.0.1:9"), (folder / name / "settings", address)):
        path.parent.mkdir(parents=True)
        path.write_text(f"[default]\nbase_url = {base_url}\n")
    (folder / "config-defaults.yaml").write_text("planted: {value: 1}\n")
    report = segment(
        environment={"WANDB_API_KEY": CANARY, "WANDB_INIT_TIMEOUT": "1"},
        folder=folder,
        records=[(1, {"train/loss": 0.5})],
    )
    assert heard == []
    assert [f"{name}/settings, config-defaults.yaml (base_url)" in note for note in report["notes"]] == [True, False]
    assert "the start online failed" in report["notes"][1]
    assert report["left"] == []
    (run,) = offline_runs(tmp_path / "run")
    assert run.rows() == [{"train/loss": 0.5, "trainer/step": 1}]
    assert "planted" not in run.config
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == ["config-defaults.yaml", "settings"]


def test_a_wish_to_stay_offline_in_the_working_folder_is_heard(segment, tmp_path, listener):
    address, heard = listener
    (tmp_path / "here" / "wandb").mkdir(parents=True)
    (tmp_path / "here" / "wandb" / "settings").write_text("[default]\nmode = offline\n")
    report = segment(environment={"WANDB_API_KEY": CANARY, "WANDB_BASE_URL": address}, folder=tmp_path / "here")
    assert heard == []
    assert "offline (W&B's settings in the working folder ask for it)" in report["notes"][-1]


def test_what_the_user_says_of_places_holds_beside_such_settings(segment, tmp_path):
    """Relative places are those below the working folder, although W&B is started elsewhere then."""
    (tmp_path / "here" / "wandb").mkdir(parents=True)
    (tmp_path / "here" / "wandb" / "settings").write_text("[default]\nbase_url = http://127.0.0.1:1\n")
    (tmp_path / "here" / "mine").mkdir()
    (tmp_path / "here" / "mine" / "settings").write_text("[default]\nmode = offline\n")
    report = segment(environment={"WANDB_API_KEY": CANARY, "WANDB_CONFIG_DIR": "mine"}, folder=tmp_path / "here")
    assert "offline (W&B's settings ask for it)" in report["notes"][-1]


def test_no_secret_is_in_the_name_the_tags_or_the_team(segment, tmp_path):
    section = {
        "entity": f"https://me:{CANARY}@host/team",
        "tags": [f"https://h/x?token={CANARY}", f"api_key={CANARY}", "plain"],
    }
    segment(section=section, config={"wandb": section})
    (run,) = offline_runs(tmp_path / "run")
    assert list(run.run.tags) == ["https://h/x?token=[redacted]", "api_key=[redacted]", "plain"]
    assert_nothing_holds(tmp_path / "run", CANARY)


@pytest.mark.slow
def test_when_the_service_dies_training_goes_on_and_it_is_said_once(segment):
    report = segment(
        records=[(1, {"train/loss": 0.5})],
        then=(
            "import psutil, signal, time\n"
            "(core,) = [child.pid for child in psutil.Process().children() if 'wandb-core' in child.name()]\n"
            "os.kill(core, signal.SIGKILL)\n"
            "time.sleep(0.5)\n"
            "for step in (2, 3, 4): trackers.log({'train/loss': 0.4}, step)\n"
        ),
    )
    assert len(report["notes"]) == 2
    assert "W&B failed while logging and is switched off (ConnectionResetError" in report["notes"][1]
    assert "metrics.jsonl has everything" in report["notes"][1]
    assert "Traceback" not in report["stderr"]


def test_who_decides_the_mode(tmp_path):
    program = """
import json, os, sys
from tlscale.recipe.schema import WandbSection
from tlscale.tracking.wandb_tracker import _mode
import wandb
found = []
for mode, environment in json.loads(sys.argv[1]):
    os.environ.update(environment)
    found.append(_mode(WandbSection(mode=mode))[0])
    for key in environment:
        del os.environ[key]
print(json.dumps(found))
"""
    key, netrc, broken = {"WANDB_API_KEY": CANARY}, {"NETRC": str(tmp_path / "netrc")}, {"WANDB_API_KEY": "short"}
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1:9\n  login user\n  password {CANARY}\n")
    cases = [
        ("auto", {}, "offline"),
        ("auto", key, "online"),
        ("auto", netrc, "online"),
        ("auto", broken, "offline"),
        ("online", {}, "offline"),  # asking for a key is no way out
        ("online", key, "online"),
        ("offline", key, "offline"),
        ("auto", {**key, "WANDB_MODE": "offline"}, "offline"),
        ("online", {**key, "WANDB_MODE": "offline"}, "offline"),
        ("offline", {**key, "WANDB_MODE": "online"}, "online"),
        ("online", {**key, "WANDB_MODE": "disabled"}, "disabled"),
    ]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_") and name != "NETRC"}
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps([case[:2] for case in cases])],
        env={**clean, "HOME": str(tmp_path), "WANDB_BASE_URL": "http://127.0.0.1:9"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert json.loads(done.stdout) == [case[2] for case in cases]
    assert CANARY not in done.stdout + done.stderr


# --- The reader itself ------------------------------------------------------------------------------------------------


def log_of(contents, block=BLOCK):
    """A log with these payloads, written by the rules of the format."""
    import zlib

    data = bytearray(HEADER.pack(b":W&B", 0xBEE1, 0))
    for content in contents:
        kinds, first = [], True
        while first or content:
            left = block - len(data) % block
            if left < CHUNK.size:
                data += bytes(left)
                continue
            part, content = content[: left - CHUNK.size], content[left - CHUNK.size :]
            kind = (1 if first else 4) if not content else (2 if first else 3)
            kinds.append(kind)
            data += CHUNK.pack(zlib.crc32(bytes([kind]) + part), len(part), kind) + part
            first = False
    return bytes(data)


def test_the_reader_joins_chunks_and_sees_damage(tmp_path):
    contents = [b"a" * 10, b"b" * 100_000, b"", b"c" * (BLOCK - 20), b"d" * 5000, b"e" * 40_000]
    path = tmp_path / "run.wandb"
    whole = log_of(contents)
    path.write_bytes(whole)
    assert list(payloads(path)) == contents
    for damaged in (whole[:-1], b"x" + whole[1:], whole[:50_000] + b"?" + whole[50_001:], whole[: 2 * BLOCK]):
        path.write_bytes(damaged)
        with pytest.raises(AssertionError):
            list(payloads(path))


def test_a_real_file_has_records_in_several_blocks(segment, tmp_path):
    segment(records=[(1, {"train/loss": 0.5})], config={"long": "x" * 3 * BLOCK})
    (run,) = offline_runs(tmp_path / "run")
    assert run.path.stat().st_size > 3 * BLOCK
    assert isinstance(run, OfflineRun)
    assert run.config["long"] == "x" * 3 * BLOCK


# --- Others -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def partial_state():
    """Accelerate keeps the state of the process for ever; leave it as it was."""
    from accelerate import PartialState

    was_set = PartialState._shared_state != {}
    yield
    if not was_set:
        PartialState._reset_state()


def start(names, run_dir, **changes):
    options = {"wandb": None, "run_name": "resnet", "config": {}, "wandb_run_id": None, "is_main": True}
    return open_trackers(names, run_dir=run_dir, **{**options, **changes})


@pytest.mark.usefixtures("partial_state")
def test_tensorboard_holds_every_figure_and_no_secret(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = {"optim": {"lr": 0.1, "betas": [0.9, 0.99], "clip": None}, "path": f"s3://u:{CANARY}@h/x"}
    trackers = start(["tensorboard"], tmp_path, config=config, seen={"train": 10})
    for step in (10, 20, 30):
        trackers.log({"train/loss": 1 / step, "evaluate/top1": step / 100}, step)
    trackers.summary({"top1": 0.9, "split": "test"})
    trackers.close()
    assert trackers.notes == []
    assert trackers.wandb_run_id is None

    assert [path.name for path in tmp_path.iterdir()] == ["tensorboard"]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    loss = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert loss == [(20, pytest.approx(1 / 20)), (30, pytest.approx(1 / 30))]
    assert [event.step for event in events.Scalars("evaluate/top1")] == [10, 20, 30]
    assert [(event.step, event.value) for event in events.Scalars("final/top1")] == [(30, pytest.approx(0.9))]
    (hparams,) = (tmp_path / "tensorboard").rglob("hparams.yml")
    assert "optim.lr: 0.1" in hparams.read_text()
    assert_nothing_holds(tmp_path, CANARY)


# What these write locally is a database in the run folder; the query gives its rows of figures.
LOCAL = {
    "mlflow": ("mlflow.db", "select key, value, step from metrics order by step, key"),
    "trackio": ("tlscale.db", "select metrics, step from metrics order by step, id"),
}
LOGGED = {"train/loss": [(1.5, 1), (1.25, 2)], "final/top1": [(0.5, 2)]}


@pytest.mark.parametrize("name", LOCAL)
def test_mlflow_and_trackio_hold_every_figure_in_the_run_folder(name, tmp_path):
    """With the packages of the extra `trackers`; a process of its own, as they keep state for the life of one."""
    pytest.importorskip(name)
    (tmp_path / "run").mkdir()
    program = (
        "import sys; from pathlib import Path; from tlscale.tracking.trackers import open_trackers\n"
        "trackers = open_trackers([sys.argv[1]], wandb=None, run_name='resnet', run_dir=Path(sys.argv[2]),\n"
        "    config={'optim': {'lr': 0.1}}, wandb_run_id=None, is_main=True)\n"
        "trackers.log({'train/loss': 1.5}, 1); trackers.log({'train/loss': 1.25}, 2)\n"
        "trackers.summary({'top1': 0.5}); trackers.close(0)\n"
        "assert not trackers.notes, trackers.notes\n"
    )
    environment = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", program, name, str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    file, query = LOCAL[name]
    with contextlib.closing(sqlite3.connect(tmp_path / "run" / name / file)) as database:
        rows = database.execute(query).fetchall()
    if name == "trackio":  # one JSON object a row
        rows = [(key, value, step) for text, step in rows for key, value in json.loads(text).items()]
    held = {key: [(value, step) for found, value, step in rows if found == key] for key in LOGGED}
    assert held == LOGGED


@pytest.mark.usefixtures("partial_state")
def test_a_tracker_that_cannot_start_is_off_and_the_run_goes_on(tmp_path):
    (tmp_path / "tensorboard").write_text("in the way")
    said = []
    trackers = start(["tensorboard"], tmp_path, say=said.append)
    trackers.log({"train/loss": 1.0}, 1)
    trackers.close()
    assert len(trackers.notes) == 1
    assert trackers.notes[0].startswith("tensorboard could not be started, so it is off for this run (FileExistsError")
    assert said == trackers.notes


@pytest.mark.parametrize("is_main", [True, False])
def test_a_missing_package_is_an_error_on_every_process(tmp_path, is_main):
    with pytest.raises(RecipeError, match=r"track: names aim and dvclive.*pip install aim dvclive") as caught:
        start(["tensorboard", "aim", "dvclive"], tmp_path, is_main=is_main)
    assert caught.value.exit_code == EXIT_BAD_INPUT
    assert list(tmp_path.iterdir()) == []


def test_other_processes_track_nothing(tmp_path):
    trackers = start(["wandb", "tensorboard"], tmp_path, wandb=WandbSection(), wandb_run_id="abcd1234", is_main=False)
    trackers.log({"train/loss": 1.0}, 1)
    trackers.summary({"top1": 1.0})
    trackers.close()
    assert list(tmp_path.iterdir()) == []
    assert trackers.notes == []
    assert trackers.wandb_run_id == "abcd1234"


def test_no_trackers(tmp_path):
    trackers = start([], tmp_path)
    trackers.log({"train/loss": 1.0}, 1)
    trackers.close(1)
    assert (trackers.notes, trackers.wandb_run_id) == ([], None)
