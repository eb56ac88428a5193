"""Completion: of words, and in a real bash by the key that people press; nothing heavy is imported."""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
import sys
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


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_a_tab_in_a_real_bash(tmp_path):
    """What is typed at a terminal: a key, one of its values, an option, and a file."""
    (tmp_path / "tlscale").write_text(f'#!/bin/sh\nexec {sys.executable} -m tlscale.cli "$@"\n')
    (tmp_path / "tlscale").chmod(0o755)
    (tmp_path / "only.yaml").touch()
    (tmp_path / "rc").write_text("PS1='> '\nbind 'set bell-style none'\neval \"$(tlscale completion bash)\"\n")
    path = f"{tmp_path}:{os.environ['PATH']}"
    master, slave = pty.openpty()
    bash = subprocess.Popen(
        ["bash", "--rcfile", "rc", "-i"],
        **dict.fromkeys(("stdin", "stdout", "stderr"), slave),
        cwd=tmp_path,
        env={"PATH": path, "PYTHONPATH": str(REPO), "TERM": "dumb", "HOME": str(tmp_path)},
        start_new_session=True,
    )
    os.close(slave)
    said = b""
    try:
        # Typed at once, and then made an argument of echo (ctrl-a goes to the begin of the line).
        os.write(master, b"tlscale run on\toptim.layer_d\t0.5 schedule.decay=lin\t--overw\t\x01echo \r")
        while not re.search(rb"\ntlscale .*\r\n", said):
            said += os.read(master, 4096)
    finally:
        bash.kill()
        bash.wait()
        os.close(master)
    (line,) = re.findall(r"\n(tlscale .*)\r\n", said.decode())
    assert line.split() == [
        "tlscale",
        "run",
        "only.yaml",
        "optim.layer_decay=0.5",
        "schedule.decay=linear",
        "--overwrite",
    ]


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
