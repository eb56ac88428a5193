"""The packages that the images for pretraining are made of: fetched, unpacked, and recorded file by file.

Part of make_pretraining_images.py. Promise: a package that cannot be had, and a pattern of `pretraining_packages.yaml`
that fits no file, is an error; and what was used is known by its SHA-256 and compared with what was used the last time.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
PACKAGES = HERE / "pretraining_packages.yaml"
RECORDED = HERE / "pretraining_sources.json"


@dataclass
class Package:
    """One entry of the list of packages, and where it was unpacked."""

    name: str
    origin: str
    licences: str
    groups: list[dict[str, Any]]
    version: str = ""
    root: Path = Path()
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each file that was used, by its path in the package."""

    @property
    def copyright_file(self) -> Path:
        if self.origin == "debian":
            return self.root / "usr/share/doc" / self.name / "copyright"
        return next(path for name in ("LICENSE.txt", "COPYING") for path in self.root.glob(f"*.dist-info/**/{name}"))

    def chosen(self, group: Mapping[str, Any]) -> list[Path]:
        """Return the files of one group, each once, by name."""
        return sorted(self._fitting(group["files"]) - self._fitting(group.get("without", ())))

    def _fitting(self, patterns: Iterable[str]) -> set[Path]:
        """Files, not links: those are the same again.

        Raises:
            SystemExit: a pattern that fits nothing.
        """
        found: set[Path] = set()
        for pattern in patterns:
            fitting = {path for path in self.root.glob(pattern) if path.is_file() and not path.is_symlink()}
            if not fitting:
                sys.exit(f"{self.name} {self.version} has no file {pattern}; {PACKAGES} is out of date for it")
            found |= fitting
        return found

    def use(self, path: Path) -> str:
        """Note that a file is used; returns its name over all packages."""
        inside = path.relative_to(self.root).as_posix()
        self.files[inside] = sha256(path)
        return f"{self.name}/{inside}"


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_packages(file: Path = PACKAGES) -> list[Package]:
    lists = yaml.safe_load(file.read_text(encoding="utf-8"))
    fonts = lists["fonts"]
    return [
        *(Package(entry["package"], entry["from"], entry["licences"], entry["groups"]) for entry in lists["pictures"]),
        *(
            Package(name, "debian", licences, [font_group(fonts["most_of"].get(name, fonts["most"]))])
            for name, licences in fonts["packages"].items()
        ),
    ]


def font_group(most: int) -> dict[str, Any]:
    return {"kind": "letter", "files": ["usr/share/fonts/**/*.[oOtT][tT][fF]"], "most": most}


def fetch(packages: Iterable[Package], cache: Path) -> None:
    """Download and unpack what is not in the cache.

    Raises:
        SystemExit: some cannot be had; it names all of those.
    """
    for folder in ("debian", "wheels", "unpacked"):
        (cache / folder).mkdir(parents=True, exist_ok=True)
    debian = [package for package in packages if package.origin == "debian"]
    wheels = [package for package in packages if package.origin == "wheel"]
    lacking = [package.name for package in debian if not archives(cache, package)]
    if lacking and not download_debian(lacking, cache / "debian"):
        # One that is not there stops all: get the others, and learn which it is.
        for name in lacking:
            download_debian([name], cache / "debian")
    for package in wheels:
        if not archives(cache, package):
            download_wheel(package, cache / "wheels")
    missing = [package.name for package in packages if len(archives(cache, package)) != 1]
    if missing:
        sys.exit(
            f"cannot be had (or in {cache} more than once): {', '.join(missing)}. After `apt-get update` try again."
        )
    for package in packages:
        unpack(package, archives(cache, package)[0], cache / "unpacked")


def archives(cache: Path, package: Package) -> list[Path]:
    if package.origin == "debian":
        return sorted(cache.glob(f"debian/{package.name}_*.deb"))
    return sorted(cache.glob(f"wheels/{package.name.replace('-', '_')}-*.whl"))


def download_debian(names: Sequence[str], folder: Path) -> bool:
    return subprocess.run(["apt-get", "download", *names], cwd=folder, check=False).returncode == 0


def download_wheel(package: Package, folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    subprocess.run([*command, package.name], check=False)


def unpack(package: Package, archive: Path, folder: Path) -> None:
    parts = archive.stem.split("-" if package.origin == "wheel" else "_")
    package.version = parts[1].replace("%3a", ":")
    package.root = folder / archive.stem
    if package.root.is_dir():
        return
    aside = folder / f".{archive.stem}.{os.getpid()}"
    if package.origin == "wheel":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(aside)
    else:
        check_section(package, archive)
        subprocess.run(["dpkg-deb", "-x", str(archive), str(aside)], check=True)
    aside.rename(package.root)


def check_section(package: Package, archive: Path) -> None:
    """Debian's `main`, whose licences allow changed copies to be passed on, has sections without a slash.

    Raises:
        SystemExit: a package of another part of Debian.
    """
    command = ["dpkg-deb", "--field", str(archive), "Section"]
    section = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    if "/" in section:
        sys.exit(f"{package.name} is in Debian's section {section}: not free; take it out of {PACKAGES}")


def sources_of(packages: Iterable[Package]) -> dict[str, Any]:
    """Return the content of sources.json: no times and no paths of this machine."""
    return {
        package.name: {
            "from": package.origin,
            "version": package.version,
            "licences": package.licences,
            "copyright_sha256": sha256(package.copyright_file),
            "files": dict(sorted(package.files.items())),
        }
        for package in sorted(packages, key=lambda package: package.name)
    }


def differences(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Return a line for each package or file that is not the recorded one."""
    lines = []
    for name in sorted({*recorded, *found}):
        old, new = recorded.get(name), found.get(name)
        if old is None or new is None:
            lines.append(f"{name}: {'not recorded' if old is None else 'recorded, and not used'}")
            continue
        lines += [
            f"{name}: {key} {old[key]} -> {new[key]}" for key in ("version", "copyright_sha256") if old[key] != new[key]
        ]
        for path in sorted({*old["files"], *new["files"]}):
            before, now = old["files"].get(path), new["files"].get(path)
            if before != now:
                lines.append(f"{name}/{path}: {'new' if before is None else 'gone' if now is None else 'changed'}")
    return lines


def warn_of_differences(found: Mapping[str, Any]) -> None:
    if not RECORDED.is_file():
        print(
            f"WARNING: {RECORDED} is not there, so nothing says whether these are the usual pictures", file=sys.stderr
        )
        return
    lines = differences(json.loads(RECORDED.read_text(encoding="utf-8")), found)
    if lines:
        shown = "\n  ".join(lines[:50] + [f"and {len(lines) - 50} more"] * (len(lines) > 50))
        print(f"WARNING: not the recorded files, so these are OTHER images than usual:\n  {shown}", file=sys.stderr)


def licences_text(sources: Mapping[str, Any]) -> str:
    lines = [
        "# What these images were made of",
        "",
        "Each crop is part of a picture, or letters in a font, of these packages. `sources.json` has the SHA-256 of",
        "every file; who made each of them stands in the package's copyright file, whose SHA-256 it has as well.",
        "",
        "| package | version | from | files | licences |",
        "|---|---|---|---|---|",
    ]
    for name, entry in sources.items():
        cells = (name, entry["version"], entry["from"], str(len(entry["files"])), entry["licences"])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
