"""The command line: exit codes, messages, and no torch before it is needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.recipes.wrong_data import WRONG_DATA
from tests.recipes.wrong_recipes import AT, WRONG_RECIPES
from tlscale import __version__
from tlscale.cli import main
from tlscale.errors import EXIT_FAILED
from tlscale.recipe.shipped import shipped_recipes
from tlscale.recipe.yaml_text import write_yaml

BASE = {"name": "wrong", "backbone": {"name": "test_resnet", "weights": "none"}, "duration": "1 steps"}


def invoke(*words: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(main, list(words))
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("text", "overrides", "fragments"), [row[1:] for row in WRONG_RECIPES], ids=[r[0] for r in WRONG_RECIPES]
)
def test_a_wrong_recipe_exits_2_with_its_message(tmp_path, text, overrides, fragments):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    code, _, message = invoke("plan", str(path), "--", *overrides)
    assert code == 2
    assert message.startswith("tlscale: ")
    assert "Traceback" not in message
    for fragment in fragments:
        assert fragment.replace(AT, str(path)) in message


@pytest.mark.parametrize(
    ("build", "fragments", "at_decode"), [row[1:] for row in WRONG_DATA], ids=[r[0] for r in WRONG_DATA]
)
def test_wrong_data_exit_2_with_their_message(tmp_path, build, fragments, at_decode):
    (tmp_path / "data").mkdir()
    section = build(tmp_path / "data")
    path = tmp_path / "recipe.yaml"
    path.write_text(write_yaml({**BASE, "data": {"image_size": 32, **section}}))
    out = tmp_path / "run"
    code, _, message = invoke("run", str(path), "--out", str(out))
    assert code == 2
    assert "Traceback" not in message
    for fragment in fragments:
        assert fragment in message
    assert not (out / "run.json").exists(), "the same line must work once the data are mended"


def test_help_needs_no_torch_and_is_quick():
    probe = (
        "import sys, click; from click.testing import CliRunner; from tlscale.cli import main;"
        "r = CliRunner().invoke(main, ['--help']); assert r.exit_code == 0 and 'recipes' in r.output;"
        "heavy = {'torch', 'timm', 'numpy', 'accelerate', 'pydantic', 'yaml', 'rich'} & set(sys.modules);"
        "print(sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_verb_has_a_help_page():
    for verb in ("run", "plan", "evaluate", "export", "recipes"):
        code, text, _ = invoke(verb, "--help")
        assert code == 0
        assert text.startswith("Usage:")


def test_version():
    assert __version__ in invoke("--version")[1]


def test_an_unknown_verb_exits_2():
    code, _, message = invoke("trian")
    assert code == 2
    assert "trian" in message


def test_resume_and_overwrite_exclude_each_other(tmp_path):
    assert invoke("run", "x.yaml", "--resume", "--overwrite")[0] == 2


def test_recipes_lists_what_ships_with_a_summary():
    code, text, _ = invoke("recipes")
    assert code == 0
    for name in shipped_recipes():
        line = next(line for line in text.splitlines() if line.split()[0] == name)
        assert len(line.split()) > 3


def test_recipes_copy_does_not_overwrite(tmp_path):
    target = tmp_path / "mine.yaml"
    assert invoke("recipes", "copy", "resnet_fmnist", str(target))[0] == 0
    before = target.read_bytes()
    assert before == shipped_recipes()["resnet_fmnist"].read_bytes()
    code, _, message = invoke("recipes", "copy", "resnet_fmnist", str(target))
    assert code == 2
    assert str(target) in message
    assert target.read_bytes() == before


def test_recipes_copy_of_an_unknown_name_suggests():
    code, _, message = invoke("recipes", "copy", "resnet_fmnis")
    assert code == 2
    assert "resnet_fmnist" in message


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_shipped_recipe_loads_and_stands_alone(name):
    from tlscale.recipe.load import load_recipe

    path = shipped_recipes()[name]
    assert load_recipe(path).name == name
    assert "extends:" not in path.read_text(), "a recipe that is copied alone must be whole"


def test_plan_shows_the_arithmetic_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, text, _ = invoke(
        "plan",
        str(shipped_recipes()["resnet_fmnist"]),
        "data.train_limit=2000",
        "freeze=(conv1|bn1)\\..*",
        "--processes",
        "2",
    )
    assert code == 0
    assert "128 images a step = 2 processes x 1 micro-batch x 64" in text
    assert "(conv1|bn1)" in text
    assert "eval" in text
    assert "activations of 64 images" in text
    assert list(tmp_path.iterdir()) == []


def test_the_launch_target_is_the_same_code_path(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("name: [\n")
    target = Path(__file__).parents[2] / "tlscale" / "run.py"
    done = subprocess.run([sys.executable, str(target), str(path)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("tlscale: ")
    assert str(path) in done.stderr
    assert "Traceback" not in done.stderr


def test_an_error_of_a_file_is_a_message_and_no_traceback(tmp_path, monkeypatch):
    with monkeypatch.context() as within:
        (tmp_path / "gone").mkdir()
        within.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()
        code, _, said = invoke("recipes")
    assert code == EXIT_FAILED
    assert said == "tlscale: the working folder was removed. Change to a folder that exists\n"


@pytest.mark.parametrize("module", ["tlscale", "tlscale.cli"])
def test_python_m_is_the_command(module):
    done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"tlscale, version {__version__}\n"), done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device here is always full")
@pytest.mark.parametrize("is_all", [False, True])
def test_output_that_is_lost_is_a_failure(is_all):
    with open("/dev/full", "w") as full:
        errors = full if is_all else subprocess.PIPE
        command = [sys.executable, "-m", "tlscale", "recipes"]
        done = subprocess.run(command, stdout=full, stderr=errors, text=True, check=False)
    assert done.returncode == EXIT_FAILED, done.stderr
    if not is_all:
        assert "No space left on device" in done.stderr
        assert "Traceback" not in done.stderr
        assert "Exception" not in done.stderr


@pytest.mark.slow
def test_a_process_ends_with_its_code_and_without_last_words(tmp_path):
    """Nothing that Python or a library has to say while it is taken down, and nothing that was said is lost."""
    for words, code in ((["recipes"], 0), (["plan", str(tmp_path / "none.yaml")], 2), (["nothing"], 2)):
        done = subprocess.run(
            [sys.executable, "-c", f"import timm\nfrom tlscale.cli import main\nmain({words!r}, prog_name='tlscale')"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code
        assert "leaked" not in done.stderr
        assert done.stderr.startswith(("tlscale: ", "Usage: ")) == bool(code), done.stderr
        assert ("resnet_fmnist" in done.stdout) == (code == 0)
