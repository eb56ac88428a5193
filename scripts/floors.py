#!/usr/bin/env python3
"""Print the lowest versions that pyproject.toml allows, as constraints for pip: what `make test-floors` installs.

What tlscale needs gets its floor, extras and the tools of tests the version of constraints.txt; the rest is left to
pip, also torchvision, which has none.
"""

import re
import tomllib
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
_FLOOR = re.compile(r"(?P<name>[\w.-]+)\s*>=\s*(?P<version>[\w.]+)$")


def floors(dependencies: list[str]) -> list[str]:
    """Return `name==version` for each `name>=version`."""
    found = (_FLOOR.match(dependency) for dependency in dependencies)
    return [f"{match['name']}=={match['version']}" for match in found if match is not None]


def tools(extras: dict[str, list[str]], constraints: str) -> list[str]:
    """Return the lines of constraints.txt that are of an extra."""
    names = {_plain(re.split(r"[\[<>=~! ]", wanted)[0]) for group in extras.values() for wanted in group}
    return [line for line in constraints.splitlines() if "==" in line and _plain(line.split("==")[0]) in names]


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> None:
    """Print them."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    constraints = (REPO / "constraints.txt").read_text()
    print("\n".join([*floors(project["dependencies"]), *tools(project["optional-dependencies"], constraints)]))


if __name__ == "__main__":
    main()
