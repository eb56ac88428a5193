"""What a power loss leaves of a run: every write, name and flush below a folder is recorded, and cut off at any place.

As ALICE (Pillai et al., OSDI 2014) has it: after a power loss a file has what was flushed of it, and of the rest
anything; a folder has the names that it had when it was flushed, and of later changes any. `Recorder` looks at the
whole folder before and after each operation of Python's on files, so it does not matter who writes (safetensors and
Arrow do by themselves). A flush counts only where `os.fsync` was called: of a file for its content, of a folder for its
names.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

_OPERATIONS = ("rename", "replace", "unlink", "remove", "rmdir", "mkdir", "truncate", "link", "symlink")
Names = dict[str, int]  # name -> object
Tree = dict[str, object]  # path -> content, None of a folder


@dataclass(frozen=True)
class Moment:
    """The folder between two operations: objects (files and folders) by number, and what was flushed of each."""

    what: str
    names: dict[int, Names]
    contents: dict[int, bytes]
    flushed_names: dict[int, Names]
    flushed_contents: dict[int, bytes]

    def tree(self, kind: str) -> Tree:
        """A state that the disk may be found in; `kind` is one of KINDS."""
        return dict(self._below(0, "", KINDS[kind]))

    def _below(self, folder: int, path: str, kind: Kind) -> Iterator[tuple[str, object]]:
        now, flushed = self.names.get(folder, {}), self.flushed_names.get(folder, {})
        for name, number in sorted(kind.names(flushed, now).items()):
            place = f"{path}/{name}".lstrip("/")
            if number in self.names or number in self.flushed_names:
                yield place, None
                yield from self._below(number, place, kind)
            else:
                yield place, kind.content(self.flushed_contents.get(number, b""), self.contents.get(number))


@dataclass(frozen=True)
class Kind:
    """How much of what was not flushed is there."""

    names: Callable[[Names, Names], Names]
    content: Callable[[bytes, bytes | None], bytes]


def _flushed(flushed: bytes, now: bytes | None) -> bytes:
    return flushed


def _half(flushed: bytes, now: bytes | None) -> bytes:
    if now is None or not now.startswith(flushed):
        return flushed if now is None else now[: len(now) // 2]
    return now[: (len(flushed) + len(now)) // 2]


def _none(flushed: bytes, now: bytes | None) -> bytes:
    """Of a file that was written anew even what was flushed before is gone."""
    return flushed if now is None or now.startswith(flushed) else b""


KINDS = {
    "only what was flushed": Kind(lambda flushed, now: flushed, _flushed),
    "all names, empty files": Kind(lambda flushed, now: now, _none),
    "all names, half of the files": Kind(lambda flushed, now: now, _half),
    "new names, and the old ones": Kind(lambda flushed, now: {**flushed, **now}, _half),
    "no new names, without the old ones": Kind(
        lambda flushed, now: {name: number for name, number in flushed.items() if name in now}, _none
    ),
}


@dataclass
class Recorder:
    """Within: moments of the folder `root`, which is taken as flushed at first."""

    root: Path
    moments: list[Moment] = field(default_factory=list)
    _active: ClassVar[list[Recorder]] = []

    def __enter__(self) -> Recorder:
        self._numbers: dict[int, int] = {}  # inode -> object
        self._count = 0
        self._stamps: dict[int, tuple[int, int]] = {}
        self._contents: dict[int, bytes] = {}
        self._flushed_names: dict[int, Names] = {}
        self._flushed_contents: dict[int, bytes] = {}
        self._names: dict[int, Names] = {}
        self._plain = {name: getattr(os, name) for name in (*_OPERATIONS, "fsync")}
        self._look()
        self._flushed_names = {number: dict(names) for number, names in self._names.items()}
        self._flushed_contents = dict(self._contents)
        for name in _OPERATIONS:
            setattr(os, name, self._recorded(name))
        os.fsync = self._fsync
        if not Recorder._active:
            sys.addaudithook(Recorder._note)  # there is no way to remove one
        Recorder._active[:] = [self]
        return self

    def __exit__(self, *_) -> None:
        Recorder._active[:] = [None]  # type: ignore[list-item]
        for name, function in self._plain.items():
            setattr(os, name, function)
        self._add("the end")

    @staticmethod
    def _note(event: str, args: tuple) -> None:
        active = Recorder._active[0] if Recorder._active else None
        if event == "open" and active is not None and isinstance(args[0], str) and args[2] & os.O_ACCMODE:
            active._add(f"before {args[0]} is opened")

    def _recorded(self, name: str) -> Callable:
        plain = self._plain[name]

        def operation(*args, **keys):
            done = plain(*args, **keys)
            self._add(f"after {name} {args[0]}")
            return done

        return operation

    def _fsync(self, descriptor: int) -> None:
        self._plain["fsync"](descriptor)
        self._look()
        number = self._numbers.get(os.fstat(descriptor).st_ino)
        if number in self._contents:
            self._flushed_contents[number] = self._contents[number]
        elif number in self._names:
            self._flushed_names[number] = dict(self._names[number])
        self._add(f"after fsync of {number}")

    def _add(self, what: str) -> None:
        self._look()
        names = {number: dict(own) for number, own in self._names.items()}
        flushed = {number: dict(own) for number, own in self._flushed_names.items()}
        moment = Moment(what, names, dict(self._contents), flushed, dict(self._flushed_contents))
        if not self.moments or any(
            getattr(moment, part) != getattr(self.moments[-1], part)
            for part in ("names", "contents", "flushed_names", "flushed_contents")
        ):
            self.moments.append(moment)

    def _look(self) -> None:
        """Take up what the folder is now."""
        seen: dict[int, tuple[str, os.stat_result]] = {}
        names: dict[int, dict[str, int]] = {}  # by inode
        places = [str(self.root)]
        seen[os.stat(self.root).st_ino] = (str(self.root), os.stat(self.root))
        while places:
            place = places.pop()
            own = names.setdefault(os.stat(place).st_ino, {})
            for entry in os.scandir(place):
                found = entry.stat(follow_symlinks=False)
                if entry.name.endswith(".lock") or "/locks" in place:
                    continue  # of those nothing is expected after a power loss
                own[entry.name] = found.st_ino
                seen[found.st_ino] = (entry.path, found)
                if stat.S_ISDIR(found.st_mode):
                    places.append(entry.path)
        for inode in set(self._numbers) - set(seen):  # the next file of this inode is another
            number = self._numbers.pop(inode)
            self._contents.pop(number, None)
        for inode, (path, found) in seen.items():
            if inode not in self._numbers:
                self._numbers[inode], self._count = self._count, self._count + 1
                self._stamps.pop(inode, None)
            stamp = (found.st_mtime_ns, found.st_size)
            if stat.S_ISREG(found.st_mode) and self._stamps.get(inode) != stamp:
                self._stamps[inode] = stamp
                with open(path, "rb") as file:
                    self._contents[self._numbers[inode]] = file.read()
        self._names = {
            self._numbers[inode]: {name: self._numbers[child] for name, child in own.items()}
            for inode, own in names.items()
        }


def states(moments: list[Moment]) -> Iterator[tuple[str, Tree]]:
    """All states that a power loss at any moment may leave, each once, with the first moment and kind that do."""
    seen = set()
    for number, moment in enumerate(moments):
        for kind in KINDS:
            tree = moment.tree(kind)
            parts = sorted((path, None if c is None else hashlib.sha256(c).hexdigest()) for path, c in tree.items())
            digest = hashlib.sha256(repr(parts).encode()).hexdigest()
            if digest not in seen:
                seen.add(digest)
                yield f"moment {number}, {moment.what}: {kind}", tree


def put(tree: Tree, folder: Path) -> Path:
    """Make a folder of a state."""
    folder.mkdir(parents=True)
    for path, content in tree.items():
        if content is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(content)
    return folder
