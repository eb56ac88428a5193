"""Fashion-MNIST by name: 60,000 + 10,000 grey images of 28 x 28 pixels, 10 classes (Zalando SE, MIT licence).

Promise: what is read is Fashion-MNIST to the last bit, whatever place it came from; or the shipped sample of it, if the
recipe allows that, with a note that reports it.

Shape letters: N images.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from tlscale.data.decode import decode_image
from tlscale.data.sources.hub import read_hub_source
from tlscale.data.sources.idx import find_idx, read_split
from tlscale.data.sources.manifest import read_manifest_source
from tlscale.data.sources.tables import Ints, RawStore, Role, Source, SourceSplit
from tlscale.errors import DataError
from tlscale.recipe.schema import DataSection
from tlscale.storage.cache import cache_root

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
CHECKSUMS = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
"""SHA-256 of the four files, unpacked."""
UNORDERED_SUMS = {"train": "3c6aae86c05e891fe6fe44cb2c19f1fc", "test": "78c4e6255bc1e24741815325a5314dfc"}
"""`unordered_sum` of the two splits, for copies in other containers."""
HUB_NAME = "zalando-datasets/fashion_mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
SAMPLE = Path(__file__).parents[1] / "sample" / "fashion_mnist.parquet"
_PREFIXES: Mapping[Role, str] = {"train": "train", "test": "t10k"}


def is_fashion_mnist(data: str) -> bool:
    """Return whether `data` is the name, and no place here that is called so."""
    return data == "fashion_mnist" and not Path(data).exists()


def read_fashion_mnist(section: DataSection) -> Source:
    """Read Fashion-MNIST from the first place that has it.

    Raises:
        DataError: a place has files of other content; or no place has any and the recipe allows no sample.
    """
    for key, default in (("train_split", "train"), ("validation_split", None), ("test_split", "test")):
        if getattr(section, key) != default:
            raise DataError(
                "has no effect with source 'fashion_mnist': its splits are train and test", key=f"data.{key}"
            )
    named = os.environ.get("TLSCALE_DATA")
    below_named = [Path(named) / "fashion-mnist", Path(named)] if named else []
    places = [*below_named, cache_root() / "data" / "fashion-mnist", DEBIAN_FOLDER]
    for folder in places:
        if any(find_idx(folder, prefix, kind) for prefix in _PREFIXES.values() for kind in ("images", "labels")):
            return _read_folder(folder)
    try:
        source = read_hub_source(DataSection.model_validate({"source": "hub", "path": HUB_NAME}))
    except DataError as error:
        if section.fallback == "sample":
            return read_sample()
        looked = "\n  ".join([*(f"{place}: no such files" for place in places), f"the hub: {error}"])
        raise DataError(
            "Fashion-MNIST was not found. Looked for train-images-idx3-ubyte.gz and its three companions in"
            f"\n  {looked}",
            remedy="Ways out: install Debian's package dataset-fashion-mnist; or set TLSCALE_DATA to a folder with the "
            "four files; or write 'fallback: sample' under 'data' to run on the 7,000 images that ship with tlscale",
        ) from None
    for role, split in source.splits.items():
        check_content(role, split, source.place)
    splits = {role: replace(split, label_names=CLASSES) for role, split in source.splits.items()}
    return replace(source, splits=splits, declared_classes=CLASSES)


def read_sample() -> Source:
    """Read the shipped sample: 6,000 + 1,000 of the real images."""
    source = read_manifest_source(DataSection.model_validate({"source": "manifest", "path": str(SAMPLE)}))
    total = sum(len(split.label_ids_N) for split in source.splits.values())
    note = (
        f"FALLBACK SAMPLE: Fashion-MNIST was not found; this run uses {total:,} of its 70,000 images, shipped with "
        "tlscale. Its results are not results on Fashion-MNIST"
    )
    splits = {role: _with_names(split) for role, split in source.splits.items()}
    return replace(source, splits=splits, declared_classes=CLASSES, notes=(note,), is_sample=True)


def _read_folder(folder: Path) -> Source:
    splits: dict[Role, SourceSplit] = {}
    checksums: dict[str, str] = {}
    for role, prefix in _PREFIXES.items():
        split, sums = read_split(folder, role, prefix)
        for name, sha256 in sums.items():
            standard = CHECKSUMS[name.replace(".idx", "-idx")]
            if standard != sha256:
                raise DataError(
                    f"{folder / name}: its content is not Fashion-MNIST's (SHA-256 {sha256} unpacked, expected "
                    f"{standard}); MNIST and others use the same file names",
                    remedy="Replace it, or use source 'idx'",
                )
        splits[role] = _with_names(split)
        checksums |= sums
    return Source(str(folder), splits, CLASSES, {"checksums": checksums})


def _with_names(split: SourceSplit) -> SourceSplit:
    return replace(split, label_names=tuple(CLASSES[int(name)] for name in split.label_names))


def check_content(role: Role, split: SourceSplit, place: str) -> None:
    """Raise `DataError` unless the split holds exactly the images and labels of Fashion-MNIST, in any order."""
    found = unordered_sum(split.store, split.label_ids_N)
    if found != UNORDERED_SUMS.get(role):
        raise DataError(f"{place}: the {role} split holds other images or labels than Fashion-MNIST (sum {found})")


def unordered_sum(store: RawStore, labels_N: Ints) -> str:
    """Compute a checksum that the order does not change: the sum of 128 bits of SHA-256 of each (label, pixels)."""
    total = 0
    for row, label in enumerate(labels_N):
        pixels = decode_image(store.read(row), in_chans=1, max_pixels=28 * 28, where=store.where(row))
        record = bytes([int(label)]) + np.ascontiguousarray(pixels).tobytes()
        total += int.from_bytes(hashlib.sha256(record).digest()[:16], "little")
    return f"{total % 2**128:032x}"
