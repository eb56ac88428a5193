"""What on this machine would stop or slow a run: one function a subject, each a list of findings.

Promise: nothing is changed, and no check raises: what goes wrong in one is what it finds. Secrets are never shown.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import torch
import yaml
from packaging.requirements import Requirement

from tlscale.commands.doctor_disks import DISK_CHECKS
from tlscale.commands.doctor_finding import Finding
from tlscale.distributed.host import num_cores
from tlscale.errors import first_line, one_line
from tlscale.tracking.working_folder import wandb_files

_GIB = 2**30
_LEAST_MEMORY = 4 * _GIB
_LEAST_FILES = 1024
_ROUND_TRIP_S = 90.0
_REACH_S = 4.0


def examine() -> Iterator[Finding]:
    """Yield all findings, the round trip of two processes last, which takes some seconds."""
    for check in CHECKS:
        try:
            yield from check()
        except Exception as error:  # a check that fails is a finding, and the others go on
            name = check.__name__.strip("_").replace("_", " ")
            yield Finding(name, "wrong", f"cannot be examined: {type(error).__name__}: {one_line(error)}")


def _packages() -> Iterator[Finding]:
    """Compare what is installed with what tlscale needs."""
    yield Finding("python", "ok", sys.version.split()[0])
    needed = map(Requirement, importlib.metadata.requires("tlscale") or ())
    shown = []
    for package in needed:
        if package.marker is not None and not package.marker.evaluate({"extra": ""}):
            continue
        try:
            found = importlib.metadata.version(package.name)
        except importlib.metadata.PackageNotFoundError:
            remedy = _fitting_torchvision() if package.name == "torchvision" else f"pip install '{package}'"
            yield Finding(package.name, "wrong", "not installed", remedy)
            continue
        if not package.specifier.contains(found, prereleases=True):
            yield Finding(package.name, "wrong", f"{found}; tlscale needs {package}", f"pip install '{package}'")
        if package.name in ("torch", "torchvision", "timm", "accelerate"):
            shown.append(f"{package.name} {found}")
    yield Finding("packages", "ok", ", ".join(shown))


def _torchvision() -> Iterator[Finding]:
    """Import torchvision as timm does: one of another torch ends in an error about an operator."""
    done = subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True)
    last = one_line((done.stderr.strip().splitlines() or ["no message"])[-1])[:200]
    if done.returncode == 0 or last.endswith("No module named 'torchvision'"):  # the latter is a finding of `_packages`
        return
    try:
        versions = f"{importlib.metadata.version('torchvision')} with torch {torch.__version__} "
    except importlib.metadata.PackageNotFoundError:
        versions = ""
    yield Finding("torchvision", "wrong", f"{versions}cannot be imported: {last}", _fitting_torchvision())


def _fitting_torchvision() -> str:
    """Return the line that installs the torchvision of this torch, and leaves torch as it is."""
    return f"pip install torchvision 'torch=={torch.__version__.partition('+')[0]}'"


def _devices() -> Iterator[Finding]:
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(cards):
        about = torch.cuda.get_device_properties(index)
        yield Finding("gpu", "ok", f"{about.name}, {about.total_memory / _GIB:.0f} GiB")
        kind = f"sm_{about.major}{about.minor}"
        built = torch.cuda.get_arch_list()
        if built and not any(arch.startswith(f"sm_{about.major}") for arch in built):
            yield Finding("gpu", "wrong", f"this torch has no code for {kind}", "Install a torch built for this GPU")
    if cards:
        return
    seen = _nvidia_cards()
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if seen and hidden is not None and hidden.strip() in ("", "-1"):
        yield Finding("gpu", "wrong", f"{seen} hidden by CUDA_VISIBLE_DEVICES={hidden!r}", "Unset it to use them")
    elif seen and torch.version.cuda is None:
        yield Finding("gpu", "wrong", f"{seen} here, but this torch is built for CPUs", "Install torch with CUDA")
    elif seen:
        yield Finding(
            "gpu", "wrong", f"{seen} here, but torch does not reach them", "Update the driver; see `nvidia-smi`"
        )
    elif torch.backends.mps.is_available():
        yield Finding("gpu", "ok", "Apple's (mps)")
    else:
        yield Finding("gpu", "note", "none: a run computes on the CPU")


def _nvidia_cards() -> str:
    """Return how many cards the driver knows, in words; empty where there is no driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    with suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=20)
        count = sum(line.startswith("GPU ") for line in done.stdout.splitlines())
        return f"{count} GPUs" if count else ""
    return ""


def _cores() -> Iterator[Finding]:
    cores, quota = num_cores(), _cpu_quota()
    if quota is not None and quota < cores - 0.5:
        remedy = f"Set compute.threads and data.workers to about {max(1, round(quota))}, or give the container more"
        yield Finding("cpu", "note", f"{cores} cores, of which a limit leaves {quota:.1f}", remedy)
    else:
        yield Finding("cpu", "ok", f"{cores} cores")
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if threads.isdecimal() and int(threads) < cores // 2:
        remedy = "Unset it: a run shares the cores among its processes (compute.threads)"
        yield Finding("cpu", "note", f"OMP_NUM_THREADS={threads} leaves most of {cores} cores idle", remedy)


def _cpu_quota() -> float | None:
    """Return the cores that a container may use at a time; None: no limit."""
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    return None


def _memory() -> Iterator[Finding]:
    available = _available_memory()
    if available is None:
        return
    what = f"{available / _GIB:.1f} GiB available"
    if available < _LEAST_MEMORY:
        yield Finding("memory", "note", what, "Close other programs; else lower data.cache_mib and codes.memory_mib")
    else:
        yield Finding("memory", "ok", what)


def _available_memory() -> int | None:
    limits = []
    with suppress(OSError, ValueError, AttributeError):
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        limits.append(int(found[1]) * 1024)  # type: ignore[index]
    with suppress(OSError, ValueError):  # of the container
        most, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        limits.append(int(most) - int(used))
    return min(limits, default=None)


def _limits() -> Iterator[Finding]:
    import resource  # not on Windows

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _LEAST_FILES:
        yield Finding("open files", "note", f"at most {soft}: workers may run out of them", "ulimit -n 65536")
    if sys.getfilesystemencoding().lower() != "utf-8":
        what = f"names of files are read as {sys.getfilesystemencoding()}"
        yield Finding("locale", "wrong", what, "export PYTHONUTF8=1, or LANG=C.UTF-8")
    if not any(shutil.which(name) for name in (os.environ.get("CXX") or "c++", "g++", "clang++")):
        remedy = "Install a C++ compiler (g++), or leave compute.compile off"
        yield Finding("compiler", "note", "none: compute.compile cannot work on a CPU", remedy)


def _accelerate() -> Iterator[Finding]:
    """Read what `accelerate config` wrote, which every `accelerate launch` obeys."""
    from accelerate.commands.config.config_args import default_config_file

    place = Path(os.environ.get("ACCELERATE_CONFIG_FILE") or default_config_file)
    if not place.is_file():
        cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
        starts = f"{cards} processes" if cards > 1 else "1 process"
        yield Finding("accelerate", "ok", f"not configured: `accelerate launch` starts {starts}")
        return
    shown, remedy = (
        one_line(place),
        "`accelerate config` writes it anew; without it the defaults hold",
    )
    try:
        config = yaml.safe_load(place.read_text())
        if not isinstance(config, dict):
            raise ValueError("it holds no settings (key: value)")
        kind, count = str(config.get("distributed_type", "NO")), int(config.get("num_processes", 1))
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        yield Finding("accelerate", "wrong", f"{shown} cannot be read: {one_line(first_line(error))}", remedy)
        return
    what = f"{shown}: `accelerate launch` starts {count} processes, {kind}"
    if kind in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        instead = "Write distributed_type: MULTI_GPU; compute.engine: fsdp2 in a recipe shards the network"
        yield Finding("accelerate", "wrong", f"{what}, which tlscale refuses", instead)
    elif config.get("mixed_precision", "no") not in ("no", None, False):
        precision = config["mixed_precision"]
        remedy = f"Write mixed_precision: 'no' there, and compute.precision: {precision} in the recipe"
        yield Finding("accelerate", "wrong", f"{what}, in {precision}, which a recipe must match", remedy)
    elif kind == "MULTI_GPU" and torch.cuda.is_available() and count > torch.cuda.device_count():
        yield Finding("accelerate", "wrong", f"{what}, but there are {torch.cuda.device_count()} GPUs", remedy)
    else:
        yield Finding("accelerate", "ok", what)


def _hub() -> Iterator[Finding]:
    import huggingface_hub.constants as hub

    if hub.HF_HUB_OFFLINE:
        what = "HF_HUB_OFFLINE is set: weights and data sets come from its cache alone"
        yield Finding("hub", "note", what, "Unset it to fetch new ones; weights: bundled and weights: FILE need no hub")
    elif problem := _unreachable(hub.ENDPOINT):
        remedy = "Use weights: bundled or weights: FILE, or set HTTPS_PROXY, or HF_ENDPOINT to a mirror"
        yield Finding("hub", "note", f"{urlsplit(hub.ENDPOINT).hostname} is not reached: {problem}", remedy)
    else:
        yield Finding("hub", "ok", f"{urlsplit(hub.ENDPOINT).hostname} is reached")


def _wandb() -> Iterator[Finding]:
    if found := wandb_files():
        what = f"settings in this folder are not obeyed: {', '.join(map(str, found))}"
        yield Finding("wandb", "note", what, "They may be somebody else's; your own belong into your home folder")
    mode = os.environ.get("WANDB_MODE", "")
    if mode in ("offline", "disabled"):
        yield Finding("wandb", "ok", f"{mode} (WANDB_MODE)")
        return
    server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    host = urlsplit(server).hostname or ""
    if not os.environ.get("WANDB_API_KEY") and not _netrc_names(host):
        remedy = "`wandb login`, or WANDB_MODE=offline; only recipes with track: [wandb] need it"
        yield Finding("wandb", "note", f"no key for {one_line(host)}", remedy)
    elif problem := _unreachable(server):
        remedy = "WANDB_MODE=offline keeps what is tracked, and `wandb sync` sends it later"
        yield Finding("wandb", "note", f"{one_line(host)} is not reached: {problem}", remedy)
    else:
        yield Finding("wandb", "ok", f"{one_line(host)} is reached, and there is a key")


def _netrc_names(host: str) -> bool:
    with suppress(OSError, RuntimeError, UnicodeError):
        place = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
        return re.search(rf"machine\s+{re.escape(host)}\b", place.read_text()) is not None
    return False


def _unreachable(url: str) -> str:
    """Return why a server does not answer; empty where it does, whatever it says."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_REACH_S):
            return ""
    except urllib.error.HTTPError:
        return ""
    except (OSError, ValueError) as error:
        return one_line(getattr(error, "reason", None) or error)[:200]


def _two_processes() -> Iterator[Finding]:
    """Let torchrun start two processes that add up a number: firewalls, names and interfaces that do not work."""
    words = (
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "tlscale.distributed.round_trip",
    )
    here = {key: value for key, value in os.environ.items() if key not in _OF_LAUNCHERS}
    here["OMP_NUM_THREADS"] = "1"
    try:
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=_ROUND_TRIP_S, env=here)
        problem = "" if done.returncode == 0 else _why(done.stderr)
    except subprocess.TimeoutExpired:
        problem = f"they did not find each other within {_ROUND_TRIP_S:.0f} s"
    if not problem:
        yield Finding("two processes", "ok", "found each other, and added up a number")
        return
    remedy = "Name the network interface in GLOO_SOCKET_IFNAME (such as lo); see whether the host knows its name"
    yield Finding("two processes", "wrong", problem, remedy)


_OF_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def _why(text: str) -> str:
    """Return the line of a traceback that names the error."""
    errors = [line.strip() for line in text.splitlines() if re.search(r"\w*(Error|Exception)\b.*: ", line)]
    named = [line for line in errors if "ChildFailedError" not in line]
    return one_line((named or errors or ["they ended without a message"])[-1])[:300]


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    *(_packages, _torchvision, _devices, _cores, _memory, *DISK_CHECKS, _limits),
    *(_accelerate, _hub, _wandb, _two_processes),
)
