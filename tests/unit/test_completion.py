"""Completion: of words, and in real shells by the key that people press; nothing heavy is imported."""

from __future__ import annotations

import ast
import os
import pty
import re
import shutil
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from click.testing import CliRunner

from tlscale.cli import main
from tlscale.recipe.schema_keys import all_keys

REPO = Path(__file__).resolve().parents[2]
DECAYS = ("cosine", "linear", "constant", "step")
LR = [f"plain,{key}=" for key in all_keys() if key.startswith("optim.l")]
QUESTIONS = {
    ("tlscale", "com"): ["plain,compare", "plain,completion"],
    ("tlscale", "plan", "--"): [f"plain,--{name}" for name in ("processes", "check-images", "json", "help")],
    ("tlscale", "plan", ""): ["file,"],
    ("tlscale", "run", "r.yaml", "opt"): ["plain,optim."],
    ("tlscale", "run", "r.yaml", "optim.l"): LR,
    ("tlscale", "run", "r.yaml", "batch_size", "=", "8", "optim.lr", "=", "1e-3", "stag"): ["plain,stages="],
    ("tlscale", "run", "r.yaml", "schedule.decay", "="): [
        f"plain,{way}" for way in ("cosine", "linear", "constant", "step")
    ],
    ("tlscale", "run", "r.yaml", "schedule.decay", "=", "c"): ["plain,cosine", "plain,constant"],
    ("tlscale", "run", "r.yaml", "drop_last", "=", "t"): ["plain,true"],
    ("tlscale", "run", "r.yaml", "optim.lr", "=", "1"): [],
    ("tlscale", "evaluate", "runs/a", "compute.prec"): ["plain,compute.precision="],
    ("tlscale", "compare", "a.yaml", "durat"): ["plain,duration=", "file,durat"],
    ("tlscale", "predict", "runs/a", "im"): ["file,im"],
    ("tlscale", "completion", "f"): ["plain,fish"],
    ("tlscale", "recipes", "copy", "lite0_h"): ["plain,lite0_head_fmnist"],
}


@pytest.mark.parametrize("words", QUESTIONS, ids=" ".join)
def test_words_as_bash_cuts_them_are_completed(words):
    variables = {"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1), "_MAIN_COMPLETE": "bash_complete"}
    done = CliRunner(env=variables).invoke(main, [])
    assert done.stdout.split() == QUESTIONS[words]


RC = {
    "bash": "PS1='> '\nbind 'set bell-style none'\neval \"$(tlscale completion bash)\"\n",
    "zsh": (
        "PS1='> '\nunsetopt prompt_sp beep\nautoload -Uz compinit\ncompinit -u -D\neval \"$(tlscale completion zsh)\"\n"
    ),
    "fish": "function fish_prompt; echo '> '; end\nfunction fish_greeting; end\ntlscale completion fish | source\n",
}
"""What each shell reads when it starts."""
STARTS = {
    "bash": ["bash", "--rcfile", "rc", "-i"],
    "zsh": ["zsh", "-o", "no_global_rcs", "-i"],  # reads .zshrc
    "fish": ["fish", "--no-config", "--init-command", "source rc"],
}
TYPED = {
    "run on\toptim.layer_d\t0.5 schedule.decay=lin\t--overw\t": [
        "only.yaml",
        *("optim.layer_decay=0.5", "schedule.decay=linear", "--overwrite"),
    ],
    "run two\toptim.layer_d\t0.5": ["two words.yaml", "optim.layer_decay=0.5"],
    "run three,f\toptim.layer_d\t0.5": ["three,four.yaml", "optim.layer_decay=0.5"],
    "plan on\t--check\t": ["only.yaml", "--check-images"],
}
"""What is typed, with the key that completes -> the words that the shell hands on."""


@pytest.fixture
def desk(tmp_path):
    """A folder with recipes, and the program of these sources."""
    show = 'import sys; print("given", sys.argv[1:], flush=True)'
    (tmp_path / "tlscale").write_text(f'#!/bin/sh\nexec {sys.executable} -m tlscale "$@"\n')
    (tmp_path / "show").write_text(f"#!/bin/sh\nexec {sys.executable} -c '{show}' \"$@\"\n")
    for program in ("tlscale", "show"):
        (tmp_path / program).chmod(0o755)
    for recipe in ("only.yaml", "two words.yaml", "three,four.yaml"):
        (tmp_path / recipe).touch()
    return tmp_path


@pytest.mark.parametrize(
    "shell", [pytest.param(name, marks=pytest.mark.skipif(not shutil.which(name), reason=f"no {name}")) for name in RC]
)
def test_a_tab_in_a_real_shell(shell, desk):
    """What is typed at a terminal: all at once, and then made arguments of `show` (ctrl-a goes to the line's begin)."""
    (desk / (".zshrc" if shell == "zsh" else "rc")).write_text(RC[shell])
    variables = {"PATH": f"{desk}:{os.environ['PATH']}", "PYTHONPATH": str(REPO), "TERM": "dumb", "HOME": str(desk)}
    given = []
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 200))  # a line that is broken is shown otherwise
    with subprocess.Popen(
        STARTS[shell], cwd=desk, env={**variables, "ZDOTDIR": str(desk)}, preexec_fn=lambda: os.login_tty(slave)
    ) as process:
        os.close(slave)
        try:
            for line in TYPED:
                said = b""
                while b"> " not in said:
                    said += os.read(master, 4096)
                os.write(master, f"tlscale {line}\x01show \r".encode())
                while not (words := re.search(rb"\ngiven (\[.*\])", said)):
                    said += os.read(master, 4096)
                given.append(ast.literal_eval(words[1].decode()))
        finally:
            process.kill()
            os.close(master)
    assert given == [["tlscale", line.split()[0], *words] for line, words in TYPED.items()]


@pytest.mark.skipif(not shutil.which("fish"), reason="no fish")
def test_fish_shows_all_of_a_description(desk):
    """It may hold a comma, at which a line is cut into its kind and its value."""
    script = CliRunner().invoke(main, ["completion", "fish"]).stdout + "complete -C 'tlscale plan --check'"
    variables = {"PATH": f"{desk}:{os.environ['PATH']}", "PYTHONPATH": str(REPO), "HOME": str(desk)}
    done = subprocess.run(["fish", "--no-config", "-c", script], env=variables, capture_output=True, text=True)
    assert done.stdout.startswith("--check-images\tDecode every image first, and list those "), done


def test_completion_imports_nothing_heavy():
    program = (
        "import sys\n"
        "from tlscale.cli import main\n"
        "try:\n"
        "    main(prog_name='tlscale')\n"
        "finally:\n"
        "    print(sorted({'torch', 'timm', 'numpy', 'accelerate', 'rich'} & set(sys.modules)))\n"
    )
    variables = {"_TLSCALE_COMPLETE": "bash_complete", "COMP_WORDS": "tlscale run r.yaml optim.l", "COMP_CWORD": "3"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, **variables}, check=False
    )
    assert "plain,optim.lr=" in done.stdout.splitlines()
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_has_a_script(shell):
    done = CliRunner().invoke(main, ["completion", shell])
    assert done.exit_code == 0
    assert f"_TLSCALE_COMPLETE={shell}_complete" in done.stdout
    if shutil.which(shell):  # bash at least
        subprocess.run([shell, "-n"], input=done.stdout, text=True, check=True)
