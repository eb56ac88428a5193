"""Every command block of README, CONTRIBUTING, docs and launch/README: run here, or named in a table with the reason.

A block in neither fails, and so does a row of a table without a block. Whatever is not run here is parsed by what would
read it: options by the command line, keys by the recipe's schema, files and make targets by looking.
"""

from __future__ import annotations

import ast
import glob
import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import click
import numpy as np
import pytest
from accelerate.commands.launch import launch_command_parser
from click.testing import CliRunner
from PIL import Image

import tlscale
from tests.small_runs import REPO
from tlscale.cli import main
from tlscale.recipe.load import load_recipe
from tlscale.recipe.schema_keys import all_keys

PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in (REPO / "docs").glob("*.md"))]
PAGES += ["launch/README.md"]

NO_COMMANDS = {
    ("README.md", "runs/<name>/"): "what is in a run folder",
    ("docs/architecture.md", "flowchart TD"): "a picture",
    ("docs/guide.md", "tlscale: 2 mistakes in the recipe:"): "what is printed",
    ("docs/guide.md", "codes   computed once:"): "what is printed",
    ("docs/recipe.md", "# yaml-language-server:"): "a line for an editor",
}
"""Blocks of no language that are no commands, by their first words."""

HERE = [
    *(("README.md", f"tlscale {verb}") for verb in ("new", "run photos", "predict", "evaluate", "export")),
    *(
        ("docs/own_photos.md", words)
        for words in ("tlscale new", "tlscale run", "tlscale predict", "cat", "tlscale export")
    ),
    ("README.md", "import tlscale"),
    ("docs/run_folder.md", "import pyarrow.parquet"),
    ("docs/guide.md", "ACCELERATE_USE_CPU=true torchrun"),
    ("docs/strategies.md", "tlscale compare runs/*"),
    ("docs/strategies.md", "tlscale compare photos.yaml --seeds"),
]
"""What is run here, by page and first words, in this order."""

OF_TEST_PREDICT = "tests/jobs/test_predict.py::test_the_commands_of_the_guide_run_and_are_those_of_the_help"
OF_TEST_EXPORT = "tests/jobs/test_export.py::test_the_page_on_serving_runs_word_for_word"
SIX_STRATEGIES = "trains 12 networks; its verb: tests/jobs/test_compare.py"
NOT_HERE = {
    ("README.md", "make demo"): "minutes of training; a release runs it",
    ("README.md", "tlscale run recipes/"): "what `make demo` runs",
    (
        "README.md",
        "accelerate launch tlscale/run.py recipes/",
    ): "the same behind the launcher: tests/jobs/test_launcher.py",
    ("README.md", "make test"): "is what runs this test",
    ("docs/guide.md", "python3 -m venv env"): "needs a package registry; `make test` makes such an environment",
    ("docs/guide.md", "pip install -c constraints.txt"): "needs a package registry",
    ("docs/guide.md", "tlscale predict"): OF_TEST_PREDICT,
    ("docs/guide.md", "find new_photos"): OF_TEST_PREDICT,
    ("docs/guide.md", "import tlscale"): OF_TEST_PREDICT,
    ("docs/guide.md", "import timm, tlscale"): "minutes of training; tests/unit/models/test_export.py",
    ("docs/guide.md", "recipe = tlscale.load_recipe("): "minutes of training; tests/jobs/test_in_python.py",
    ("docs/guide.md", "codes = tlscale.load("): "of the run above; tests/jobs/test_features.py",
    ("docs/serve.md", "tlscale export"): OF_TEST_EXPORT,
    ("docs/serve.md", "python classify.py"): OF_TEST_EXPORT,
    ("docs/serve.md", "import json, sys"): OF_TEST_EXPORT,
    (
        "docs/serve.md",
        "from fastapi import",
    ): "tests/jobs/test_serve.py::test_the_server_of_the_page_answers_as_predict_does",
    ("docs/strategies.md", "tlscale compare photos.yaml --sizes"): SIX_STRATEGIES,
    (
        "docs/strategies.md",
        "tlscale compare photos.yaml duration=",
    ): "weights of a hub; tests/jobs/test_compare_runs.py",
    ("docs/strategies.md", "tlscale compare recipes/"): SIX_STRATEGIES,
    ("docs/gpu.md", "scripts/gpu_kit.sh"): "needs a GPU; tests/gpu",
    ("docs/xla.md", "make test-xla"): "makes an environment of 8 GB",
    ("docs/xla.md", "xla=$("): "makes an environment of 8 GB",
    ("docs/xla.md", "PJRT_DEVICE=CPU"): "in that environment: tests/xla",
    ("launch/README.md", "tlscale/run.py RECIPE"): "what each launch file ends in: tests/launch",
    ("launch/README.md", "bash launch/slurm_compare.sh"): "needs Slurm: tests/slurm",
}
"""Commands, and programs in Python, by their first words -> what runs them, or why nothing can."""


def blocks(page: str, *languages: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", (REPO / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language in languages]


def commands(page: str) -> list[str]:
    """The commands of a page, one a line; of what a terminal showed, those behind a `$`."""
    lines = []
    for block in blocks(page, "", "bash", "sh", "console"):
        if any(page == where and block.startswith(words) for where, words in NO_COMMANDS):
            continue
        shown = block.replace("\\\n", " ").splitlines()
        typed = [line[2:] for line in shown if line.startswith("$ ")]
        lines += [line for line in typed or shown if line.strip() and not line.startswith("#")]
    return lines


def rows_for(page: str, text: str) -> list[tuple[str, str]]:
    return [row for row in [*HERE, *NOT_HERE] if row[0] == page and text.startswith(row[1])]


@pytest.mark.parametrize("page", PAGES)
def test_each_is_run_or_has_a_reason(page):
    for text in [*commands(page), *blocks(page, "python")]:
        assert len(rows_for(page, text)) == 1, text


def test_each_row_of_the_tables_has_its_block():
    for page, words in NO_COMMANDS:
        assert any(block.startswith(words) for block in blocks(page, "", "mermaid")), words
    for page, words in [*HERE, *NOT_HERE]:
        assert any(text.startswith(words) for text in [*commands(page), *blocks(page, "python")]), words
    for reason in NOT_HERE.values():
        for file, test in re.findall(r"(tests/[\w/]+\.py)(?:::(\w+))?", reason):
            assert (REPO / file).is_file(), file
            assert not test or f"def {test}(" in (REPO / file).read_text(), test


def test_no_block_has_a_language_that_is_not_looked_at():
    for page in PAGES:
        every = re.findall(r"^```(\w*)\n.*?^```", (REPO / page).read_text(), flags=re.MULTILINE | re.DOTALL)
        assert set(every) <= {"", "bash", "sh", "console", "python", "yaml", "mermaid"}, page


# -- parsed -----------------------------------------------------------------------------------------------------------


def parts_of(line: str) -> list[list[str]]:
    """The words of each command of a line of bash, without redirections and variables before it."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;>")
    lexer.whitespace_split = True
    parts: list[list[str]] = [[]]
    words = iter(lexer)
    for word in words:
        if word in ("|", "&&", ";"):
            parts.append([])
        elif word == ">":
            next(words)
        elif parts[-1] or not re.fullmatch(r"[A-Z_]+=\S*", word):
            parts[-1].append(word)
    return parts


def parse(words: list[str]) -> None:
    """Parse a line of tlscale's by its own parser, which runs nothing; check overrides, and recipes that ship."""
    command, rest = main, words
    while True:
        context = command.make_context("tlscale", list(rest))
        rest = [*context._protected_args, *context.args]
        if not isinstance(command, click.Group) or not rest:
            break
        _, found, rest = command.resolve_command(context, rest)
        command = found or pytest.fail(f"no command: {rest}")
    given = [value for name in ("words", "overrides") for value in context.params.get(name) or ()]
    keys = [text.partition("=")[0] for text in given if re.match(r"[a-z_.]+=", text)]
    keys += [text.split(".", 1)[1].partition("=")[0] for text in context.params.get("changes") or ()]
    assert [key for key in keys if key not in all_keys()] == []
    recipes = [text for text in rest if text.startswith("recipes/")]
    for recipe in recipes:
        load_recipe(REPO / recipe, [text for text in given if text.partition("=")[0] in keys])


def check_words(words: list[str]) -> None:
    name = words[0]
    if name == "tlscale":
        parse(words[1:])
    elif name.endswith("tlscale/run.py"):
        parse(["run", *words[1:]])
    elif name.endswith("accelerate"):
        launched = launch_command_parser().parse_args(words[2:])
        check_words([launched.training_script, *launched.training_script_args])
    elif name == "torchrun":
        assert words[1:6] == ["--standalone", "--nproc-per-node", "2", "-m", "tlscale"], words
        parse(words[6:])
    elif name == "make":
        assert re.search(rf"^{words[1]}:", (REPO / "Makefile").read_text(), re.MULTILINE), words
    elif name == "bash" or name.startswith("scripts/"):
        assert (REPO / words[name == "bash"]).is_file(), words
    else:
        assert name in ("python3", "python", ".", "pip", "cat", "find") or name.startswith("xla="), words


@pytest.mark.parametrize("page", PAGES)
def test_options_keys_and_files_exist(page):
    for line in commands(page):
        for words in parts_of(line.partition("  #")[0]):
            check_words(words)


@pytest.mark.parametrize("page", PAGES)
def test_names_in_python_exist(page):
    """And every argument by name is one of the function."""
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "tlscale":
                assert hasattr(tlscale, node.attr), node.attr


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_the_text_are_commands(page):
    """Where whole words and no `...` are shown, options exist."""
    text = re.sub(r"^```.*?^```", "", (REPO / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    for line in re.findall(r"`tlscale ([a-z][^`\n]*)`", text):
        if "..." not in line and "|" not in line and ">" not in line:
            with suppress(click.MissingParameter, click.exceptions.NoArgsIsHelpError):  # a verb by its name alone
                parse(shlex.split(line))


# -- run --------------------------------------------------------------------------------------------------------------


def put_pictures(folder: Path, seed: int) -> None:
    """Pictures of a colour for each class."""
    rng = np.random.default_rng(seed)
    for number, label in enumerate(("ash", "beech", "oak")):
        (folder / label).mkdir(parents=True)
        for image in range(12):
            pixels_HWC = rng.integers(0, 120, (48, 48, 3), dtype=np.uint8)
            pixels_HWC[..., number] += 100
            Image.fromarray(pixels_HWC).save(folder / label / f"{image}.png")


def run_line(line: str) -> None:
    """Run a line in this process, where it is tlscale's; its output goes to `said.txt`, or to where it sends it."""
    (words,) = parts_of(line)
    words = [found for word in words for found in (sorted(glob.glob(word)) if "*" in word else [word])]
    if words[0] == "tlscale":
        done = CliRunner().invoke(main, words[1:], catch_exceptions=False)
        assert done.exit_code == 0, f"{line}\n{done.output}"
        output = done.stdout
    else:
        variables = dict(re.findall(r"(?:^|(?<= ))([A-Z_]+)=(\S*)", line.partition(words[0])[0]))
        words = [sys.executable, "-m", "torch.distributed.run", *words[1:]] if words[0] == "torchrun" else words
        env = {**os.environ, "PYTHONPATH": str(REPO), **variables}
        output = subprocess.run(words, check=True, capture_output=True, text=True, env=env).stdout
    Path(line.partition(">")[2].strip() or "said.txt").write_text(output)


@pytest.mark.slow
def test_own_images_word_for_word(tmp_path, monkeypatch):
    """README's second example and what goes on from it, on pictures of 48 px; what two pages have is run once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TLSCALE_CACHE", str(tmp_path / "cache"))
    for name, seed in (("photos", 0), ("new_photos", 1), ("more_photos", 2)):
        put_pictures(tmp_path / name, seed)
    shutil.copytree("new_photos/ash", "new")
    done = set()
    for page, first in HERE:
        for line in (line.partition("  #")[0].strip() for line in commands(page) if line.startswith(first)):
            if line not in done:
                run_line(line)
                done.add(line)
        for block in (block for block in blocks(page, "python") if block.startswith(first)):
            exec(compile(block, page, "exec"), {})
    assert len(done) == 10
    assert {path.name for path in Path("runs").iterdir()} >= {"photos", "again"}
    assert list(Path("runs/photos/evaluations").glob("*/figures.json"))
    assert os.path.exists("onnx/model.onnx")
    assert len(Path("new_labels.csv").read_text().splitlines()) == 37, "by two processes"
    labels = Path("labels.csv").read_text().splitlines()
    assert (labels[0].replace(",set,", ","), len(labels)) == ("path,label,probability,error", 13)
    assert len(Path("jobs.txt").read_text().splitlines()) == 18


def test_the_recipes_of_the_readme(tmp_path):
    """The one that `new` writes with few images, and what makes it a fine-tuning."""
    put_pictures(tmp_path / "photos", 0)
    probe, tuning = blocks("README.md", "yaml")
    (tmp_path / "probe.yaml").write_text(probe)
    tlscale.new(tmp_path / "photos", out=tmp_path / "written.yaml")
    shown, written = load_recipe(tmp_path / "probe.yaml"), load_recipe(tmp_path / "written.yaml")
    assert (written.codes, written.probe, written.backbone) == (shown.codes, shown.probe, shown.backbone)
    (tmp_path / "tuning.yaml").write_text("\n".join(probe.splitlines()[:-2]) + "\n" + tuning)
    assert load_recipe(tmp_path / "tuning.yaml").probe is None
