"""Read IDX, the file format of MNIST: gzipped or plain, four files in a folder.

Promise: magic number, dimensions and length are checked before anything is believed, and no more is unpacked than the
header announces.

A big-endian header (two zero bytes, the type, 8 for uint8; the number of dimensions; each dimension in four bytes),
then the numbers: http://yann.lecun.com/exdb/mnist/. Files are called `PREFIX-images-idx3-ubyte` and
`PREFIX-labels-idx1-ubyte`, with or without `.gz` (also `.idx3-ubyte`). The prefix is the name of the split, and for
`test` also `t10k`.

Shape letters: N images, H height, W width.
"""

from __future__ import annotations

import gzip
import hashlib
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tlscale.data.sources.labels import encode_labels
from tlscale.data.sources.paths import local_folder
from tlscale.data.sources.split_names import VALIDATION_NAMES, pick_splits
from tlscale.data.sources.stores import ArrayStore
from tlscale.data.sources.tables import Source, SourceSplit
from tlscale.errors import DataError, first_few
from tlscale.recipe.schema import DataSection

_KINDS = {"images": 3, "labels": 1}
_UINT8 = 8
_IMAGE_FILES = "*-images[-.]idx3-ubyte*"


@dataclass(frozen=True, eq=False)
class IdxFile:
    """The content of one file."""

    path: Path
    numbers: npt.NDArray[np.uint8]
    sha256: str
    """Of the unpacked file, so that it is the same for gzipped and plain."""


def find_idx(folder: Path, prefix: str, kind: str) -> Path | None:
    """Find the file of `kind` ('images' or 'labels') of one split, plain before gzipped."""
    dims = _KINDS[kind]
    stems = (f"{prefix}-{kind}-idx{dims}-ubyte", f"{prefix}-{kind}.idx{dims}-ubyte")
    candidates = (folder / f"{stem}{end}" for stem in stems for end in ("", ".gz"))
    return next((path for path in candidates if path.is_file()), None)


def read_idx(path: Path, dims: int) -> IdxFile:
    """Read a file of uint8 with so many dimensions.

    Raises:
        DataError: not that, or cut short, or too long.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            return _read_open(path, file, dims)  # type: ignore[arg-type]
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}", remedy="Fetch the file anew") from None


def _read_open(path: Path, file: BinaryIO, dims: int) -> IdxFile:
    header = file.read(4 + 4 * dims)
    expected = bytes((0, 0, _UINT8, dims))
    if header[:4] != expected or len(header) < 4 + 4 * dims:
        raise DataError(
            f"{path}: not an IDX file of uint8 with {dims} dimension{'s' * (dims > 1)} (it starts with "
            f"{header[:4].hex(' ') or 'nothing'}, expected {expected.hex(' ')}); are images and labels swapped?"
        )
    shape = struct.unpack(f">{dims}I", header[4:])
    size = int(np.prod(shape, dtype=object))
    # A gzipped file packs at most about 1:1032, so this also stops a header that announces more than can follow.
    most = path.stat().st_size * (1032 if path.suffix == ".gz" else 1)
    if size > most + len(header):
        raise DataError(f"{path}: the header announces {size:,} bytes, but the file has {path.stat().st_size:,}")
    body = file.read(size)
    if len(body) < size or file.read(1):
        found = f"only {len(body):,}" if len(body) < size else "more"
        raise DataError(
            f"{path}: the header announces {size:,} bytes {shape}, but there are {found}", remedy="Fetch it anew"
        )
    numbers = np.frombuffer(body, dtype=np.uint8).reshape(shape)
    sha256 = hashlib.sha256(header)
    sha256.update(body)
    return IdxFile(path, numbers, sha256.hexdigest())


def read_split(folder: Path, name: str, prefix: str) -> tuple[SourceSplit, dict[str, str]]:
    """Read one split, and the checksum of each of its two files.

    Raises:
        DataError: a file is missing or damaged, or the two do not fit together.
    """
    paths = {kind: find_idx(folder, prefix, kind) for kind in _KINDS}
    for kind, path in paths.items():
        if path is None:
            raise DataError(f"{folder} has no {prefix}-{kind}-idx{_KINDS[kind]}-ubyte (or .gz)")
    images, labels = (read_idx(path, _KINDS[kind]) for kind, path in paths.items() if path is not None)
    if len(images.numbers) != len(labels.numbers):
        raise DataError(
            f"{images.path} has {len(images.numbers):,} images, but {labels.path} has {len(labels.numbers):,} labels"
        )
    store = ArrayStore(str(images.path), images.numbers, images.sha256)
    names, label_ids_N = encode_labels(pa.chunked_array([pa.array(labels.numbers)]), str(labels.path))
    checksums = {file.path.name.removesuffix(".gz"): file.sha256 for file in (images, labels)}
    return SourceSplit(name, store, names, label_ids_N), checksums


def is_idx_source(data: str) -> bool:
    """Return whether `data` is a folder of IDX files."""
    return any(Path(data).expanduser().glob(_IMAGE_FILES))


def read_idx_source(section: DataSection) -> Source:
    """Read all splits of a folder of IDX files.

    Raises:
        DataError: no such folder or files, damaged ones, or a split that is not there.
    """
    folder = local_folder(section)
    prefixes = _prefixes(section, folder)
    if not prefixes:
        names = sorted(path.name for path in folder.iterdir())
        raise DataError(
            f"{folder} has no IDX files such as {section.train_split}-images-idx3-ubyte.gz; "
            f"it has {first_few(names) or 'no files'}"
        )
    starts = {path.name.partition("-images")[0] for path in folder.glob(_IMAGE_FILES)}
    strangers = sorted(starts - {*prefixes, *prefixes.values()})
    picked = pick_splits(section, [*prefixes, *strangers], str(folder))
    read = {role: read_split(folder, name, prefixes[name]) for role, name in picked.items()}
    checksums = {file: sha256 for _, sums in read.values() for file, sha256 in sums.items()}
    return Source(str(folder), {role: split for role, (split, _) in read.items()}, identity={"checksums": checksums})


def _prefixes(section: DataSection, folder: Path) -> dict[str, str]:
    """Return for each split that is there how the names of its files start."""
    names = [section.train_split, section.validation_split, section.test_split, "train", "test", *VALIDATION_NAMES]
    prefixes = {name: name for name in names if name is not None}
    there = {name: name for name in prefixes if find_idx(folder, name, "images") or find_idx(folder, name, "labels")}
    if section.test_split == "test" and "test" not in there and find_idx(folder, "t10k", "images"):
        there["test"] = "t10k"
    return there
