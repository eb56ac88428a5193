"""Folders, manifests and IDX files: what they give when they are right."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.recipes.wrong_data import put_folder, put_idx_split, put_image
from tlscale.data.decode import decode_image
from tlscale.data.sources.open import ImageData, open_data
from tlscale.errors import DataError
from tlscale.recipe.schema import DataSection


def open_source(source: str, path: Path, seed: int = 0, **keys) -> ImageData:
    return open_data(DataSection.model_validate({"source": source, "path": str(path), **keys}), seed)


def places(split) -> list[str]:
    return [split.where(i) for i in range(len(split))]


def test_flat_folder(tmp_path):
    put_folder(tmp_path, dog=20, cat=20)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "cat" / ".DS_Store").write_text("x")
    (tmp_path / "cat" / "Thumbs.db").write_text("x")
    (tmp_path / "README.md").write_text("x")
    data = open_source("folder", tmp_path)
    assert data.classes == ("cat", "dog")
    assert (len(data.train), len(data.validation), data.test) == (36, 4, None)
    assert sorted(places(data.train) + places(data.validation)) == sorted(map(str, tmp_path.glob("*/*.png")))
    for i in range(36):
        assert data.train.read(i) == Path(data.train.where(i)).read_bytes()
        assert data.classes[data.train.labels_N[i]] == Path(data.train.where(i)).parent.name
    assert any("README.md" in note for note in data.notes)


@pytest.mark.parametrize("validation", ["validation", "valid", "val"])
def test_folder_with_splits(tmp_path, validation):
    put_folder(tmp_path, train__a=5, train__b=5, test__a=2, spare__a=1, **{f"{validation}__b": 3})
    data = open_source("folder", tmp_path)
    assert data.identity["num_images"] == {"train": 10, "validation": 3, "test": 2}
    assert data.validation.labels_N.tolist() == [1, 1, 1]
    assert any("'spare'" in note for note in data.notes)
    assert any("test: no images of 1 of 2 classes: 'b'" in note for note in data.notes)


def test_folder_with_named_and_nested_splits(tmp_path):
    put_folder(tmp_path, img__tr__a=3, img__tr__b=3, img__va__a=1, img__te__b=2)
    keys = {"train_split": "img/tr", "validation_split": "img/va", "test_split": "img/te"}
    data = open_source("folder", tmp_path, **keys)
    assert data.identity["num_images"] == {"train": 6, "validation": 1, "test": 2}
    with pytest.raises(DataError, match=r"is outside"):
        open_source("folder", tmp_path, train_split="../img")
    with pytest.raises(DataError, match=r"no split 'img/tx'.*Did you mean 'img/t"):
        open_source("folder", tmp_path, **{**keys, "test_split": "img/tx"})


def test_two_validation_folders_must_be_told_apart(tmp_path):
    put_folder(tmp_path, train__a=2, train__b=2, val__a=1, valid__a=1)
    with pytest.raises(DataError, match=r"'valid', 'val'. Say which"):
        open_source("folder", tmp_path)
    assert len(open_source("folder", tmp_path, validation_split="val").validation) == 1


def test_links_are_followed_and_dead_ones_found(tmp_path):
    put_folder(tmp_path / "data", a=2, b=2)
    (tmp_path / "data" / "b" / "far.png").symlink_to(put_image(tmp_path / "elsewhere" / "x.png"))
    (tmp_path / "data" / "c").symlink_to(put_folder(tmp_path / "more", k=2) / "k")
    assert open_source("folder", tmp_path / "data").classes == ("a", "b", "c")
    (tmp_path / "data" / "a" / "dead.png").symlink_to(tmp_path / "nothing.png")
    with pytest.raises(DataError, match=r"dead.png: .*link to nowhere"):
        open_source("folder", tmp_path / "data")


def test_a_file_that_goes_away_is_named(tmp_path):
    data = open_source("folder", put_folder(tmp_path, a=2, b=2), validation_fraction=0.0)
    Path(data.train.where(3)).unlink()
    with pytest.raises(DataError, match=r"b/1.png: cannot be read: No such file"):
        data.train.read(3)


def test_odd_names_survive(tmp_path):
    odd = "<b>été [x]"
    put_image(tmp_path / odd / "a b.png")
    put_image(tmp_path / "1" / "ü.PNG")
    data = open_source("folder", tmp_path, validation_fraction=0.0)
    assert data.classes == ("1", odd)
    assert data.train.read(1)[:4] == b"\x89PNG"


def test_fingerprint_follows_the_data(tmp_path):
    put_folder(tmp_path, a=4, b=4)
    first = open_source("folder", tmp_path).identity
    again = open_source("folder", tmp_path, train_limit=4, seed=9).identity
    assert first["fingerprint"] == again["fingerprint"]
    os.utime(tmp_path / "a" / "0.png", ns=(1, 1))
    touched = open_source("folder", tmp_path).identity
    assert touched["fingerprint"] != first["fingerprint"]
    assert touched["labels_sha256"] == first["labels_sha256"]
    renamed = open_source("folder", tmp_path, classes=["b", "a"]).identity
    assert renamed["labels_sha256"] != first["labels_sha256"]


def test_csv(tmp_path):
    put_folder(tmp_path, cat=3, dog=3)
    elsewhere = put_image(tmp_path / "far" / "x.png")
    rows = [
        "cat/0.png,NA,train",
        "dog/0.png,null,train",
        f"{elsewhere},NA,train",
        "dog/1.png,null,val",
        "cat/2.png,NA,test",
    ]
    (tmp_path / "list.csv").write_text("\ufeffpath,label,split\r\n" + "\r\n".join(rows) + "\r\n")
    data = open_source("manifest", tmp_path / "list.csv")
    assert data.classes == ("NA", "null")
    assert data.identity["num_images"] == {"train": 3, "validation": 1, "test": 1}
    assert data.train.where(2) == str(elsewhere)
    assert data.train.read(1) == (tmp_path / "dog/0.png").read_bytes()
    assert data.validation.where(0) == str(tmp_path / "dog/1.png")


def test_csv_keeps_text_as_it_is_and_orders_numbers(tmp_path):
    put_folder(tmp_path, a=4)
    (tmp_path / "list.tsv").write_text("file\tkind\na/0.png\t10\na/1.png\t9\na/2.png\t10\na/3.png\t9\n")
    data = open_source("manifest", tmp_path / "list.tsv", label_column="kind", validation_fraction=0.0)
    assert data.classes == ("9", "10")
    assert data.train.labels_N.tolist() == [1, 0, 1, 0]
    (tmp_path / "list.csv").write_text("file,label\na/0.png,01\na/1.png,1\n")
    assert open_source("manifest", tmp_path / "list.csv", validation_fraction=0.0).classes == ("01", "1")


def test_columns_must_be_clear(tmp_path):
    put_folder(tmp_path, a=2)
    (tmp_path / "list.csv").write_text("path,file,label\na/0.png,a/0.png,x\na/1.png,a/1.png,y\n")
    with pytest.raises(DataError, match=r"columns 'path', 'file' may all be it. Say which in data.image_column"):
        open_source("manifest", tmp_path / "list.csv")
    with pytest.raises(DataError, match=r"no column 'fil'.*Did you mean 'file'"):
        open_source("manifest", tmp_path / "list.csv", image_column="fil")
    assert len(open_source("manifest", tmp_path / "list.csv", image_column="file", validation_fraction=0.0).train) == 2


@pytest.mark.parametrize("kind", ["binary", "struct", "paths in a struct", "paths"])
def test_parquet(tmp_path, kind):
    paths = [put_image(tmp_path / "i" / f"{n}.png", grey=n) for n in range(6)]
    raw = [path.read_bytes() for path in paths]
    names = [str(path.relative_to(tmp_path)) for path in paths]
    column = {
        "binary": pa.array(raw, pa.binary()),
        "struct": pa.array(
            [{"bytes": b, "path": None} for b in raw], pa.struct({"bytes": pa.binary(), "path": pa.string()})
        ),
        "paths in a struct": pa.array(
            [{"bytes": None, "path": p} for p in names], pa.struct({"bytes": pa.binary(), "path": pa.string()})
        ),
        "paths": pa.array(names).dictionary_encode().cast(pa.string()),
    }[kind]
    splits = ["test", "train", "train", "train", "train", "test"]
    table = pa.table({"label": pa.array([1, 0, 1, 0, 1, 0], pa.int8()), "image": column, "split": splits})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=2)
    data = open_source("manifest", tmp_path / "t.parquet", validation_fraction=0.0)
    assert [data.train.read(i) for i in range(4)] == raw[1:5]
    assert data.train.labels_N.tolist() == [0, 1, 0, 1]
    assert data.test.read(1) == raw[5]
    assert data.test.where(1) in ("t.parquet row 5", str(paths[5]))


def test_parquet_with_gaps(tmp_path):
    table = pa.table({"label": ["a", "b"], "image": pa.array([b"x", None], pa.binary())})
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"1 of 2 rows have no image"):
        open_source("manifest", tmp_path / "t.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"bad.parquet: cannot be read as a table"):
        open_source("manifest", tmp_path / "bad.parquet")


@pytest.mark.parametrize("end", ["", ".gz"])
def test_idx(tmp_path, end):
    put_idx_split(tmp_path, "train", [0, 1, 2] * 5, end)
    put_idx_split(tmp_path, "t10k", [2, 0], end)
    data = open_source("idx", tmp_path, validation_fraction=0.0)
    assert data.classes == ("0", "1", "2")
    assert (len(data.train), len(data.test), data.validation) == (15, 2, None)
    assert data.test.labels_N.tolist() == [2, 0]
    assert data.train.read(2).tolist() == (np.arange(32, 48) % 256).reshape(4, 4).tolist()
    assert data.train.where(2) == f"{tmp_path}/train-images-idx3-ubyte{end} image 2"
    assert open_source("idx", tmp_path, classes=["x", "y", "z"]).classes == ("x", "y", "z")


def test_idx_checksums_are_those_of_the_unpacked_file(tmp_path):
    for end in ("", ".gz"):
        put_idx_split(tmp_path / f"e{end}", "train", [0, 1] * 5, end)
    plain, gzipped = (open_source("idx", tmp_path / f"e{end}").identity for end in ("", ".gz"))
    assert plain["checksums"] == gzipped["checksums"]
    assert plain["fingerprint"] == gzipped["fingerprint"]


def test_idx_by_prefix(tmp_path):
    put_idx_split(tmp_path, "letters-train", [1, 2, 1])
    put_idx_split(tmp_path, "letters-test", [2])
    data = open_source("idx", tmp_path, train_split="letters-train", test_split="letters-test")
    assert data.classes == ("1", "2")
    assert data.test.labels_N.tolist() == [1]
    with pytest.raises(DataError, match=r"no IDX files such as train-images"):
        open_source("idx", tmp_path)


def test_a_gzipped_file_cut_short(tmp_path):
    put_idx_split(tmp_path, "train", [0, 1] * 50)
    images = tmp_path / "train-images-idx3-ubyte.gz"
    images.write_bytes(images.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.gz: cannot be read"):
        open_source("idx", tmp_path)
    images.write_bytes(b"no gzip at all")
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.gz: cannot be read"):
        open_source("idx", tmp_path)


def test_splits_travel_to_other_processes(tmp_path):
    put_folder(tmp_path / "f", a=3, b=3)
    put_idx_split(tmp_path / "i", "train", [0, 1] * 3)
    for source in ("folder", "idx"):
        split = open_source(source, tmp_path / source[0], validation_fraction=0.0).train
        copy = pickle.loads(pickle.dumps(split))
        assert copy.where(4) == split.where(4)
        pixels = [decode_image(s.read(4), in_chans=1, max_pixels=99, where="") for s in (split, copy)]
        assert np.array_equal(*pixels)
