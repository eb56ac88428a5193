"""Damage to folders of files: what disks, copies and hands do to them, and what an attacker would write there."""

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**63, 2**70, -(2**70), 0.5, -1.5, 1e308, float("nan"), float("inf")),
    *("", "x", "../../etc/passwd", "\x1b[2J", "a" * 5000, [], [[]], ["a"], [1, 2, 3], [2**62] * 4, {}, {"a": 1}),
)


def _deep() -> Any:
    value: Any = 0
    for _ in range(300):
        value = [value]
    return value


def mutate(folder: Path, rng: random.Random) -> str:
    """Change one file below the folder, or two, at random; return what was done."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = rng.choice(files)
    kinds: list[Callable[[Path, random.Random], str]] = [_flip, _flip, _flip_many, _cut, _zero, _append, _empty, _lose]
    kinds += [_folder, _swap]
    if path.suffix == ".json":
        kinds = [*kinds[:5], _lose, *[_value] * 8, _key, _key, _nest]
    elif path.suffix == ".safetensors":
        kinds += [_header, _header, _header, _length]
    kind = rng.choice(kinds)
    return f"{kind.__name__.strip('_')} {path.name}: {kind(path, rng)}"


def _flip(path: Path, rng: random.Random) -> str:
    content = bytearray(path.read_bytes())
    at, bit = rng.randrange(max(len(content), 1)), rng.randrange(8)
    if content:
        content[at] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {at} of {len(content)}"


def _flip_many(path: Path, rng: random.Random) -> str:
    content = bytearray(path.read_bytes())
    for _ in range(rng.randrange(2, 200) if content else 0):
        content[rng.randrange(len(content))] = rng.randrange(256)
    path.write_bytes(content)
    return "many bytes"


def _cut(path: Path, rng: random.Random) -> str:
    content = path.read_bytes()
    length = rng.randrange(max(len(content), 1))
    path.write_bytes(content[:length])
    return f"{length} bytes of {len(content)}"


def _zero(path: Path, rng: random.Random) -> str:
    content = bytearray(path.read_bytes())
    start = rng.randrange(max(len(content), 1))
    stop = min(start + rng.randrange(1, 5000), len(content))
    content[start:stop] = bytes(stop - start)
    path.write_bytes(content)
    return f"{start} to {stop}"


def _append(path: Path, rng: random.Random) -> str:
    with path.open("ab") as file:
        file.write(rng.randbytes(rng.randrange(1, 100)))
    return "bytes"


def _empty(path: Path, rng: random.Random) -> str:
    path.write_bytes(b"")
    return "nothing left"


def _lose(path: Path, rng: random.Random) -> str:
    path.unlink()
    return "gone"


def _folder(path: Path, rng: random.Random) -> str:
    path.unlink()
    path.mkdir()
    return "a folder in its place"


def _swap(path: Path, rng: random.Random) -> str:
    other = rng.choice(sorted(each for each in path.parent.iterdir() if each.is_file()))
    aside = path.with_name("aside")
    shutil.move(path, aside)
    if other != path:
        shutil.move(other, path)
    shutil.move(aside, other)
    return f"with {other.name}"


def _length(path: Path, rng: random.Random) -> str:
    """The length of the header: more than there is, or all that there can be."""
    content = bytearray(path.read_bytes())
    length = rng.choice([0, 1, 7, len(content), len(content) - 8, 100_000_000, 2**31, 2**63, 2**64 - 1])
    content[:8] = struct.pack("<Q", length)
    path.write_bytes(content)
    return f"{length}"


def _header(path: Path, rng: random.Random) -> str:
    """Another type, shape, place or name of a tensor; the header keeps its length where it can."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    if not names:
        return _cut(path, rng)
    name = rng.choice(names)
    match rng.randrange(5):
        case 0:
            header[name]["dtype"] = rng.choice(["F64", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F4", "X", "", 3])
        case 1:
            shape = header[name]["shape"]
            header[name]["shape"] = rng.choice([shape[::-1], [*shape, 1], shape[1:], [2**62, 4], [-1], [0], "x", [1.5]])
        case 2:
            values = [[0, 0], [0, 2**63], [-4, 4], [8, 4], ["a", "b"], [1], None]
            header[name]["data_offsets"] = rng.choice(values)
        case 3:
            header[rng.choice(["", "x", name + ".", "__metadata__"])] = header.pop(name)
        case _:
            header[name] = rng.choice(_VALUES)
    made = json.dumps(header).encode()
    made = made.ljust(length) if len(made) < length else made
    path.write_bytes(struct.pack("<Q", len(made)) + made + content[8 + length :])
    return f"of {name}"


# -- JSON -------------------------------------------------------------------------------------------------------------


def _places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place, *(found for key, item in items for found in _places(item, (*place, key)))]


def _changed(path: Path, rng: random.Random, change: Callable[[Any, Any], None]) -> str:
    try:
        plain = json.loads(path.read_text())
        place = rng.choice([place for place in _places(plain) if place])
    except (ValueError, IndexError):
        return _cut(path, rng)
    within = plain
    for key in place[:-1]:
        within = within[key]
    change(within, place[-1])
    path.write_text(json.dumps(plain))
    return ".".join(map(str, place))


def _value(path: Path, rng: random.Random) -> str:
    value = rng.choice(_VALUES)

    def change(within: Any, key: Any) -> None:
        within[key] = value

    return f"{_changed(path, rng, change)} = {value!r:.40}"


def _key(path: Path, rng: random.Random) -> str:
    name = rng.choice([None, "x", "__class__", ""])

    def change(within: Any, key: Any) -> None:
        value = within.pop(key)
        if name is not None and isinstance(within, dict):
            within[name] = value

    return f"{_changed(path, rng, change)} renamed {name!r}"


def _nest(path: Path, rng: random.Random) -> str:
    if rng.random() < 0.5:
        path.write_text("[" * 100_000)
        return "brackets"

    def change(within: Any, key: Any) -> None:
        within[key] = _deep()

    return f"{_changed(path, rng, change)} nested"
