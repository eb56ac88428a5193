"""The promises of the repository itself: names, hosts, Makefile, tested versions, scripts, what tests leave behind."""

import fnmatch
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())
MODULES = sorted((REPO / "tlscale").rglob("*.py"))
# Put together here, so that this file does not name them itself.
REGISTRY_HOSTS = [
    ".".join(parts) for parts in (("pypi", "org"), ("pythonhosted", "org"), ("download", "pytorch", "org"))
]


def tracked_files() -> list[Path]:
    """Files that git knows or would add; all that are not hidden where this is no git checkout."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    if listed.returncode == 0:
        files = [REPO / name for name in listed.stdout.split("\0") if name]
    else:
        files = [path for path in REPO.rglob("*") if not any(part.startswith(".") for part in path.parts)]
    return [path for path in files if path.is_file()]


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")


def test_every_folder_of_tests_is_looked_into(pytestconfig):
    """pytest passes over some names, "dist" among them, without a word."""
    passed_over = pytestconfig.getini("norecursedirs")
    folders = {parent for path in (REPO / "tests").rglob("test_*.py") for parent in path.relative_to(REPO).parents}
    names = {folder.name for folder in folders}
    assert "dist" in names
    assert [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in passed_over)] == []


def test_no_module_hides_a_standard_or_third_party_one():
    # `accelerate launch tlscale/run.py` puts tlscale/ first on sys.path.
    taken = sys.stdlib_module_names | {name for name in packages_distributions() if name.isidentifier()}
    names = {path.stem if path.stem != "__init__" else path.parent.name for path in (REPO / "tlscale").glob("*.py")}
    names |= {path.name for path in (REPO / "tlscale").iterdir() if path.is_dir()}
    assert "errors" in names
    assert (names - {"tlscale"}) & taken == set()


def test_no_module_is_a_drawer_for_odds_and_ends():
    assert MODULES
    drawers = {"utils", "util", "common", "helpers", "helper", "base", "misc"}
    assert [dotted(path) for path in MODULES if drawers & set(dotted(path).split("."))] == []


def test_every_package_has_its_row():
    rows = next(contract for contract in PYPROJECT["tool"]["importlinter"]["contracts"] if contract["id"] == "rows")
    names = {dotted(path).split(".")[1] for path in MODULES if dotted(path) != "tlscale"}
    assert names == {row.removeprefix("tlscale.") for row in rows["layers"]}


def test_no_registry_host_is_named():
    naming = []
    for path in tracked_files():
        if path.suffix in {".parquet", ".png", ".jpg", ".gz", ".safetensors"}:
            continue
        text = path.read_text(errors="replace")
        naming += [f"{path.relative_to(REPO)}: {host}" for host in REGISTRY_HOSTS if host in text]
    assert naming == []


def makefile_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (REPO / "Makefile").read_text(), flags=re.MULTILINE))


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", ".ci/run"])
def test_make_targets_that_are_named_exist(document: str):
    text = (REPO / document).read_text()
    command = r"""(?:`|^\s*(?:\$ )?)make (?:[A-Z_]+=(?:'[^']*'|"[^"]*"|\S+) )*([a-z][a-z-]*)"""
    named = set(re.findall(command, text, flags=re.MULTILINE))
    assert named, f"{document} names no target; then this test tests nothing"
    assert named <= makefile_targets()


def test_makefile_has_the_two_commands_of_the_readme():
    assert {"demo", "test", "lint", "format", "test-unit", "test-dist", "wheel", "clean"} <= makefile_targets()


def constraints() -> dict[str, str]:
    lines = (line.split("#")[0].split(";")[0].strip() for line in (REPO / "constraints.txt").read_text().splitlines())
    return {normal(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def wanted() -> dict[str, str]:
    """Requirement by normalised name, of the package and all its extras."""
    project = PYPROJECT["project"]
    lines = [*project["dependencies"], *(line for lines in project["optional-dependencies"].values() for line in lines)]
    split = (re.fullmatch(r"([A-Za-z0-9._-]+)(\[[^]]*\])?(.*)", line) for line in lines)
    return {normal(match[1]): match[3] for match in split if match}


def test_every_dependency_has_a_tested_version():
    assert set(wanted()) - {"tlscale"} <= constraints().keys()


def test_tested_versions_are_not_below_the_floors():
    tested = constraints()
    floors = {name: spec[2:] for name, spec in wanted().items() if spec.startswith(">=")}
    assert {"torch", "timm", "accelerate", "datasets"} <= floors.keys()

    def numbers(version: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", version)]

    assert [name for name, floor in floors.items() if numbers(tested[name]) < numbers(floor)] == []


def test_torch_and_torchvision_are_a_registry_pair():
    # A local version (`+cpu`) exists in one index only, and cannot be had from the registry.
    assert "+" not in constraints()["torch"] + constraints()["torchvision"]


def test_linux_only_packages_are_guarded():
    lines = (REPO / "constraints.txt").read_text().splitlines()
    guarded = [line for line in lines if line.startswith(("nvidia-", "cuda-", "triton=="))]
    assert guarded
    assert all(line.endswith('; sys_platform == "linux"') for line in guarded)


def test_git_ignores_nothing_that_the_wheel_needs():
    # hatchling leaves out what git ignores, without a word.
    needed = [*(str(path.relative_to(REPO)) for path in MODULES), "tlscale/data/sample/train.parquet"]
    result = subprocess.run(
        ["git", "check-ignore", "--no-index", "--stdin"],
        cwd=REPO,
        input="\n".join(needed),
        capture_output=True,
        text=True,
    )
    if result.returncode == 128:
        pytest.skip("not a git checkout")
    assert result.stdout == ""


FETCH = REPO / "scripts" / "get_fashion_mnist.sh"


def run_script(script: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(["/bin/bash", script], env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result


@pytest.mark.parametrize("variable", ["TLSCALE_CACHE", "TLSCALE_DATA"])
def test_fetch_script_finds_what_is_there(tmp_path: Path, fashion_mnist_dir: Path, variable: str):
    there = tmp_path / "data" / "fashion-mnist"
    there.parent.mkdir()
    there.symlink_to(fashion_mnist_dir)
    top = {"TLSCALE_CACHE": tmp_path, "TLSCALE_DATA": tmp_path / "data"}[variable]
    result = run_script(FETCH, {"PATH": os.environ["PATH"], "HOME": "/nonexistent", variable: str(top)})
    assert result.stdout == f"Fashion-MNIST: already in {there}\n"


def test_fetch_script_says_so_where_nothing_can_be_had(tmp_path: Path):
    # A PATH without apt-get is a machine that is not Debian; the copy looks for the system's files in a folder without.
    script = tmp_path / "get.sh"
    text = FETCH.read_text()
    assert text.count("/usr/share/datasets/") == 1
    script.write_text(text.replace("/usr/share/datasets/", f"{tmp_path}/none/"))
    result = run_script(script, {"PATH": str(tmp_path), "HOME": str(tmp_path)})
    assert "NOT FOUND" in result.stderr
    assert "fallback: sample" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["get.sh"]


@pytest.mark.slow
def test_a_test_that_leaves_something_behind_fails(tmp_path: Path):
    (tmp_path / "conftest.py").write_text((REPO / "tests" / "conftest.py").read_text())
    (tmp_path / "test_leaks.py").write_text(
        "import os\n"
        "import torch.distributed as dist\n"
        "def test_variable(): os.environ['LEFT_BEHIND'] = '1'\n"
        "def test_group(tmp_path): dist.init_process_group('gloo', f'file://{tmp_path}/s', rank=0, world_size=1)\n"
        "def test_clean(monkeypatch):\n"
        "    assert 'LEFT_BEHIND' not in os.environ and not dist.is_initialized()\n"
        "    monkeypatch.setenv('LEFT_BEHIND', '1')\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull, str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert "3 passed, 2 errors" in output
    assert "variables changed: ['LEFT_BEHIND']" in output
    assert "process group open" in output


def test_tests_cannot_reach_the_home_directory_or_the_hub():
    import huggingface_hub.constants

    assert huggingface_hub.constants.HF_HUB_OFFLINE
    assert "tlscale-tests-" in os.environ["HOME"]
    assert os.environ["TLSCALE_CACHE"].startswith(os.environ["HOME"])
