"""Read a file of a checkpoint in one opening: hash it, then map into memory what was hashed.

Promise: a file is read once, and what is used of it has the hash that its manifest says. There is no pickle: a header
is JSON, and tensors are views of the mapped bytes.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

FileInfo = Mapping[str, Any]  # bytes, sha256; as in a manifest

# The words of the safetensors format (https://huggingface.co/docs/safetensors).
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_SHARDS_OF = "DCP_SHARDING_INFO"  # the key in a header in which torch's distributed checkpoint has the rows of shards


class CorruptionError(Exception):
    """Report that a checkpoint is not what was saved, and in which file."""


class CheckpointFile:
    """Read a file of a checkpoint in one opening; `info` is of the file in the manifest.

    Raises:
        CorruptionError: there is no such file of this size.
    """

    def __init__(self, folder: Path, name: str, info: FileInfo) -> None:
        self.name, self._info, path = name, info, folder / name
        if not path.is_file():
            raise CorruptionError(f"{name} is missing")
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise CorruptionError(f"{name} cannot be read ({error})") from error
        size = os.fstat(self._file.fileno()).st_size
        if size != info["bytes"]:
            self._file.close()
            raise CorruptionError(f"{name} has {size} bytes instead of {info['bytes']}")

    def __enter__(self) -> CheckpointFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def verify(self) -> None:
        """Read the file and compare its hash; raise `CorruptionError` where it cannot be read, or has changed."""
        try:
            # By reading: a mapped page that the disk cannot give would kill the process.
            self._file.seek(0)
            found = hashlib.file_digest(self._file, "sha256").hexdigest()
        except OSError as error:
            raise CorruptionError(f"{self.name} cannot be read ({error})") from error
        if found != self._info["sha256"]:
            raise CorruptionError(f"{self.name} has changed since it was written")

    def plain(self) -> Any:
        """Return the JSON value that the file is."""
        try:
            self._file.seek(0)
            return json.loads(self._file.read())
        except (OSError, ValueError, RecursionError) as error:
            raise CorruptionError(f"{self.name} cannot be read ({error})") from error

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of a safetensors file, by name, as views of its content."""
        return {name: values for name, (_, values) in self.rows().items()}

    def rows(self) -> dict[str, tuple[int, Tensor]]:
        """Return the first row and the rows that a file of shards has of each tensor, by name.

        Raises:
            CorruptionError: it has no such header.
        """
        try:
            # By reading, as `verify`; and private, so that the file stays as it is whatever becomes of a tensor.
            self._file.seek(0)
            data_at = 8 + int.from_bytes(self._file.read(8), "little")
            if data_at > self._info["bytes"]:
                raise ValueError(f"it would have {data_at - 8} bytes")
            header = json.loads(self._file.read(data_at - 8))
            content = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
            offsets = json.loads(header.pop("__metadata__", {}).get(_SHARDS_OF, "{}"))
            return {
                name: (
                    _whole_number(offsets[name]["saved_offsets"][0]) if name in offsets else 0,
                    _view(content, data_at, entry),
                )
                for name, entry in header.items()
            }
        # The last two of brackets in brackets, and of numbers that no tensor has.
        except (ValueError, LookupError, TypeError, AttributeError, OSError, RuntimeError, OverflowError) as error:
            raise CorruptionError(f"{self.name} has no header of safetensors ({error})") from error


def _whole_number(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r} is the number of no row")
    return value


def _view(content: mmap.mmap, data_at: int, entry: Mapping[str, Any]) -> Tensor:
    begin, end = entry["data_offsets"]
    dtype, shape = _DTYPES[entry["dtype"]], torch.Size(entry["shape"])
    if shape.numel() == 0:  # of no bytes there is no view
        return torch.empty(shape, dtype=dtype)
    count = (end - begin) // dtype.itemsize
    return torch.frombuffer(content, dtype=dtype, count=count, offset=data_at + begin).view(shape)


# -- shards ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorPart:
    """Hold the rows of a sharded tensor that one process needs."""

    shape: torch.Size  # of the whole tensor
    values: Tensor


def read_part(folder: Path, shards: Mapping[str, FileInfo], rank: int, world_size: int) -> dict[str, TensorPart]:
    """Read this process's rows of all tensors in files of shards, whatever number of processes wrote them.

    Its rows are those that DTensors have there. It reads the headers of all files, and those files whole that have rows
    of its; so that each is verified by some process, the process `i` also reads the file `i`, modulo their number.

    Raises:
        CorruptionError: in a file that this process reads.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(CheckpointFile(folder, *item)) for item in sorted(shards.items())]
        found = [file.rows() for file in files]
        shapes = _whole_shapes(found)
        mine = {name: _rows_of(shape[0], rank, world_size) for name, shape in shapes.items()}
        for number, (file, rows) in enumerate(zip(files, found, strict=True)):
            if number % world_size == rank or any(_overlap(*rows[name], mine[name]) for name in rows):
                file.verify()
        return {name: TensorPart(shape, _collect(name, shape, mine[name], found)) for name, shape in shapes.items()}


def _whole_shapes(found: Sequence[Mapping[str, tuple[int, Tensor]]]) -> dict[str, torch.Size]:
    shapes: dict[str, torch.Size] = {}
    for rows in found:
        for name, (start, values) in rows.items():
            most = max(start + len(values), shapes[name][0] if name in shapes else 0)
            shapes[name] = torch.Size((most, *values.shape[1:]))
    return shapes


def _rows_of(num_rows: int, rank: int, world_size: int) -> range:
    most = -(-num_rows // world_size)  # as `torch.chunk` cuts
    return range(min(rank * most, num_rows), min((rank + 1) * most, num_rows))


def _overlap(start: int, values: Tensor, mine: range) -> range:
    return range(max(start, mine.start), max(min(start + len(values), mine.stop), start, mine.start))


def _collect(name: str, shape: torch.Size, mine: range, found: Sequence[Mapping[str, tuple[int, Tensor]]]) -> Tensor:
    pieces = [rows[name] for rows in found if name in rows]
    commons = [_overlap(start, values, mine) for start, values in pieces]
    if sum(map(len, commons)) != len(mine) or len({(values.dtype, values.shape[1:]) for _, values in pieces}) > 1:
        raise CorruptionError(f"rows of {name} are in none of its files, or in several")
    collected = torch.empty((len(mine), *shape[1:]), dtype=pieces[0][1].dtype)
    for common, (start, values) in zip(commons, pieces, strict=True):
        collected[common.start - mine.start : common.stop - mine.start] = values[
            common.start - start : common.stop - start
        ]
    return collected


def shard_key(group: str, name: str) -> str:
    """Return the name of a tensor in the files of shards, which hold those of all groups."""
    return f"{group}/{name}"


def add_parts(
    tensors: Mapping[str, Mapping[str, Tensor]], parts: Mapping[str, TensorPart], make: Callable[[TensorPart], Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Add to the groups of a checkpoint what `make` makes of parts, which are named by `shard_key`."""
    added = {group: dict(named) for group, named in tensors.items()}
    for key, part in parts.items():
        group, _, name = key.partition("/")
        added.setdefault(group, {})[name] = make(part)
    return added
