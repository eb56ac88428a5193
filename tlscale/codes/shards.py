"""Write and read one shard of codes: of some images, every value, in files that are complete or that nobody reads.

Promise: a shard counts once its small JSON file is there, its record, which names every other file with its size and
SHA-256 and is written last. Nothing is ever written into a file that has its place: a reader may have it mapped. The
time of the record is that of the last use.

Files of a shard, NAME being a hash of its images: `NAME.ids.safetensors` (32 bytes an image, its address),
`NAME.0.safetensors` (the first value), ..., `NAME.json`. Each holds one tensor, called `ids` or `0`. While WRITER
writes them they are called `.WRITER.NAME....`.

Shape letters: R rows of a shard, B images of a batch, C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tlscale.codes.key import FORMAT, json_digest
from tlscale.data.content import DIGEST, Digests
from tlscale.errors import TlscaleError
from tlscale.storage import faults
from tlscale.storage.cache import make_cache_folder, share_with_group
from tlscale.storage.files import file_sha256, flush, is_full, write_text

Ints = npt.NDArray[np.int64]
Array = npt.NDArray[Any]
BLOCK = 64
"""Images of one forward pass, in every extraction."""
SHARD_BYTES = 32 * 2**20
_MOST_ROWS = 4096
_CHECKSUM = "sha256"
_MOST_RECORD_BYTES = 64 * 2**20
SUFFIX = ".safetensors"
_DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _DTYPES}


class CorruptError(Exception):
    """Report a file of the store that is not as it was written. Never leaves `tlscale.codes`."""


@dataclass(frozen=True)
class ValueSpec:
    """Describe one value of an image."""

    name: str
    shape: tuple[int, ...]
    """Of one image."""
    dtype: str
    """A name of PyTorch's, without `torch.`."""
    channels_last: bool
    """The network gave (B, C, H, W) in the memory order B, H, W, C, and is to be given it so."""

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape) * self.torch_dtype.itemsize

    def describe(self) -> str:
        """Return a line such as `layer3 256 x 8 x 8 float32`."""
        return " ".join([self.name, " x ".join(map(str, self.shape)) or "1", self.dtype])


@dataclass(frozen=True)
class Shard:
    """Describe a shard without reading it."""

    name: str
    num_rows: int
    files: Mapping[str, Mapping[str, Any]]
    """By `ids`, `0`, `1`, ...: bytes and sha256."""

    def path(self, folder: Path, part: str) -> Path:
        return folder / f"{self.name}.{part}{SUFFIX}"


def rows_per_shard(row_bytes: int, shard_bytes: int = SHARD_BYTES) -> int:
    """Return the rows of a full shard: the most blocks, a power of two, that fit into `shard_bytes`; at least one."""
    rows = BLOCK
    while rows < _MOST_ROWS and 2 * rows * row_bytes <= shard_bytes:
        rows *= 2
    return rows


def name_of(ids_R: Digests) -> str:
    """Name the shard of these images, whoever writes it."""
    return hashlib.sha256(ids_R.tobytes()).hexdigest()[:32]


def as_array(values: Tensor) -> Array:
    """View the same memory as a NumPy array; bfloat16, which NumPy has not, as its bits."""
    array: Array = (values.view(torch.uint16) if values.dtype == torch.bfloat16 else values).numpy()
    return array


def _as_tensor(ids_R: Digests) -> Tensor:
    """View addresses as bytes (R, 32)."""
    ids_R = np.ascontiguousarray(ids_R, DIGEST)
    return torch.from_numpy(ids_R.view(np.uint8).reshape(len(ids_R), DIGEST.itemsize).copy())


def write_shard(folder: Path, ids_R: Digests, values: Sequence[Tensor], writer: str) -> Shard:
    """Write the files of a shard under names of the writer's own; `place_shard` makes it count.

    Each address is there once; values are on the CPU and contiguous, each (R, *shape). No two writers at once have one
    name.

    Raises:
        TlscaleError: the disk is full or cannot be written; nothing of the shard is left.
    """
    name = name_of(ids_R)
    parts = {"ids": _as_tensor(ids_R), **{str(i): value for i, value in enumerate(values)}}
    try:
        make_cache_folder(folder)
        files = {}
        for part, tensor in parts.items():
            path = _draft(folder, writer, name, part)
            remove_whatever(path)  # of the same writer, killed
            files[part] = _write_tensor(path, part, tensor)
    except OSError as error:
        for part in parts:
            with suppress(OSError):
                _draft(folder, writer, name, part).unlink(missing_ok=True)
        raise write_error(folder, sum(tensor.nbytes for tensor in parts.values()), error) from error
    return Shard(name, len(ids_R), files)


def place_shard(folder: Path, key: Mapping[str, Any], shard: Shard, specs: Sequence[ValueSpec], writer: str) -> None:
    """Make a shard count that was written; what has its name is replaced, unless it is the same. Under the lock.

    Errors as `write_shard`.
    """
    if _is_there(folder, key, shard, specs):  # another run was faster
        for part in shard.files:
            _draft(folder, writer, shard.name, part).unlink(missing_ok=True)
        return
    try:
        remove_shard(folder, shard.name)
        faults.at("codes.place")
        for part in shard.files:
            _draft(folder, writer, shard.name, part).rename(shard.path(folder, part))
        flush(folder)
        faults.at("codes.shard")
        plain = {"format": FORMAT, "key": key, "values": [asdict(spec) for spec in specs], "shard": asdict(shard)}
        record = folder / f"{shard.name}.json"
        write_text(record, with_checksum(plain))  # from here on it counts
        share_with_group(record)
    except OSError as error:
        with suppress(OSError):
            remove_shard(folder, shard.name)
        raise write_error(folder, 0, error) from error


def _is_there(folder: Path, key: Mapping[str, Any], shard: Shard, specs: Sequence[ValueSpec]) -> bool:
    try:
        record = read_record(folder, shard.name, key)
        check_values(folder, shard, verify=True)
        read_ids(folder, shard)
    except (CorruptError, FileNotFoundError):
        return False
    return record == (shard, tuple(specs))


def _draft(folder: Path, writer: str, name: str, part: str) -> Path:
    return folder / f".{writer}.{name}.{part}{SUFFIX}"


def write_error(path: Path, num_bytes: int, error: OSError) -> TlscaleError:
    """Make the error of a disk that is full or fails."""
    full = is_full(error)
    why = "the disk is full" if full else error.strerror or str(error)
    what = f"{num_bytes / 2**20:.1f} MiB of codes" if num_bytes else "codes"
    return TlscaleError(
        f"cannot write {what} to '{path}': {why}",
        remedy="Make room there, or set TLSCALE_CACHE to a folder elsewhere. What is finished stays, and the same "
        "run resumes from it",
    )


def _write_tensor(path: Path, name: str, tensor: Tensor) -> dict[str, Any]:
    # Not save_file, which neither flushes nor reports a full disk with its error number.
    content = safetensors.torch.save({name: tensor})
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    share_with_group(path)
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def remove_shard(folder: Path, name: str) -> None:
    """Remove all files of this shard's name, first the one that makes it count."""
    remove_whatever(folder / f"{name}.json")
    for path in folder.glob(f"{name}.*{SUFFIX}"):
        remove_whatever(path)


def remove_whatever(path: Path) -> None:
    """Remove what has the name of a file of the store: a folder in its place, too, would be in the way for ever."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def with_checksum(plain: Mapping[str, Any]) -> str:
    """Return plain values as JSON with a checksum, which shows whether it was changed."""
    return json.dumps({**plain, _CHECKSUM: json_digest(plain)}, indent=1, sort_keys=True) + "\n"


def read_with_checksum(path: Path) -> dict[str, Any]:
    """Read what `with_checksum` gave.

    Raises:
        FileNotFoundError: there is no such file.
        CorruptError: it is not as it was written.
    """
    try:
        if path.stat().st_size > _MOST_RECORD_BYTES:
            raise ValueError("a record is small")
        text = path.read_text()
        plain = json.loads(text)
        del plain[_CHECKSUM]
        whole = with_checksum(plain) == text
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptError(f"{path.name} cannot be read ({type(error).__name__})") from None
    if not whole:
        raise CorruptError(f"{path.name} has changed since it was written")
    return dict(plain)


def read_record(folder: Path, name: str, key: Mapping[str, Any] | None) -> tuple[Shard, tuple[ValueSpec, ...]]:
    """Read the record of a shard; `key` None: whatever key it has, if it is the folder's.

    Raises:
        FileNotFoundError: there is none.
        CorruptError: it is not as it was written, or another entry's or shard's.
    """
    plain = read_with_checksum(folder / f"{name}.json")
    try:
        ours = plain["key"] if key is None else key
        is_ours = key is not None or json_digest({"format": FORMAT, **ours}) == folder.name
        if not is_ours or plain["key"] != ours or plain["shard"]["name"] != name or plain.get("format") != FORMAT:
            raise CorruptError(f"{name}.json belongs to other codes")
        specs = tuple(ValueSpec(**{**value, "shape": tuple(value["shape"])}) for value in plain["values"])
        shard = Shard(**plain["shard"])
        if not _go_together(shard, specs):
            raise ValueError(name)
    except (LookupError, TypeError, ValueError, AttributeError) as error:  # who writes a checksum can write anything
        raise CorruptError(f"{name}.json is the record of no shard ({type(error).__name__})") from None
    return shard, specs


def _go_together(shard: Shard, specs: Sequence[ValueSpec]) -> bool:
    """Report whether a record names the files of its values, and describes values that there are."""
    parts = {"ids", *map(str, range(len(specs)))}
    files = all(isinstance(info["bytes"], int) and isinstance(info["sha256"], str) for info in shard.files.values())
    sizes = all(isinstance(size, int) and size >= 0 for spec in specs for size in (*spec.shape, shard.num_rows))
    return shard.files.keys() == parts and files and sizes and all(spec.dtype in DTYPES for spec in specs)


def read_ids(folder: Path, shard: Shard) -> Digests:
    """Read the addresses of the images of a shard; raise `CorruptError` where they are not as they were written."""
    path = shard.path(folder, "ids")
    try:
        if path.stat().st_size != shard.files["ids"]["bytes"]:
            raise CorruptError(f"{path.name} has {path.stat().st_size} bytes")
        content = path.read_bytes()
    except OSError as error:
        raise CorruptError(f"{path.name}: {error.strerror or error}") from None
    if hashlib.sha256(content).hexdigest() != shard.files["ids"]["sha256"]:
        raise CorruptError(f"{path.name} has changed since it was written")
    # The bytes are those that were written, so they are a file of ours.
    ids_R: Digests = safetensors.torch.load(content)["ids"].numpy().view(DIGEST).reshape(-1)
    if len(ids_R) != shard.num_rows or name_of(ids_R) != shard.name:
        raise CorruptError(f"{path.name} holds the addresses of another shard")
    return ids_R


def check_values(folder: Path, shard: Shard, *, verify: bool) -> None:
    """Raise `CorruptError` where the values' sizes or, with `verify`, any byte are not those of the record."""
    for part, file_info in shard.files.items():
        path = shard.path(folder, part)
        try:
            size = path.stat().st_size
            if size != file_info["bytes"]:
                raise CorruptError(f"{path.name} has {size} bytes instead of {file_info['bytes']}")
            if verify and part != "ids" and file_sha256(path) != file_info["sha256"]:
                raise CorruptError(f"{path.name} has changed since it was written")
        except OSError as error:
            raise CorruptError(f"{path.name}: {error.strerror or error}") from None


def map_values(folder: Path, shard: Shard, specs: Sequence[ValueSpec]) -> list[Array]:
    """Map the values of a shard, each (R, *shape), into memory: nothing is read before it is used.

    Raises:
        CorruptError: a file is missing, or holds another array.
    """
    return [_map_value(shard.path(folder, str(i)), str(i), shard.num_rows, spec) for i, spec in enumerate(specs)]


def _map_value(path: Path, name: str, num_rows: int, spec: ValueSpec) -> Array:
    try:
        # It maps the file and closes it: thousands of shards would run into the limit of open files. The map is
        # private: whoever wrote into it by mistake would not change the file.
        with safe_open(path, "pt") as file:
            tensor = file.get_tensor(name)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CorruptError(f"{path.name} cannot be mapped: {error}") from None
    if tensor.shape != (num_rows, *spec.shape) or tensor.dtype != spec.torch_dtype:
        raise CorruptError(f"{path.name} holds another tensor than {spec.describe()}")
    return as_array(tensor)
