"""Fashion-MNIST by name: places, checksums, and the sample that ships."""

from __future__ import annotations

import gzip
import importlib.util
import io
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.recipes.wrong_data import put_idx_split
from tlscale.data.sources import fashion_mnist
from tlscale.data.sources.fashion_mnist import CHECKSUMS, CLASSES, SAMPLE, check_content
from tlscale.data.sources.hub import read_hub_source
from tlscale.data.sources.idx import read_split
from tlscale.data.sources.open import ImageData, open_data
from tlscale.data.sources.stores import ArrayStore
from tlscale.data.sources.tables import SourceSplit
from tlscale.errors import DataError
from tlscale.recipe.schema import DataSection


def open_fashion(**keys) -> ImageData:
    return open_data(DataSection.model_validate({"source": "fashion_mnist", **keys}), 0)


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """A machine without the files: no Debian package, no cache, no network (conftest)."""
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "debian")
    monkeypatch.setenv("TLSCALE_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_real_files(monkeypatch, fashion_mnist_dir):
    monkeypatch.setenv("TLSCALE_DATA", str(fashion_mnist_dir))
    data = open_fashion()
    assert data.classes == CLASSES
    assert data.identity["num_images"] == {"train": 54_000, "validation": 6_000, "test": 10_000}
    assert data.identity["checksums"] == CHECKSUMS
    assert data.identity["place"] == str(fashion_mnist_dir)
    assert np.bincount(data.test.labels_N).tolist() == [1000] * 10
    assert np.bincount(data.train.labels_N).tolist() == [5400] * 10
    assert not data.is_sample
    assert data.train.read(0).shape == (28, 28)


@pytest.mark.parametrize("place", ["named/fashion-mnist", "named", "cache/data/fashion-mnist", "debian"])
def test_places_and_plain_files(nowhere, monkeypatch, fashion_mnist_dir, place):
    monkeypatch.setenv("TLSCALE_DATA", str(nowhere / "named"))
    (nowhere / place).mkdir(parents=True)
    for file in fashion_mnist_dir.glob("*.gz"):
        if "labels" in file.name:
            (nowhere / place / file.stem).write_bytes(gzip.decompress(file.read_bytes()))
        else:
            (nowhere / place / file.name).symlink_to(file)
    assert open_fashion().identity["place"] == str(nowhere / place)


def test_other_content_is_refused(nowhere, monkeypatch):
    monkeypatch.setenv("TLSCALE_DATA", str(nowhere))
    for prefix in ("train", "t10k"):
        put_idx_split(nowhere, prefix, [0, 1, 2])
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte: its content is not Fashion-MNIST's"):
        open_fashion(fallback="sample")


def test_half_a_set_is_refused(nowhere, monkeypatch, fashion_mnist_dir):
    monkeypatch.setenv("TLSCALE_DATA", str(nowhere))
    shutil.copy(fashion_mnist_dir / "train-labels-idx1-ubyte.gz", nowhere)
    with pytest.raises(DataError, match=r"has no train-images-idx3-ubyte"):
        open_fashion(fallback="sample")


def test_not_found_names_places_and_ways_out(nowhere, monkeypatch):
    monkeypatch.setenv("TLSCALE_DATA", str(nowhere / "named"))
    with pytest.raises(DataError) as caught:
        open_fashion()
    message = str(caught.value)
    for part in ("named/fashion-mnist", "cache/data/fashion-mnist", "debian", "the hub", "dataset-fashion-mnist"):
        assert part in message
    assert "TLSCALE_DATA" in message
    assert "fallback: sample" in message


@pytest.mark.parametrize("key", ["train_split", "validation_split", "test_split"])
def test_split_names_have_no_effect(key):
    with pytest.raises(DataError, match=rf"data.{key}: has no effect"):
        open_fashion(**{key: "other"})


def test_the_sample_stands_in_loudly(nowhere):
    data = open_fashion(fallback="sample")
    assert data.is_sample
    assert data.identity["is_sample"] is True
    assert data.notes[0].startswith("FALLBACK SAMPLE: ")
    assert data.classes == CLASSES
    assert data.identity["num_images"] == {"train": 5400, "validation": 600, "test": 1000}
    assert np.bincount(data.test.labels_N).tolist() == [100] * 10


def test_the_sample_stands_in_without_the_package_of_the_hub(nowhere, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not there
    assert open_fashion(fallback="sample").is_sample
    with pytest.raises(DataError, match=r"data.source: .*datasets, which is not installed.*pip install datasets"):
        read_hub_source(DataSection(source="hub", path="somebody/something"))


def test_the_sample_that_ships():
    assert SAMPLE.stat().st_size < 4_000_000
    assert "MIT" in SAMPLE.with_name("LICENSE").read_text()
    assert "Zalando SE" in SAMPLE.with_name("LICENSE").read_text()
    table = pq.read_table(SAMPLE)
    for split, count in (("train", 600), ("test", 100)):
        labels = [r["label"] for r in table.select(["label", "split"]).to_pylist() if r["split"] == split]
        assert np.bincount(labels).tolist() == [count] * 10


def test_the_sample_equals_the_originals(fashion_mnist_dir):
    originals = {name: read_split(fashion_mnist_dir, name, p)[0] for name, p in (("train", "train"), ("test", "t10k"))}
    rows = pq.read_table(SAMPLE).to_pylist()
    seen = set()
    for row in rows:
        split, number = row["image"]["path"].split("/")
        original = originals[split]
        pixels = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))
        assert np.array_equal(pixels, original.store.read(int(number)))
        assert row["label"] == original.label_ids_N[int(number)]
        assert row["split"] == split
        seen.add((split, number))
    assert len(seen) == len(rows) == 7000


def test_the_script_chooses_the_rows_that_ship(fashion_mnist_dir):
    script = Path(__file__).parents[3] / "scripts" / "make_sample.py"
    spec = importlib.util.spec_from_file_location("make_sample", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows = module.chosen_rows(fashion_mnist_dir, "test", "t10k", 1000)
    shipped = [row for row in pq.read_table(SAMPLE).to_pylist() if row["split"] == "test"]
    assert [row["image"]["path"] for row in rows] == [row["image"]["path"] for row in shipped]


def test_content_is_verified_in_any_order(fashion_mnist_dir):
    split, _ = read_split(fashion_mnist_dir, "test", "t10k")
    order = np.random.default_rng(0).permutation(10_000)
    store = ArrayStore("x", split.store.images_NHW[order], "")
    shuffled = SourceSplit("test", store, split.label_names, split.label_ids_N[order])
    check_content("test", shuffled, "place")
    swapped = SourceSplit("test", store, split.label_names, split.label_ids_N)
    with pytest.raises(DataError, match=r"place: the test split holds other images or labels"):
        check_content("test", swapped, "place")
