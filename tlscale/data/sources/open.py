"""Open the images of a recipe: one function for all sources.

Promise: what `open_data` gives is complete. One class list holds for all splits, the files are there, and `identity`
describes what was used well enough to find out whether something else is used another time. No image has been decoded.

The fingerprint is a SHA-256 over, for each whole split of the source (before limit and hold-out, which follow from the
recipe and its seed): class names, labels by row, and the content. Content is the checksum where files are read whole
(IDX, images inside a Parquet manifest); for image files their paths, sizes and times of change, so that a copy counts
as other data unless it keeps the times; for data sets of the hub the fingerprint of `datasets` and its file sizes.
`tables_sha256` leaves the content out: equal for copies. So does `labels_sha256`; where groups or `data.duplicates`
decide, too, which rows are trained on and held out, these rows are in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tlscale.data.content import digest_of_parts
from tlscale.data.sources.bad_images import BadImages, find_bad
from tlscale.data.sources.duplicates import drop_shared
from tlscale.data.sources.fashion_mnist import is_fashion_mnist, read_fashion_mnist
from tlscale.data.sources.folder import is_folder_source, read_folder_source
from tlscale.data.sources.folds import DrawnFolds, Fold
from tlscale.data.sources.groups import Groups, name_by_path
from tlscale.data.sources.hub import is_disk_source, is_hub_source, read_disk_source, read_hub_source
from tlscale.data.sources.idx import is_idx_source, read_idx_source
from tlscale.data.sources.manifest import is_manifest_source, read_manifest_source
from tlscale.data.sources.split_names import ROLES
from tlscale.data.sources.splits import Chosen, Numbered, choose_splits, number_source
from tlscale.data.sources.tables import ImageSplit, Role, Source, has_several
from tlscale.errors import DataError, Text
from tlscale.recipe.schema import DataSection

__all__ = ["BadImages", "ImageData", "ImageSplit", "open_data"]


@dataclass(frozen=True)
class SourceReader:
    """How a source is read, and recognised where only its place is given."""

    read: Callable[[DataSection], Source]
    """Finds all splits as they are stored; `DataError` for what is missing or wrong."""
    recognises: Callable[[str], bool]
    """Whether a place or name given without a source (`tlscale evaluate --data`) is one of this source."""


# A new source is a file with these two functions, a row here, and a row of keys in `tlscale.recipe.sources`. The first
# that recognises a place has it: sources that know theirs by a file come before the one that takes any folder.
SOURCES: dict[str, SourceReader] = {
    "disk": SourceReader(read_disk_source, is_disk_source),
    "idx": SourceReader(read_idx_source, is_idx_source),
    "hub": SourceReader(read_hub_source, is_hub_source),
    "folder": SourceReader(read_folder_source, is_folder_source),
    "manifest": SourceReader(read_manifest_source, is_manifest_source),
    "fashion_mnist": SourceReader(read_fashion_mnist, is_fashion_mnist),
}


@dataclass(frozen=True, eq=False)
class ImageData:
    """The images of a run."""

    classes: tuple[str, ...]
    """Class names in the order of their numbers."""
    train: ImageSplit
    validation: ImageSplit | None
    test: ImageSplit | None
    identity: dict[str, object]
    """What was used, as JSON: source, place, commit or checksums, fingerprint, number of images."""
    notes: tuple[str, ...]
    """What a person should know; those that must not be missed start with a word in capitals."""
    is_sample: bool
    """The shipped sample stands in for the real data set."""
    bad_images: BadImages = field(default_factory=BadImages)
    """Those that are skipped."""
    groups: Groups | None = None
    """None: the recipe names none."""
    num_dropped: Mapping[Role, int] = field(default_factory=dict)
    """Images that are left out, as another split has them."""
    folds: DrawnFolds | None = None
    """Of train, where it is the whole of a cross-validation."""

    @property
    def has_several_labels(self) -> bool:
        """Report whether an image has any number of labels, and not one."""
        return has_several(self.train.table.labels_N)

    @property
    def splits(self) -> dict[Role, ImageSplit]:
        """Return those that are there, by name."""
        found = (self.train, self.validation, self.test)
        return {split.name: split for split in found if split is not None}


def open_data(
    section: DataSection,
    seed: int,
    *,
    fold: Fold | None = None,
    bad_images: BadImages | None = None,
    tries_images: bool = True,
    in_chans: int | None = None,
) -> ImageData:
    """Find the images of a recipe.

    Args:
        section: relative paths start at the current folder.
        seed: of the recipe; decides which images a limit keeps and which are held out.
        fold: the part of a cross-validation, as `choose_splits` takes it.
        bad_images: those that the run skips, found when it began; None: find them, if the recipe skips them.
        tries_images: decode images to find those that are to be skipped; else all are taken as sound.
        in_chans: channels that the network takes: an image of others is one to be skipped. None: any.

    Raises:
        DataError: missing or wrong, with the place and what to do.
    """
    source = read_source(section)
    known = bad_images
    bad_images, skip_notes = _bad_images(section, source, known, in_chans, tries_images=tries_images)
    bad = {} if bad_images.is_late else bad_images.rows
    reads = tries_images or known is not None
    numbered = number_source(section, source, is_new=known is None)
    chosen, dropped, drop_notes = _chosen(section, numbered, seed, bad, fold, reads_images=reads)
    splits = dict(chosen.splits)
    if bad_images.is_late and len(bad_images):
        splits["train"] = splits["train"].without([position for position, _ in bad_images.found["train"]])
    return ImageData(
        classes=chosen.classes,
        train=splits["train"],
        validation=splits.get("validation"),
        test=splits.get("test"),
        identity=_identity(section, source, chosen, fold),
        notes=(*source.notes, *skip_notes, *drop_notes, *chosen.notes),
        is_sample=source.is_sample,
        bad_images=bad_images,
        groups=chosen.groups,
        num_dropped=dropped,
        folds=chosen.folds,
    )


def _chosen(
    section: DataSection,
    numbered: Numbered,
    seed: int,
    bad: Mapping[Role, list[int]],
    fold: Fold | None,
    *,
    reads_images: bool,
) -> tuple[Chosen, Mapping[Role, int], Sequence[str]]:
    """Choose the splits; with how many images are dropped as another split has them, and notes on these."""
    if section.duplicates == "warn":
        return choose_splits(section, numbered, seed, bad, fold=fold), {}, []
    if not reads_images:
        note = f"data.duplicates: {section.duplicates}: images are compared when a run begins"
        return choose_splits(section, numbered, seed, bad, fold=fold), {}, [note]
    # Before groups are looked at: what is left out is in no split, and so no group is by it.
    found = drop_shared(section, numbered.tables, numbered.classes, bad)
    less = {role: sorted({*bad.get(role, ()), *found.rows.get(role, ())}) for role in {*bad, *found.rows}}
    chosen = choose_splits(section, numbered, seed, less, contents=found.contents, fold=fold)
    return chosen, found.counts, found.notes


def _bad_images(
    section: DataSection, source: Source, known: BadImages | None, in_chans: int | None, *, tries_images: bool
) -> tuple[BadImages, list[str]]:
    """Return the images to be skipped, and notes on them."""
    if section.on_bad_image == "error":
        return BadImages(), []
    if known is None and not tries_images:
        return BadImages(), ["data.on_bad_image: skip: all images are taken as sound here; a run tries each of them"]
    bad_images = known if known is not None else find_bad(section, source.splits, in_chans=in_chans)
    return bad_images, [
        f"SKIPPED: {count:,} of {len(source.splits[role].label_ids_N):,} images of {role} cannot be read "
        "(data.on_bad_image); all are listed in run.json"
        for role, count in bad_images.counts.items()
        if role in source.splits
    ]


def read_source(section: DataSection) -> Source:
    """Read all splits of a source, as they are stored; what is missing or wrong is a `DataError`."""
    if section.source not in SOURCES:
        raise DataError(f"there is no '{section.source}'", remedy=f"There are: {', '.join(SOURCES)}", key="data.source")
    source = SOURCES[section.source].read(section)
    return source if section.group_regex is None else replace(source, splits=name_by_path(section, source.splits))


def recognised_source(data: str) -> str | None:
    """Return the name of the source that reads `data`, a place or a name; None where nothing recognises it."""
    return next((name for name, reader in SOURCES.items() if reader.recognises(data)), None)


def source_of(data: str, *, remedy: str, key: Text | None = None) -> str:
    """Return the name of the source that reads `data`.

    Args:
        data: a place or a name.
        remedy: what else to name, for the message.
        key: the option that named it.

    Raises:
        DataError: it is not there, or nothing recognises it.
    """
    found = recognised_source(data) if data else None
    if found is None:
        exists = data and Path(data).expanduser().exists()
        wrong = "is neither a folder nor a table of images" if exists else "does not exist"
        raise DataError(f"'{data}' {wrong}", key=key, remedy=remedy)
    return found


def _identity(section: DataSection, source: Source, chosen: Chosen, fold: Fold | None) -> dict[str, object]:
    splits = chosen.splits
    return {
        "source": section.source,
        "place": source.place if "commit" in source.identity else str(Path(source.place).absolute()),
        "is_sample": source.is_sample,
        **source.identity,
        "fingerprint": _sha256(chosen, {role: table.store.content for role, table in chosen.tables.items()}),
        "labels_sha256": _sha256(chosen, {**dict.fromkeys(chosen.tables, ""), **_drawn(section, chosen, fold)}),
        "tables_sha256": _sha256(chosen, dict.fromkeys(chosen.tables, "")),
        "num_classes": len(chosen.classes),
        "num_images": {role: len(splits[role]) for role in ROLES if role in splits},
        **({} if chosen.groups is None else {"groups": chosen.groups.to_plain()}),
    }


def _drawn(section: DataSection, chosen: Chosen, fold: Fold | None) -> dict[str, str]:
    """Return a digest of the rows of train and validation, where these do not follow from labels, recipe and seed."""
    by_groups = chosen.groups is not None and chosen.groups.draw
    if section.duplicates == "warn" and not by_groups and fold is None:
        return {}
    rows = [chosen.splits[role].rows_N for role in ROLES if role != "test" and role in chosen.splits]
    return {"train": digest_of_parts(rows_N.astype("<i8").tobytes() for rows_N in rows)}


def _sha256(chosen: Chosen, contents: Mapping[str, str]) -> str:
    parts: list[bytes | str] = [str(len(chosen.classes)), *chosen.classes]
    for role, table in sorted(chosen.tables.items()):
        labels_sha256 = hashlib.sha256(table.labels_N.astype("<i8").tobytes()).hexdigest()
        parts.extend((role, labels_sha256, contents[role]))
    return digest_of_parts(parts)
