"""Two hosts on this machine: network namespaces with a cable between them, each with its own host name and /etc/hosts.

They share the disk, as hosts of a cluster do. It takes root and iproute2.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from tests.small_runs import REPO, environment

# Within a host's network: a host name and a host table of its own, and then the command.
_ENTER = 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"'


def why_not() -> str | None:
    """Why this machine cannot have hosts; None where it can."""
    if os.getuid() != 0:
        return "network namespaces take root"
    missing = [tool for tool in ("ip", "unshare", "mount", "hostname") if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)} is not installed (Debian: iproute2, util-linux, mount, hostname)"
    probe = f"tlscale-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"network namespaces are not allowed here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", probe], check=True)
    return None


class TwoHosts:
    """host0 (10.77.0.1) and host1 (10.77.0.2), joined by eth0."""

    def __init__(self, folder: Path) -> None:
        self._names = [f"tlscale-{os.getpid()}-host{number}" for number in range(2)]
        self._table = folder / "hosts"
        self._table.write_text("127.0.0.1 localhost\n10.77.0.1 host0\n10.77.0.2 host1\n")
        self._started: list[subprocess.Popen] = []
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def _build(self) -> None:
        one, two = self._names
        for name in self._names:
            _ip("netns", "add", name)
        _ip("link", "add", "eth0", "netns", one, "type", "veth", "peer", "name", "eth0", "netns", two)
        for number, name in enumerate(self._names):
            _ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", "eth0")
            for link in ("eth0", "lo"):
                _ip("-n", name, "link", "set", link, "up")

    def start(self, host: int, *words, log: Path, **variables: str) -> subprocess.Popen:
        """Start a command on a host, its output at the end of the file `log`."""
        name = f"host{host}"
        enter = ["ip", "netns", "exec", self._names[host], "unshare", "--uts", "--mount", "bash", "-c", _ENTER, "bash"]
        with log.open("a") as file:
            started = subprocess.Popen(
                [*enter, name, self._table, *map(str, words)],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment(**variables),
                cwd=REPO,
                start_new_session=True,
            )
        self._started.append(started)
        return started

    def processes(self, host: int) -> list[int]:
        found = subprocess.run(["ip", "netns", "pids", self._names[host]], capture_output=True, text=True, check=False)
        return [int(pid) for pid in found.stdout.split()]

    def kill(self, host: int) -> int:
        """Kill -9 of all processes of a host, as when its power goes; their number."""
        killed = set()
        while pids := self.processes(host):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            killed.update(pids)
            self._reap()
            time.sleep(0.05)
        return len(killed)

    def set_link(self, host: int, state: str) -> None:
        """Pull out the cable of a host (`down`), or put it in again (`up`)."""
        _ip("-n", self._names[host], "link", "set", "eth0", state)

    def _reap(self) -> None:
        for started in self._started:
            started.poll()

    def close(self) -> None:
        """Nothing is left: no process, no network."""
        for host, name in enumerate(self._names):
            self.kill(host)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
        for started in self._started:
            started.wait(30)
        there = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False).stdout
        assert not any(name in there for name in self._names), there


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
