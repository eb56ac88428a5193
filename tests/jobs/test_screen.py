"""What the commands show on 80 columns, on a terminal and in a file; and life from the first second."""

import os
import re
import subprocess
import sys

import pytest
from click.testing import CliRunner

import tlscale
from tests.small_runs import put_small_folder, small_recipe
from tests.terminals import on_a_terminal
from tlscale.cli import main
from tlscale.codes import near_duplicates
from tlscale.errors import EXIT_BAD_INPUT, EXIT_STOPPED
from tlscale.tracking import progress

TERMINAL = {"FORCE_COLOR": "1", "TERM": "xterm"}
FROZEN = r"(conv1|bn1|layer[12])\..*"
CODES = {"codes": {"keep": "always"}, "backbone": {"name": "test_resnet", "weights": "none", "in_chans": 1}}


def show(*words, **variables):
    done = CliRunner(env={"COLUMNS": "80", **variables}).invoke(main, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done


@pytest.mark.parametrize("screen", ["file", "terminal"])
def test_tables_fit_80_columns(screen, idx, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "r.yaml"
    small_recipe(recipe, idx, name="a_long_name_of_a_recipe", duration="2 steps", freeze=FROZEN, **CODES)
    commands = {
        "run": ("run", recipe, "--out", "run"),
        "plan": ("plan", recipe),
        "evaluate": ("evaluate", "run"),
        "compare": ("compare", "run"),
        "codes": ("codes", "list"),
    }
    for name, words in commands.items():
        said = show(*words, **(TERMINAL if screen == "terminal" else {})).stdout
        lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said))
        tables = lines if screen == "terminal" else [line for line in lines if line.startswith(" ")]
        assert max(map(len, tables)) <= 80, name
        assert any("──" in line for line in tables), f"{name} has a table"


WORK = {
    "codes": (
        {"freeze": FROZEN, **CODES, "duration": "2 steps"},
        ("scanning .*train", "codes of train", "codes of validation", "evaluating"),
    ),
    "images": ({"duration": "1 epochs"}, ("scanning .*train", "decoding train", "evaluating")),
    "probe": ({"probe": {}, **CODES, "codes": {"layer": ["layer3", "penultimate"]}}, ("probe: logistic on layer3",)),
}


@pytest.mark.parametrize("name", WORK)
def test_each_kind_of_long_work_has_a_bar(name, tmp_path, monkeypatch):
    """As if all of it were long."""
    monkeypatch.setattr(progress, "_BAR_AFTER_S", 0.0)
    folder = put_small_folder(tmp_path / "pictures", train=340, test=40)
    changes, expected = WORK[name]
    small_recipe(tmp_path / "r.yaml", folder, data={"source": "folder"}, **changes)
    said = show("run", tmp_path / "r.yaml", "--out", tmp_path / "run", **TERMINAL).stdout
    bars = [line for line in re.split(r"[\r\n]+", said) if "images/s" in line or "━" in line]
    for what in expected:
        assert any(re.search(what, line) for line in bars), what
    assert said.count("\x1b[?25l") == said.count("\x1b[?25h"), "the cursor is back"


def test_python_shows_the_scan_of_new_as_a_run_does(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "_BAR_AFTER_S", 0.0)
    for key, value in TERMINAL.items():
        monkeypatch.setenv(key, value)
    tlscale.new(put_small_folder(tmp_path / "pictures", train=60, test=10))
    said = capsys.readouterr().out
    assert re.search("looking at images .*images/s", said)
    assert said.count("\x1b[?25l") == said.count("\x1b[?25h") > 0


def test_a_search_for_near_duplicates_has_a_bar(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "_BAR_AFTER_S", 0.0)
    monkeypatch.setattr(near_duplicates, "_BLOCK", 7)
    folder = put_small_folder(tmp_path / "pictures", train=60, test=10)
    small_recipe(tmp_path / "r.yaml", folder, data={"source": "folder"}, **CODES)
    said = show("codes", tmp_path / "r.yaml", "--near-duplicates", "0.9", **TERMINAL).stdout
    assert re.search("looking for near duplicates .*images/s", said)


def test_a_run_shows_a_short_plan_and_plan_the_whole_one(idx, tmp_path):
    small_recipe(tmp_path / "r.yaml", idx, duration="2 steps", freeze=FROZEN, **CODES)
    run, plan = show("run", tmp_path / "r.yaml", "--out", tmp_path / "run"), show("plan", tmp_path / "r.yaml")
    short, whole = run.stdout.split("first step")[0], plan.stdout
    for word in ("trainable", "steps", "backbone", "data "):
        assert word in short
        assert word in whole
    for word in ("freeze rule", "Groups of adamw", "Memory of a process", "schedule"):
        assert word not in short
        assert word in whole
    assert re.search(r"^first step after [0-9.]+ s: start [0-9.]+", run.stdout, re.MULTILINE)
    assert run.stdout.count("first step") == 1
    assert run.stderr.startswith("loading PyTorch and timm\n")
    assert plan.stderr == ""


@pytest.mark.parametrize("rank", ["0", "1"])
def test_on_a_terminal_there_is_a_line_while_libraries_are_loaded(rank):
    program = "from tlscale.cli_parts import loading\nwith loading():\n    pass\nprint('done')\n"
    code, shown = on_a_terminal(program, RANK=rank)
    assert code == 0
    line = b"loading PyTorch and timm\r\x1b[K" if rank == "0" else b""
    assert shown == line + b"done\r\n"


def stopped_while_loading(name, loading_s, **variables):
    """The exit code and the message of a verb that gets a signal while it loads, and refuses to go on after that."""
    program = f"""if True:
        import os, signal, time
        from tlscale.cli_parts import loading, reports_errors
        from tlscale.errors import LaunchError

        @reports_errors
        def verb():
            with loading():
                os.kill(os.getpid(), signal.{name})
                time.sleep({loading_s})
            raise LaunchError("the launcher asks for something else")

        verb()
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | variables)
    return done.returncode, done.stderr


def test_ctrl_c_does_not_wait_for_libraries_to_be_loaded():
    said = "tlscale: stopped by SIGINT while loading PyTorch and timm\n"
    assert stopped_while_loading("SIGINT", 10) == (EXIT_STOPPED, said)


def test_the_main_process_reports_what_another_has_refused_before():
    """Its launcher stops it then, while it is still loading."""
    said = "tlscale: the launcher asks for something else\n"
    assert stopped_while_loading("SIGTERM", 2, RANK="0", WORLD_SIZE="2") == (EXIT_BAD_INPUT, said)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device here is always full")
@pytest.mark.parametrize("stderr", ["2>/dev/full", "2>&-"])
def test_no_standard_error_is_no_failure(stderr):
    program = "from tlscale.cli_parts import loading\nwith loading(is_long=True):\n    print('done')\n"
    line = f'exec "$0" -c "$1" {stderr}'
    done = subprocess.run(["sh", "-c", line, sys.executable, program], stdout=subprocess.PIPE, check=False)
    assert (done.returncode, done.stdout) == (0, b"done\n")
