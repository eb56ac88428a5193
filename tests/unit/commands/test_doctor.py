"""`tlscale doctor` finds what is planted, and says what to do about it."""

import json
import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import huggingface_hub.constants
import pytest
from click.testing import CliRunner

from tlscale.cli import main
from tlscale.commands import doctor_checks, doctor_disks
from tlscale.commands.doctor_checks import CHECKS, examine
from tlscale.commands.doctor_finding import Finding

CHECK = {check.__name__.strip("_"): check for check in CHECKS}
SLOW = ("_two_processes", "_torchvision")
Usage = namedtuple("Usage", "total used free")


def old_timm(monkeypatch, tmp_path):
    about = tmp_path / "timm-0.4.12.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: timm\nVersion: 0.4.12\n")
    monkeypatch.syspath_prepend(tmp_path)


def torchvision_of_another_torch(monkeypatch, tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def no_torchvision(monkeypatch, tmp_path):
    """Its files gone from what a new process imports, and its version from what is installed."""
    found = doctor_checks.importlib.metadata.version

    def version(name):
        if name == "torchvision":
            raise doctor_checks.importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(doctor_checks.importlib.metadata, "version", version)
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torchvision'] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def hidden_gpus(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: x)'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def cache_in_a_file(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TLSCALE_CACHE", str(tmp_path / "file"))


def full_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor_disks.shutil, "disk_usage", lambda _place: Usage(2**40, 2**40, 2**20))


def disk_of_a_gib(monkeypatch, small_disk):
    if subprocess.run(["mount", "-o", f"remount,size={2**30}", small_disk], check=False).returncode:
        pytest.skip("a disk cannot be made larger here")
    monkeypatch.setenv("TLSCALE_CACHE", str(small_disk))


def tmpdir_nowhere(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", "/nowhere")
    monkeypatch.setattr(doctor_disks.tempfile, "tempdir", None)


def no_home(monkeypatch, tmp_path):
    monkeypatch.delenv("TLSCALE_CACHE", raising=False)

    def fail(_class):
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", classmethod(fail))


def no_temporary_files(monkeypatch, tmp_path):
    def fail():
        raise FileNotFoundError("No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(doctor_disks.tempfile, "gettempdir", fail)


def accelerate_says(text):
    def plant(monkeypatch, tmp_path):
        (tmp_path / "config.yaml").write_text(text)
        monkeypatch.setenv("ACCELERATE_CONFIG_FILE", str(tmp_path / "config.yaml"))

    return plant


def unreachable_hub(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")


def offline_hub(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def no_key(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))


def foreign_settings(monkeypatch, tmp_path):
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text("[default]\nbase_url = https://evil.example\n")
    monkeypatch.chdir(tmp_path)


def no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))


def one_thread(monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(doctor_checks, "num_cores", lambda: 16)


PLANTED = {
    "a version below the floor": ("packages", old_timm, "wrong", "0.4.12;"),
    "a torchvision of another torch": ("torchvision", torchvision_of_another_torch, "wrong", "nms does not exist"),
    "no torchvision": ("packages", no_torchvision, "wrong", "not installed"),
    "no TMPDIR": (
        "disks",
        tmpdir_nowhere,
        "note",
        "TMPDIR='/nowhere' is not there",
    ),
    "hidden GPUs": ("devices", hidden_gpus, "wrong", "hidden by CUDA_VISIBLE_DEVICES"),
    "a file in place of the cache": ("disks", cache_in_a_file, "note", "is no folder"),
    "a full disk": ("disks", full_disk, "note", "0.0 GiB free"),
    "no home": ("cache", no_home, "wrong", "no home folder"),
    "deepspeed": ("accelerate", accelerate_says("distributed_type: DEEPSPEED\nnum_processes: 2\n"), "wrong", "refuses"),
    "bf16": ("accelerate", accelerate_says("mixed_precision: bf16\nnum_processes: 1\n"), "wrong", "recipe must match"),
    "text in place of settings": ("accelerate", accelerate_says("one process\n"), "wrong", "holds no settings"),
    "no number of processes": ("accelerate", accelerate_says("num_processes: null\n"), "wrong", "cannot be read"),
    "nowhere for temporary files": ("disks", no_temporary_files, "wrong", "No usable temporary directory"),
    "no YAML": ("accelerate", accelerate_says("a: [\n"), "wrong", "cannot be read"),
    "a hub that does not answer": ("hub", unreachable_hub, "note", "not reached"),
    "a hub that is off": ("hub", offline_hub, "note", "HF_HUB_OFFLINE"),
    "no key of W&B": ("wandb", no_key, "note", "no key for"),
    "settings of others": ("wandb", foreign_settings, "note", "not obeyed"),
    "no compiler": ("limits", no_compiler, "note", "compile"),
    "one thread on 16 cores": ("cores", one_thread, "note", "OMP_NUM_THREADS=1"),
}


@pytest.fixture(autouse=True)
def in_order(monkeypatch):
    """A machine that reaches everything."""
    reach = doctor_checks._unreachable
    monkeypatch.setattr(doctor_checks, "_unreachable", lambda url: reach(url) if "127.0.0.1" in url else "")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.delenv("WANDB_MODE", raising=False)


MARKED = [pytest.param(key, marks=[pytest.mark.slow] if f"_{PLANTED[key][0]}" in SLOW else []) for key in PLANTED]


@pytest.mark.parametrize("fault", MARKED)
def test_what_is_planted_is_found_with_a_remedy(fault, monkeypatch, tmp_path):
    name, plant, state, words = PLANTED[fault]
    before = {finding.what for finding in CHECK[name]()}
    plant(monkeypatch, tmp_path)
    found = [finding for finding in CHECK[name]() if words in finding.what]
    assert found
    assert not any(words in what for what in before), "it was there before"
    assert {finding.state for finding in found} == {state}
    assert all(finding.remedy for finding in found)


def test_a_disk_with_a_gib_left_is_found(monkeypatch, small_disk):
    disk_of_a_gib(monkeypatch, small_disk)
    (found,) = [finding for finding in CHECK["disks"]() if finding.subject == "disk for cache"]
    assert (found.state, found.what) == ("note", f"1.0 GiB free in '{small_disk}'")
    assert "prune" in found.remedy


@pytest.mark.parametrize("name", ["TLSCALE_CACHE", "HF_HUB_CACHE"])
def test_a_cache_that_is_read_only_is_found(name, monkeypatch, small_disk):
    monkeypatch.setenv("TLSCALE_CACHE", str(small_disk.parent / "cache"))
    if name == "HF_HUB_CACHE":
        monkeypatch.setattr(huggingface_hub.constants, name, str(small_disk / "hub"))
    else:
        monkeypatch.setenv(name, str(small_disk))
    before = list(CHECK["disks"]())
    assert not any("cannot be" in finding.what for finding in before)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    found = [finding for finding in CHECK["disks"]() if finding not in before]
    assert [finding.state for finding in found] == ["note"]
    assert "Read-only file system" in found[0].what
    assert f"Set {'HF_HOME' if name == 'HF_HUB_CACHE' else name} to a folder that you may write to" in found[0].remedy


BOUND = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]


def test_a_cache_of_somebody_else_is_found(tmp_path):
    """Root as well, in a process without the privileges that let it write everywhere."""
    if is_root := os.geteuid() == 0:
        (place := tmp_path / "codes").mkdir()
        os.chown(place, 1, 1)
    else:
        place = Path("/usr/share")
    program = "from tlscale.commands.doctor_disks import DISK_CHECKS as checks; print(*checks[1](), sep='\\n')"
    done = subprocess.run(
        [*(BOUND if is_root else ()), sys.executable, "-c", program],
        env={**os.environ, "TLSCALE_CACHE": str(place.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    (found,) = [line for line in done.stdout.splitlines() if "disk for cache" in line]
    assert "state='note'" in found
    assert f"cannot be written to (Permission denied, it belongs to '{place.owner()}')" in found
    assert "remedy='Set TLSCALE_CACHE to a folder that you may write to" in found


def test_a_missing_home_is_one_finding_and_other_disks_are_examined(monkeypatch, tmp_path):
    no_home(monkeypatch, tmp_path)
    found = [*CHECK["cache"](), *CHECK["disks"]()]
    assert [finding.subject for finding in found if finding.state == "wrong"] == ["cache"]
    assert {"disk for runs", "disk for temporary files"} <= {finding.subject for finding in found}


@pytest.mark.slow
def test_two_processes_that_cannot_meet_are_found(monkeypatch):
    (found,) = CHECK["two_processes"]()
    assert found.state == "ok", found
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nothing0")
    (found,) = CHECK["two_processes"]()
    assert found.state == "wrong"
    assert "nothing0" in found.what
    assert "GLOO_SOCKET_IFNAME" in found.remedy


def test_no_check_stops_the_others_and_none_tells_a_secret(monkeypatch):
    secret = "s3cret" * 6
    monkeypatch.setenv("WANDB_API_KEY", secret)

    def breaks():
        yield Finding("a", "ok", "fine")
        raise ValueError("no\x1b[31m way")

    monkeypatch.setattr(doctor_checks, "CHECKS", (breaks, *(check for check in CHECKS if check.__name__ not in SLOW)))
    found = list(examine())
    assert found[1] == Finding("breaks", "wrong", "cannot be examined: ValueError: no\\x1b[31m way")
    assert len(found) > 8
    assert secret not in repr(found)
    ran = CliRunner().invoke(main, ["doctor", "--json"])
    told = json.loads(ran.stdout)
    assert ran.exit_code == 1
    assert told["wrong"] == sum(each["state"] == "wrong" for each in told["findings"]) >= 1
    assert secret not in ran.output


@pytest.mark.slow
@pytest.mark.parametrize("plant", [no_torchvision, torchvision_of_another_torch])
def test_a_torchvision_that_does_not_fit_is_one_line_of_each_verb(plant, monkeypatch, tmp_path):
    plant(monkeypatch, tmp_path)
    done = subprocess.run([sys.executable, "-m", "tlscale", "new", "."], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("tlscale: torchvision is not installed, or does not fit torch: ")
    assert "`tlscale doctor`" in done.stderr
    assert done.stderr.count("\n") == 1


def test_it_starts_without_an_accelerator():
    """What only some machines have is not imported."""
    done = subprocess.run(
        [sys.executable, "-c", "import tlscale.commands.doctor_checks, sys; sys.exit('timm' in sys.modules)"],
        check=False,
    )
    assert done.returncode == 0
