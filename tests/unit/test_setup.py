"""Hold the promises of the repository: names, limits, pages, hosts, Makefile, versions, scripts, what tests leave."""

import ast
import fnmatch
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import click
import pytest

from tlscale import cli, errors

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


# --- Limits of CONTRIBUTING -------------------------------------------------------------------------------------------

MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_A_FUNCTION = 60
MOST_LOOKUPS_OF_THE_WHOLE_RECIPE = 9
MOST_NOUN_OPENINGS = 0.05
# Those above the limits today. Take out what is below; add nothing.
LONGER_FILES: dict[str, int] = {}
LONGER_FUNCTIONS: dict[str, int] = {}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def definitions(source: str) -> Iterator[Function | ast.ClassDef]:
    return (node for node in ast.walk(ast.parse(source)) if isinstance(node, Function | ast.ClassDef))


def functions_over(limit: int, source: str, allowed: dict[str, int]) -> dict[str, int]:
    """Return the functions of more than `limit` lines, or of more than they are allowed, with their lines."""
    functions = [node for node in definitions(source) if isinstance(node, Function)]
    lines = [(node.name, node.end_lineno - node.lineno + 1) for node in functions]
    return {name: count for name, count in lines if count > allowed.get(name, limit)}


def opens_with_a_noun(node: Function | ast.ClassDef, docstring: str) -> bool:
    """A function's docstring starts with a verb; a class's may name the thing, but not by a relative clause."""
    relative = {"What", "Whether", "Where", "Which", "Who", "How", "Why", "That"}
    nouns = {
        "The",
        "A",
        "An",
        "All",
        "One",
        "Each",
        "This",
        "These",
        "Of",
        "Names",
        "Bytes",
        "Images",
        "Codes",
        "Number",
    }
    return docstring.split()[0].rstrip(":,") in (relative if isinstance(node, ast.ClassDef) else relative | nouns)


def test_no_file_is_over_the_limit():
    lines = {str(path.relative_to(REPO)): len(path.read_text().splitlines()) for path in MODULES}
    assert lines
    assert {name: count for name, count in lines.items() if count > LONGER_FILES.get(name, MOST_LINES_OF_A_FILE)} == {}


def test_no_function_is_over_the_limit():
    over = {}
    for path in MODULES:
        name = str(path.relative_to(REPO))
        allowed = {each.split(":")[1]: count for each, count in LONGER_FUNCTIONS.items() if each.startswith(f"{name}:")}
        if found := functions_over(MOST_LINES_OF_A_FUNCTION, path.read_text(), allowed):
            over[name] = found
    assert over == {}


def test_components_take_their_own_section():
    """`setup.recipe.optim.lr` in a component that could be handed `recipe.optim`, or the number."""
    lookups = [
        f"{path.relative_to(REPO)}:{number}"
        for path in MODULES
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for _ in re.findall(r"\bsetup\.recipe\.", line)
    ]
    assert len(lookups) <= MOST_LOOKUPS_OF_THE_WHOLE_RECIPE, lookups


ERRORS = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
# What a remedy begins with.
TO_DO = (
    "add|choose|copy|drop|fetch|fill|fix|free|give|install|keep|lower|make|move|name|put|raise|remove|rename|repair|"
    "resume|run|say|set|start|take|update|use|wait|write"
)


def text_of(node: ast.expr) -> str:
    """Return a literal as a message shows it, with ... for what is computed."""
    values = node.values if isinstance(node, ast.JoinedStr) else [node]
    return "".join(str(value.value) if isinstance(value, ast.Constant) else "..." for value in values)


def verbs_of(command: click.Command) -> list[click.Command]:
    """A command and all below it."""
    below = command.commands.values() if isinstance(command, click.Group) else ()
    return [command, *(verb for group in below for verb in verbs_of(group))]


def hidden_in_problems(source: str) -> list[str]:
    """Return the messages of our errors with a key of the recipe, or what to do, that is not handed over as such."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS and node.args:
            problem, given = text_of(node.args[0]), {keyword.arg for keyword in node.keywords}
            has_remedy = re.search(rf"[;.] (?:{TO_DO})\b", problem, re.IGNORECASE)
            has_key = re.match(r"\w+\.\w+(:| =| has no effect)", problem)
            if (has_remedy and "remedy" not in given) or (has_key and "key" not in given):
                found.append(f"{node.lineno} {problem}")
    return found


def test_errors_are_data():
    found = {dotted(path): hidden for path in MODULES if (hidden := hidden_in_problems(path.read_text()))}
    assert found == {}


@pytest.mark.parametrize("problem", ["optim.lr: is 0", "optim.lr has no effect", "it is 0; set it", "It is 0. Set it."])
def test_keys_and_remedies_in_a_problem_are_found(problem: str):
    assert len(hidden_in_problems(f"raise RecipeError({problem!r})")) == 1
    assert hidden_in_problems("raise RecipeError('is 0; all are', key='optim.lr', remedy='Set it')") == []


OPTIONS = {name for verb in verbs_of(cli.main) for option in verb.params for name in option.opts if name[:2] == "--"}


def options_in_text(source: str) -> list[str]:
    """Return the strings with an option of ours that Python's callers would read, too.

    Docstrings, lines to type (in quotes) and the arguments of programs (in lists) are no such strings.
    """
    found, tree = [], ast.parse(source)
    meant = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.List | ast.Tuple):
            meant |= {id(item) for item in node.elts}
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            meant |= {id(argument) for argument in node.args if node.func.id == "Wording"}
        if isinstance(node, ast.FormattedValue):
            made = ast.unparse(node.value)
            if "option(" in made or ("flag(" in made and not made.endswith(".shell")):
                found.append(f"{node.lineno} {made} in an f-string")
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in meant:
            named = re.findall(r"(?<![\w-])--[a-z-]+", re.sub(r"'tlscale [^']*'|`tlscale [^`]*`", "", node.value))
            found += [f"{node.lineno} {name}" for name in named if name in OPTIONS]
    return found


def test_errors_name_options_by_markers():
    assert {"--resume", "--out", "--min-steps", "--keep-gib"} < OPTIONS
    at_the_prompt = {"tlscale.cli", "tlscale.cli_parts"}  # there each option is made
    texts = {dotted(path): options_in_text(path.read_text()) for path in MODULES if dotted(path) not in at_the_prompt}
    assert {name: found for name, found in texts.items() if found} == {}


@pytest.mark.parametrize(
    "source", ['raise E("x", remedy="Give --out")', 'f"{x}: --resume goes on"', "f'{option(\"out\")} is x'"]
)
def test_options_in_text_are_found(source: str):
    assert len(options_in_text(source)) == 1
    assert options_in_text("f(\"'tlscale plan x --json'\", ['--out', x], 'Give ' + option('out'))") == []


def test_docstrings_open_with_a_verb():
    """Ruff's D401 asks for the imperative, but knows few nouns and passes over properties and classes."""
    docstrings = [
        (f"{path.relative_to(REPO)}:{node.lineno}", node, docstring)
        for path in MODULES
        for node in definitions(path.read_text())
        if (docstring := ast.get_docstring(node))
    ]
    opening = [f"{where} {text.splitlines()[0]}" for where, node, text in docstrings if opens_with_a_noun(node, text)]
    assert len(opening) <= MOST_NOUN_OPENINGS * len(docstrings), "\n".join(opening)


def test_the_limits_find_what_is_over_them():
    source = 'class A:\n    def long(self):\n        """The long one."""\n        return 1\n'
    assert functions_over(2, source, {}) == {"long": 3}
    assert functions_over(2, source, {"long": 3}) == functions_over(3, source, {}) == {}
    found = {node.name: opens_with_a_noun(node, "The long one.") for node in definitions(source)}
    assert found == {"A": False, "long": True}


@pytest.mark.parametrize("name", ["loop", "state"])
def test_the_loop_says_why(name: str):
    """Of its lines of code, a comment goes with every seventh at least."""
    source = (REPO / "tlscale" / "training" / f"{name}.py").read_text()
    docstrings = {
        number
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    lines = [line.strip() for number, line in enumerate(source.splitlines(), 1) if number not in docstrings]
    comments = sum(line.startswith("#") for line in lines)
    assert comments >= 0.15 * (sum(map(bool, lines)) - comments)


# The files that one opens for each, in docs/architecture.md.
MOST_FILES = {"One training step": 6, "An image": 9, "A recipe key": 7, "A checkpoint": 8}


def test_the_ways_through_the_code_are_short():
    text = (REPO / "docs" / "architecture.md").read_text()
    ways = {}
    for section in text.split("\n## ")[1:]:
        heading = section.splitlines()[0].split(",")[0]
        ways[heading] = re.findall(r"^\d+\. `(tlscale/[\w./]+)`", section, flags=re.MULTILINE)
    assert ways.keys() == MOST_FILES.keys()
    assert [path for paths in ways.values() for path in paths if not (REPO / path).is_file()] == []
    assert {name: len(set(paths)) for name, paths in ways.items() if not 1 < len(set(paths)) <= MOST_FILES[name]} == {}


# --- Pages ------------------------------------------------------------------------------------------------------------

PAGES = sorted([*REPO.glob("*.md"), *(REPO / "docs").rglob("*.md"), REPO / "launch" / "README.md"])


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", without_code(page.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_read_in_three_minutes():
    assert 300 < len(without_code((REPO / "README.md").read_text()).split()) <= 900


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_links_lead_somewhere(page: Path):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if link.startswith(("http:", "https:", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_tests_and_modules_that_pages_name_exist():
    missing = []
    for page in PAGES:
        if "adr" in page.parts or page.name == "CHANGELOG.md":  # history
            continue
        for path, test in re.findall(r"`((?:tests|tlscale)/[\w./]+?)(?:::(\w+))?[`:]", page.read_text()):
            if not (REPO / path).exists() or (test and f"def {test}(" not in (REPO / path).read_text()):
                missing.append(f"{page.name}: {path} {test}")
    assert missing == []


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


def test_make_test_floors_installs_each_floor():
    command = [sys.executable, REPO / "scripts" / "floors.py"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    pinned = {normal(name): version for name, _, version in (line.partition("==") for line in lines)}
    own = [normal(re.split(r"[<>=~! ]", line)[0]) for line in PYPROJECT["project"]["dependencies"]]
    assert [name for name in own if name not in pinned] == ["torchvision"]
    assert [name for name in own if name in pinned and wanted()[name] != f">={pinned[name]}"] == []
    assert pinned["pytest"] == constraints()["pytest"]


NOT_INSTALLED = {"peft": "brings all of transformers along", "torch_xla": "that of `make test-xla`"}


def test_what_tests_would_be_skipped_without_is_in_an_extra():
    text = "".join(path.read_text() for path in (REPO / "tests").rglob("*.py"))
    names = set(re.findall(r'importorskip\("([a-z0-9_]+)', text))
    assert names > {"torchmetrics", "mapie", *NOT_INSTALLED}
    assert {normal({"sklearn": "scikit-learn"}.get(name, name)) for name in names - set(NOT_INSTALLED)} <= set(wanted())


def test_torch_and_torchvision_are_a_registry_pair():
    # A local version (`+cpu`) exists in one index only, and cannot be had from the registry.
    assert "+" not in constraints()["torch"] + constraints()["torchvision"]


def test_the_root_stays_small():
    root = REPO / "tlscale"
    modules = {path.name for path in root.glob("*.py")}
    assert modules == {"__init__.py", "__main__.py", "cli.py", "cli_parts.py", "errors.py", "run.py"}
    assert len([path for path in root.iterdir() if list(path.glob("*.py"))]) == 9


def test_linux_only_packages_are_guarded():
    lines = (REPO / "constraints.txt").read_text().splitlines()
    guarded = [line for line in lines if line.startswith(("nvidia-", "cuda-", "triton=="))]
    assert guarded
    assert all(line.endswith('; sys_platform == "linux"') for line in guarded)


def test_git_ignores_nothing_that_the_wheel_needs():
    # hatchling leaves out what git ignores, without a word.
    needed = [
        *(str(path.relative_to(REPO)) for path in MODULES),
        "tlscale/data/sample/fashion_mnist.parquet",
        "tlscale/py.typed",
    ]
    assert all((REPO / name).is_file() for name in needed)
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
