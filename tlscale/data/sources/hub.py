"""Read data sets of the Hugging Face hub, and those that `datasets` saved on disk.

Promise: no code of a data set is ever run; images come as they are stored, for our own decoder; and the commit that was
read is known. The hub is queried once, with a short time-out, before anything is loaded, because its client would try
for half a minute; where it is not reached, what `datasets` prepared before is used, if it is the wanted revision.

Shape letters: N rows.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tlscale.data.content import digest_of_parts, file_stamp, stamp_bytes
from tlscale.data.sources.columns import LABEL_COLUMNS, column_note, pick_column, pick_label_columns
from tlscale.data.sources.groups import groups_of_column, refuse_wrong_columns
from tlscale.data.sources.label_sets import Bools, encode_label_sets, refuse_joiners, sets_of_columns, sets_of_text
from tlscale.data.sources.labels import encode_labels
from tlscale.data.sources.paths import local_folder
from tlscale.data.sources.split_names import ScoredSection, may_name_splits, pick_splits, split_values
from tlscale.data.sources.stores import read_image_file
from tlscale.data.sources.tables import NO_LABEL, Ints, Role, Source, SourceSplit
from tlscale.errors import DataError, first_few, kind_and_line, quoted
from tlscale.recipe.schema import DataSection

if TYPE_CHECKING:  # importing datasets takes a second; only these sources pay it
    from datasets import Dataset

IMAGE_COLUMNS = ("image", "img")
TIMEOUT_S = 10.0
_FIRST_ROWS = 1024
_SHORT = ("string", "large_string", "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class HubStore:
    """One split of a data set of `datasets`, its images not decoded."""

    split: Dataset
    """With the one column only."""
    column: str
    name: str
    content: str
    container: bytes | None = None
    """What the index of contents knows the files by that hold the images; None where they are not all in these."""

    def __len__(self) -> int:
        return len(self.split)

    def places(self, rows_N: Ints) -> list[str]:
        return [str(row) for row in rows_N.tolist()]

    def stamps(self, rows_N: Ints) -> list[bytes | None]:
        whole = self.container
        return [None if whole is None else whole + row.to_bytes(8, "little") for row in rows_N.tolist()]

    def where(self, row: int) -> str:
        return f"{self.name} row {row}"

    def file_of(self, row: int) -> None:
        return None

    def read(self, row: int) -> bytes:
        cell = self.split[row][self.column]
        raw, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, Mapping) else (cell, None)
        if raw is not None:
            return bytes(raw)
        if path is None:
            raise DataError(f"{self.where(row)}: there is no image")
        return read_image_file(Path(path), f"{self.where(row)}: {path}")


def is_disk_source(data: str) -> bool:
    """Return whether `data` is a folder that `save_to_disk` of `datasets` wrote."""
    folder = Path(data).expanduser()
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def is_hub_source(data: str) -> bool:
    """Return whether `data` is a folder of Parquet files; names on the hub are not looked up."""
    folder = Path(data).expanduser()
    if not folder.is_dir() or any(entry.is_dir() for entry in folder.iterdir() if not entry.name.startswith(".")):
        return False
    return any(folder.glob("*.parquet"))


def read_disk_source(section: DataSection) -> Source:
    """Read what `save_to_disk` of `datasets` wrote.

    Raises:
        DataError: it is not that, or has no usable columns or splits.
    """
    _check_installed()
    import datasets

    folder = local_folder(section)
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # whatever the library makes of a folder that somebody else filled
        raise DataError(
            f"{folder}: not a data set that `save_to_disk` of datasets wrote: {kind_and_line(error)}"
        ) from None
    splits = loaded if isinstance(loaded, datasets.DatasetDict) else {section.train_split: loaded}
    return _source(section, splits, str(folder), {})


def read_hub_source(section: DataSection) -> Source:
    """Read a data set by its name on the hub, or a local folder that `datasets` can load (Parquet, image folder).

    Raises:
        DataError: not there, not reachable and not in the cache, not the revision, no usable columns or splits.
    """
    name = section.path
    assert name is not None, "the schema requires it"
    _check_installed()
    if os.path.isdir(name):
        if section.revision is not None:
            raise DataError(f"has no effect: data.path {name!r} is a local folder", key="data.revision")
        return _source(section, _load(name, section.config, None), name, {})
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise DataError(
            f"{name!r} is neither a folder here nor a name on the hub such as 'user/dataset'", key="data.path"
        )
    commit = hub_commit(name, section.revision)
    if commit is not None:
        return _source(section, _load(name, section.config, commit), name, {"commit": commit})
    splits, commit = _load_cached(name, section.config, section.revision)
    return _source(section, splits, name, {"commit": commit})


def _check_installed() -> None:
    # On a machine where only some packages can be put, such as a lent GPU, it is the first that is left out.
    if importlib.util.find_spec("datasets") is None:
        raise DataError(
            "sources 'hub' and 'disk' need the package datasets, which is not installed",
            key="data.source",
            remedy="Install it (pip install datasets), or use another source, such as manifest",
        )


def hub_commit(name: str, revision: str | None) -> str | None:
    """Return the commit that `revision` of the data set stands for; None where the hub is not reached.

    Raises:
        DataError: the hub answers, but has no such data set or revision, or not for us.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return HfApi().dataset_info(name, revision=revision, timeout=TIMEOUT_S).sha
    except HFValidationError as error:
        raise DataError(f"{name!r} is no name on the hub: {kind_and_line(error)}", key="data.path") from None
    except GatedRepoError:
        raise DataError(f"hub data set {name!r} asks for its terms to be accepted, on its page and logged in") from None
    except RevisionNotFoundError:
        raise DataError(f"hub data set {name!r} has no revision {revision!r} (data.revision)") from None
    except RepositoryNotFoundError:
        raise DataError(f"the hub has no data set {name!r}, or it is private and you are not logged in") from None
    except Exception as error:  # no network, a proxy's error page, offline mode: many types, one meaning
        _log.debug("the hub cannot be reached: %r", error)
        return None


def _load(name: str, config: str | None, commit: str | None) -> Mapping[str, Dataset]:
    import datasets

    try:
        loaded = datasets.load_dataset(name, config, revision=commit)
    except Exception as error:  # the library's errors for wrong configurations and broken files share no type
        raise DataError(f"data set {name!r} cannot be loaded: {kind_and_line(error)}") from None
    return loaded  # type: ignore[no-any-return]


def _load_cached(name: str, config: str | None, revision: str | None) -> tuple[Mapping[str, Dataset], str]:
    import datasets
    from datasets.packaged_modules.cache.cache import Cache

    cache = datasets.config.HF_DATASETS_CACHE
    ways_out = (
        "Ways out: load it once on a machine with a network and the same cache (HF_HOME or HF_DATASETS_CACHE says "
        "where), or save it there with `save_to_disk` and use source 'disk'"
    )
    try:
        builder = Cache(dataset_name=name.split("/")[-1], repo_id=name, config_name=config, version="auto", hash="auto")
        builder.download_and_prepare()
        loaded = builder.as_dataset()
    except Exception as error:
        raise DataError(
            f"the hub cannot be reached, and data set {name!r} is not in the cache {cache} ({kind_and_line(error)})",
            remedy=ways_out,
        ) from None
    commit = str(builder.hash)
    if revision is not None and revision != commit:
        what = "is not that commit" if _COMMIT.fullmatch(revision) else "may be another"
        raise DataError(
            f"the hub cannot be reached; data set {name!r} is in the cache {cache} at commit {commit}, which {what}: "
            f"data.revision is {revision!r}",
            remedy=f"Give that commit as data.revision if it is the one you mean. {ways_out}",
        )
    return loaded, commit


def _source(section: DataSection, loaded: Mapping[str, Dataset], place: str, identity: Mapping[str, object]) -> Source:
    import datasets

    picked = pick_splits(section, list(loaded), place)
    train = loaded[next(iter(picked.values()))]  # the training split; where there is none, another
    image = _column(datasets.Image, section.image_column, IMAGE_COLUMNS, train, "image_column", place)
    labels = _label_columns(section, train, place)
    group = section.group_column
    refuse_wrong_columns(group, {image: "images", **dict.fromkeys(labels, "labels")}, place)
    splits: dict[Role, SourceSplit] = {}
    for role, name in picked.items():
        splits[role] = _read_split(section, loaded[name], name, (image, labels, group), f"{place}, split {name!r}")
    unused = [name for name in loaded if name not in picked.values()]
    notes = [f"{place}: splits that are not used: {first_few(quoted(unused))}"] if unused else []
    for name in picked.values():
        notes.extend(_unread_columns(loaded[name], (image, *labels, group), f"{place}, split {name!r}"))
    feature = _item(train.features[labels[0]]) if section.task == "multi_label" else train.features[labels[0]]
    declared = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    declared = declared if section.label_columns is None else tuple(labels)
    return Source(place, splits, declared, identity, tuple(notes))


def _label_columns(section: DataSection, train: Dataset, place: str) -> list[str]:
    """Return the column of the labels, or those of 0 and 1; by default the one of a type of labels."""
    import datasets

    if section.label_columns is None and section.task != "multi_label":
        return [_column(datasets.ClassLabel, section.label_column, LABEL_COLUMNS, train, "label_column", place)]
    typed = [name for name, feature in train.features.items() if isinstance(_item(feature), datasets.ClassLabel)]
    if section.label_columns is None and section.label_column is None and len(typed) == 1:
        return typed
    return pick_label_columns(section, train.column_names, place)


def _item(feature: object) -> object:
    """Return the feature of a list's items; None where it is none of lists."""
    if isinstance(feature, list):  # as older versions of datasets have it
        return feature[0]
    return getattr(feature, "feature", None)


def _unread_columns(split: Dataset, read: tuple[str | None, ...], where: str) -> list[str]:
    """Return notes on columns that name splits and are not read: here splits are those of the data set."""
    notes = []
    for name in (column for column in split.column_names if column not in read):
        values = split_values(name, _few_texts(split, name))
        if values:
            notes.append(column_note(name, values, where, "Divide the data set by it first, or use source 'manifest'"))
    return notes


def _few_texts(split: Dataset, column: str) -> list[str | None]:
    """Return the distinct values of a column that may name splits; none where it does not."""
    import datasets

    feature = split.features[column]
    if isinstance(feature, datasets.ClassLabel):
        names: list[str | None] = list(feature.names)
        if not may_name_splits(column, names):
            return []
        numbers = split.select_columns([column]).with_format("arrow")[:][column]
        return [names[number] for number in pc.unique(numbers).drop_null().to_pylist() if number >= 0]
    if not (isinstance(feature, datasets.Value) and feature.dtype in _SHORT):
        return []
    held = split.select_columns([column]).with_format("arrow")
    if not may_name_splits(column, _distinct(held[:_FIRST_ROWS][column])):
        return []
    return _distinct(held[:][column])


def _distinct(column: pa.ChunkedArray) -> list[str | None]:
    return list(pc.unique(column.cast(pa.large_string())).to_pylist())


def _read_split(
    section: DataSection, split: Dataset, name: str, columns: tuple[str, list[str], str | None], where: str
) -> SourceSplit:
    import datasets

    image, labels, group = columns
    label_key = "label_column" if section.label_columns is None else "label_columns"
    keys = [("image_column", image), *((label_key, label) for label in labels), ("group_column", group)]
    for key, column in keys:
        if column is not None and column not in split.column_names:
            has = first_few(quoted(split.column_names), 20)
            raise DataError(f"{where} has no column {column!r}; it has {has}", key=f"data.{key}")
    read_labels = _labels if section.task != "multi_label" else _label_sets
    label_names, label_ids_N = read_labels(section, split, labels, where)
    groups_N = None
    if group is not None:
        column = split.select_columns([group]).with_format("arrow")[:][group]
        groups_N = groups_of_column(column, f"{where}, column {group!r}")
    if isinstance(split.features[image], datasets.Image):
        split = split.cast_column(image, datasets.Image(decode=False))
    elif not _is_bytes(split.features[image]):
        raise DataError(f"{where}: column {image!r} is {split.features[image]}; expected images, or binary")
    images = split.select_columns([image])
    files = [(file["filename"], os.stat(file["filename"]).st_size) for file in split.cache_files]
    content = digest_of_parts([split._fingerprint, repr([(os.path.basename(file), size) for file, size in files])])
    store = HubStore(images, image, where, content, _container(images, image))
    return SourceSplit(name, store, label_names, label_ids_N, None, groups_N)


def _container(images: Dataset, column: str) -> bytes | None:
    table_column = images.data.column(column)
    if not _is_bytes(images.features[column]) and any(c.field("bytes").null_count for c in table_column.chunks):
        return None  # some images are elsewhere
    files, looked_ns = [file["filename"] for file in images.cache_files], time.time_ns()
    stamps = [stamp_bytes(file_stamp(os.stat(file)), looked_ns) for file in files]
    if not stamps or any(stamp is None for stamp in stamps):
        return None
    return hashlib.sha256(repr((images._fingerprint, column, stamps)).encode()).digest()


def _is_bytes(feature: object) -> bool:
    import datasets

    return isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")


def _label_sets(section: DataSection, split: Dataset, labels: list[str], where: str) -> tuple[tuple[str, ...], Bools]:
    """Return label texts, and which of them each row has."""
    import datasets

    table, where = split.select_columns(labels).with_format("arrow")[:], f"{where}, column {labels[0]!r}"
    if section.label_columns is not None:
        return encode_label_sets(sets_of_columns(table, labels, where), where)
    column, feature = table[labels[0]], _item(split.features[labels[0]])
    if section.label_separator is not None:
        must_occur = not isinstance(section, ScoredSection)
        column = sets_of_text(column, section.label_separator, where, must_occur=must_occur)
    if not isinstance(feature, datasets.ClassLabel):
        return encode_label_sets(column, where)
    names, has_NK = encode_label_sets(column, where)
    outside = [name for name in names if not name.isdecimal() or int(name) >= feature.num_classes]
    if outside:
        raise DataError(f"{where}: labels {first_few(outside)} have no name among its classes")
    whole_NC = np.zeros((len(has_NK), feature.num_classes), dtype=bool)
    whole_NC[:, [int(name) for name in names]] = has_NK
    refuse_joiners(feature.names, where)
    return tuple(feature.names), whole_NC


def _labels(section: DataSection, split: Dataset, labels: list[str], where: str) -> tuple[tuple[str, ...], Ints]:
    import datasets

    (label,) = labels
    feature = split.features[label]
    column = split.select_columns([label]).with_format("arrow")[:][label]
    if not isinstance(feature, datasets.ClassLabel):
        return encode_labels(column, f"{where}, column {label!r}")
    label_ids_N: Ints = np.asarray(column.fill_null(NO_LABEL).to_numpy(), dtype=np.int64)
    outside = np.unique(label_ids_N[(label_ids_N < NO_LABEL) | (label_ids_N >= feature.num_classes)])
    if len(outside):
        raise DataError(f"{where}, column {label!r}: labels {outside[:5].tolist()} have no name among its classes")
    return tuple(feature.names), label_ids_N


def _column(kind: type, given: str | None, usual: Sequence[str], split: Dataset, key: str, place: str) -> str:
    """Pick the one column of this type where the recipe names none, else by name."""
    typed = [name for name, feature in split.features.items() if isinstance(feature, kind)]
    if given is None and len(typed) == 1:
        return str(typed[0])
    return pick_column(given, usual, split.column_names, key, place)
