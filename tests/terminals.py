"""A program on a terminal of its own."""

import os
import pty
import subprocess
import sys


def on_a_terminal(program: str, **environment: str) -> tuple[int, bytes]:
    """Run Python code whose output is a terminal; return its exit code and what the terminal was sent."""
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", **environment}
    process = subprocess.Popen([sys.executable, "-c", program], stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    shown = b""
    while True:
        try:
            chunk = os.read(master, 4096)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        shown += chunk
    os.close(master)
    return process.wait(), shown
