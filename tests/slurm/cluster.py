"""A Slurm of this machine's own: one controller and two nodes, which are two daemons on one host.

Promise: all that it writes is in one folder, and whatever it started is ended by `close`: the daemons run in the
foreground, so that each is the very process that was started. Should this process be killed, they are ended too.
"""

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

SBIN = "/usr/sbin"
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo", "setpriv")
# How long a job that is queued again has to wait: the life of a credential, of itself 120 s.
CREDENTIAL_S = 5


def find(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:{SBIN}")


def why_not() -> str | None:
    """Why no Slurm can be started here; None if one can."""
    lacking = [name for name in NEEDED if find(name) is None]
    if lacking:
        return f"Slurm is not installed ({', '.join(lacking)}): scripts/get_slurm.sh installs it"
    return None if os.geteuid() == 0 else "Slurm's daemons want root here"


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


class Cluster:
    """Two nodes of one core; partitions `low`, `grace` (with time to stop) and `high`, which takes their nodes."""

    def __init__(self) -> None:
        # Munge wants every folder above its socket to be root's and open to all.
        self.folder = Path(tempfile.mkdtemp(prefix="tlscale-slurm-", dir="/run"))
        self.folder.chmod(0o755)
        self.conf = self.folder / "slurm.conf"
        self.started: dict[str, subprocess.Popen] = {}

    def open(self) -> None:
        """Start the daemons, and wait until both nodes are idle."""
        self.conf.write_text(self._configuration())
        (self.folder / "key").write_bytes(secrets.token_bytes(128))
        (self.folder / "key").chmod(0o400)
        files = {"socket": "munge", "key-file": "key", "log-file": "munged.log", "seed-file": "seed"}
        options = [f"--{option}={self.folder / file}" for option, file in files.items()]
        self._start("munged", "munged", "--foreground", "--force", f"--pid-file={self.folder}/munged.pid", *options)
        self._wait_for("munge's socket", (self.folder / "munge").exists, 20)
        self._start("slurmctld", "slurmctld", "-D", "-f", str(self.conf))
        for node in ("n1", "n2"):
            (self.folder / f"spool-{node}").mkdir()
            self._start(f"slurmd-{node}", "slurmd", "-D", "-N", node, "-f", str(self.conf))
        self._wait_for("two idle nodes", lambda: self.ask("sinfo", "-h", "-N", "-o", "%t").split() == ["idle"] * 6, 60)

    def _configuration(self) -> str:
        host, (controller, first, second) = socket.gethostname().split(".")[0], free_ports(3)
        lines = (
            "ClusterName=lab",
            f"SlurmctldHost={host}",
            f"SlurmctldPort={controller}",
            "SlurmUser=root",
            "AuthType=auth/munge",
            f"AuthInfo=socket={self.folder}/munge,cred_expire={CREDENTIAL_S}",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_Core",
            "SlurmdParameters=config_overrides",
            "SchedulerParameters=sched_interval=2,sched_min_interval=0,bf_interval=2",
            "ReturnToService=2",
            "JobRequeue=1",
            "KillWait=30",
            "MpiDefault=none",
            f"StateSaveLocation={self.folder}/state",
            f"SlurmdSpoolDir={self.folder}/spool-%n",
            f"SlurmctldLogFile={self.folder}/slurmctld.log",
            f"SlurmdLogFile={self.folder}/slurmd-%n.log",
            f"SlurmctldPidFile={self.folder}/slurmctld.pid",
            f"SlurmdPidFile={self.folder}/slurmd-%n.pid",
            "PreemptType=preempt/partition_prio",
            "PreemptMode=REQUEUE",
            f"NodeName=n1 NodeHostname={host} Port={first} CPUs=1 RealMemory=2000",
            f"NodeName=n2 NodeHostname={host} Port={second} CPUs=1 RealMemory=2000",
            "PartitionName=low Nodes=ALL Default=YES MaxTime=60 PriorityTier=1 PreemptMode=REQUEUE",
            "PartitionName=grace Nodes=ALL MaxTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime=90",
            "PartitionName=high Nodes=ALL MaxTime=60 PriorityTier=10 PreemptMode=OFF",
        )
        (self.folder / "state").mkdir()
        return "\n".join(lines) + "\n"

    def _start(self, name: str, program: str, *words: str) -> None:
        with (self.folder / f"{name}.out").open("w") as file:
            self.started[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", find(program), *words],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=self.environment(),
            )

    def environment(self, **changes: str) -> dict[str, str]:
        path = f"{os.environ['PATH']}:{SBIN}"
        return {**os.environ, "PATH": path, "SLURM_CONF": str(self.conf), **changes}

    def ask(self, *words: str, **changes: str) -> str:
        """What one of Slurm's commands prints; what it prints to stderr where it fails."""
        done = subprocess.run(
            words, env=self.environment(**changes), capture_output=True, text=True, timeout=60, check=False
        )
        return done.stdout if done.returncode == 0 else done.stdout + done.stderr

    def _wait_for(self, what: str, condition, timeout_s: float) -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            dead = [name for name, process in self.started.items() if process.poll() is not None]
            if dead or time.monotonic() > end:
                raise RuntimeError(f"no {what}; ended: {dead}\n{self.logs()}")
            time.sleep(0.1)

    def logs(self) -> str:
        files = sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")])
        return "\n".join(f"== {file.name}\n{file.read_text(errors='replace')[-2500:]}" for file in files)

    def close(self) -> None:
        """Cancel what runs, end the daemons, and remove the folder."""
        try:
            if "slurmctld" in self.started:
                self.ask("scancel", "--user=root")
                end = time.monotonic() + 45
                while self.ask("squeue", "-h").strip() and time.monotonic() < end:
                    time.sleep(0.5)
        finally:
            for process in reversed(self.started.values()):
                _end(process)
            shutil.rmtree(self.folder, ignore_errors=True)


def _end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
