"""The identity of data: which images, in which split, in which order, with which label; and nothing else."""

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tlscale.data.content import ContentIndex, content_digest, file_stamp, stamp_bytes
from tlscale.data.identity import result_identity, scored_identity, used_identity
from tlscale.data.sources.open import open_data
from tlscale.data.sources.stores import FileStore
from tlscale.recipe.schema import DataSection

AN_HOUR_NS = 3600 * 10**9


def put(path: Path, number: int) -> None:
    """An image of its own for each number; all files have the same size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(path, "BMP")


def put_folder(root: Path) -> Path:
    for number in range(24):
        put(root / ("test" if number % 4 == 0 else "train") / f"c{number % 2}" / f"{number:02}.bmp", number)
    return root


def put_list(root: Path, split_of, label_of=lambda k: k % 2) -> Path:
    for number in range(24):
        put(root / f"{number:02}.bmp", number)
    rows = [f"{number:02}.bmp,c{label_of(number)},{split_of(number)}" for number in range(24)]
    (root / "list.csv").write_text("\n".join(["path,label,split", *rows]))
    return root / "list.csv"


def opened(place: Path, **keys):
    source = "folder" if place.is_dir() else "manifest"
    return open_data(DataSection(source=source, path=str(place), **keys), seed=0)


def both(data, by):
    return used_identity(data, by).sha256, scored_identity(data, by).sha256


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TLSCALE_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("by", ["content", "place"])
def test_another_deal_of_the_same_rows_is_another_identity(tmp_path, by):
    """Labels and file are as before: only which rows are test differs."""
    first = both(opened(put_list(tmp_path / "a", lambda k: "test" if k % 6 in (0, 1) else "train")), by)
    second = both(opened(put_list(tmp_path / "a", lambda k: "test" if k % 6 in (2, 3) else "train")), by)
    assert first[0] != second[0]
    assert first[1] != second[1]


@pytest.mark.parametrize("by", ["content", "place"])
def test_a_test_split_that_changes_alone_changes_what_is_scored(tmp_path, by):
    root = put_folder(tmp_path / "a")
    first = both(opened(root), by)
    put(root / "test" / "c0" / "99.bmp", 99)
    second = both(opened(root), by)
    assert first[0] == second[0]
    assert first[1] != second[1]


@pytest.mark.parametrize("by", ["content", "place"])
def test_other_labels_hold_outs_and_limits_are_another_identity(tmp_path, by):
    split_of = lambda k: "test" if k % 4 == 0 else "train"  # noqa: E731
    file = put_list(tmp_path / "a", split_of)
    seen = {both(opened(file), by)[0]}
    seen |= {both(opened(file, validation_fraction=0.3), by)[0], both(opened(file, train_limit=10), by)[0]}
    relabelled = put_list(tmp_path / "a", split_of, lambda k: 0 if k == 3 else k % 2)
    seen.add(both(opened(relabelled), by)[0])
    assert len(seen) == 4


def test_copies_with_new_times_are_the_same_data(tmp_path):
    root = put_folder(tmp_path / "a")
    for file in root.rglob("*.bmp"):
        os.utime(file, (1e9, 1e9))
    shutil.copytree(root, tmp_path / "b", copy_function=shutil.copyfile)
    for by in ("content", "place"):
        assert both(opened(root), by) == both(opened(tmp_path / "b"), by)
    (tmp_path / "b" / "train" / "c0" / "02.bmp").rename(tmp_path / "b" / "train" / "c0" / "021.bmp")
    assert both(opened(root), "content") == both(opened(tmp_path / "b"), "content")


def test_other_pixels_under_equal_names_sizes_and_times_are_other_data(tmp_path):
    root = put_folder(tmp_path / "a")
    file = root / "train" / "c0" / "02.bmp"
    old = file.stat()
    first = both(opened(root), "content")
    put(file, 77)
    os.utime(file, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert file.stat().st_size == old.st_size
    second = both(opened(root), "content")
    assert first[0] != second[0]
    assert first[1] == second[1]


def test_content_is_used_where_it_is_known_and_the_result_knows_what_it_scored(tmp_path):
    data = opened(put_folder(tmp_path / "a"))
    assert used_identity(data).by == "place"
    facts = result_identity(data)
    assert (facts["used_by"], facts["scored_by"]) == ("place", "content")
    for split in (data.train, data.validation):
        for i in range(len(split)):
            split.read(i)
    assert used_identity(data) == used_identity(data, "content")


# --- The index --------------------------------------------------------------------------------------------------------


def wait_until_settled(root: Path) -> None:
    """Times of change cannot be set: who wants files that were not changed just now has to wait."""
    newest = max(file.stat().st_ctime for file in root.rglob("*"))
    time.sleep(max(0.0, newest + 2.1 - time.time()))


def test_what_was_read_once_is_not_read_again_and_what_changed_is(tmp_path, monkeypatch):
    root = put_folder(tmp_path / "a")
    wait_until_settled(root)
    first = opened(root).train.digests()
    read = []
    plain = FileStore.read
    monkeypatch.setattr(FileStore, "read", lambda self, row: (read.append(self.where(row)), plain(self, row))[1])
    assert (opened(root).train.digests() == first).all()
    assert read == []
    changed = Path(opened(root).train.where(3))
    old = changed.stat()
    put(changed, 77)  # of the same size
    os.utime(changed, ns=(old.st_atime_ns, old.st_mtime_ns))
    root.rename(tmp_path / "moved")
    second = opened(tmp_path / "moved").train.digests()
    assert len(read) == 1  # in place, with its times set back; all others are known wherever they lie
    assert (second != first).sum() == 1


def test_what_was_changed_just_now_or_by_another_clock_is_not_remembered(tmp_path):
    put(tmp_path / "a.bmp", 0)
    found = file_stamp((tmp_path / "a.bmp").stat())
    changed_ns = found[4]
    assert stamp_bytes(found, changed_ns + 10**9) is None
    assert stamp_bytes(found, changed_ns - AN_HOUR_NS) is None  # the clock was set back since
    assert stamp_bytes((*found[:3], changed_ns + AN_HOUR_NS, changed_ns), changed_ns + AN_HOUR_NS) is None
    assert stamp_bytes((found[0], 0, *found[2:]), changed_ns + AN_HOUR_NS) is None  # no inode
    assert stamp_bytes(found, changed_ns + AN_HOUR_NS) is not None


def test_a_damaged_index_is_not_believed(tmp_path):
    index = ContentIndex(tmp_path / "index")
    index.add({b"one": content_digest(b"1"), b"two": content_digest(b"2")})
    assert index.look_up([b"one", b"two", b"three"]) == {b"one": content_digest(b"1"), b"two": content_digest(b"2")}
    content = index.path.read_bytes()
    at = content.index(content_digest(b"1"))
    index.path.write_bytes(content[:at] + b"\0" + content[at + 1 :])
    assert index.look_up([b"one", b"two"]) == {b"two": content_digest(b"2")}
    index.path.write_bytes(b"no database")
    assert index.look_up([b"one"]) == {}
    index.add({b"one": content_digest(b"1")})  # is no error


def test_pixels_with_another_shape_or_type_are_other_images():
    pixels = np.arange(12, dtype=np.uint8)
    images = (pixels.reshape(3, 4), pixels.reshape(4, 3), pixels.reshape(3, 4).view(np.int8), pixels.tobytes())
    assert len({content_digest(image) for image in images}) == 4
    assert content_digest(np.asfortranarray(images[0])) == content_digest(images[0])
