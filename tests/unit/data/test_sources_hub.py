"""The hub's library on real local data: a folder of Parquet, a saved data set, a prepared cache; and no network."""

from __future__ import annotations

import json
import pickle
import shutil
import time
from pathlib import Path

import datasets
import pytest

from tests.recipes.wrong_data import put_folder, put_image
from tlscale.data.sources.open import ImageData, open_data
from tlscale.errors import DataError
from tlscale.recipe.schema import DataSection

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def open_source(source: str, path: Path | str, **keys) -> ImageData:
    return open_data(DataSection.model_validate({"source": source, "path": str(path), **keys}), 0)


def raw_images(folder: Path, count: int) -> list[bytes]:
    return [put_image(folder / f"{n}.png", grey=n).read_bytes() for n in range(count)]


def make(raw: list[bytes], labels: list[int], **columns) -> datasets.Dataset:
    features = datasets.Features(
        {
            "img": datasets.Image(),
            "label": datasets.ClassLabel(names=["dog", "cat"]),
            **{name: datasets.Value("int64") for name in columns},
        }
    )
    rows = {"img": [{"bytes": b, "path": None} for b in raw], "label": labels, **columns}
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.fixture
def raw(tmp_path) -> list[bytes]:
    return raw_images(tmp_path / "raw", 6)


@pytest.fixture
def parquet_folder(tmp_path, raw) -> Path:
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    make(raw, [0, 1, 0, 1, 0, 1]).to_parquet(folder / "train-00000-of-00001.parquet")
    make(raw[:2], [1, 0]).to_parquet(folder / "test-00000-of-00001.parquet")
    return folder.parent


def test_local_folder_of_parquet(parquet_folder, raw):
    data = open_source("hub", parquet_folder, validation_fraction=0.0)
    assert data.classes == ("dog", "cat")
    assert [data.train.read(i) for i in range(6)] == raw
    assert data.train.labels_N.tolist() == [0, 1, 0, 1, 0, 1]
    assert data.test.labels_N.tolist() == [1, 0]
    assert data.test.where(1) == f"{parquet_folder}, split 'test' row 1"
    assert pickle.loads(pickle.dumps(data.train)).read(3) == raw[3]
    with pytest.raises(DataError, match=r"data.revision: has no effect"):
        open_source("hub", parquet_folder, revision="main")
    with pytest.raises(DataError, match=r"no split 'tran'.*It has .*Did you mean 'train'"):
        open_source("hub", parquet_folder, train_split="tran")


def test_fingerprint_is_stable_and_follows_the_data(parquet_folder, raw):
    prints = [open_source("hub", parquet_folder).identity["fingerprint"] for _ in range(2)]
    make(raw[::-1], [0, 1, 0, 1, 0, 1]).to_parquet(parquet_folder / "data" / "train-00000-of-00001.parquet")
    prints.append(open_source("hub", parquet_folder).identity["fingerprint"])
    assert prints[0] == prints[1] != prints[2]


def test_saved_on_disk(tmp_path, raw):
    splits = {"train": make(raw[:4], [0, 1, 0, 1]), "valid": make(raw[4:], [1, 1]), "extra": make(raw[:1], [0])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    data = open_source("disk", tmp_path / "saved")
    assert data.identity["num_images"] == {"train": 4, "validation": 2}
    assert data.validation.read(0) == raw[4]
    assert any("'extra'" in note for note in data.notes)
    splits["train"].save_to_disk(tmp_path / "one")
    assert len(open_source("disk", tmp_path / "one", validation_fraction=0.0).train) == 4


def test_local_folder_of_images(tmp_path):
    put_folder(tmp_path / "set", train__cat=3, train__dog=3, test__cat=1)
    data = open_source("hub", tmp_path / "set", validation_fraction=0.0)
    assert data.classes == ("cat", "dog")
    assert data.train.labels_N.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.train.read(5) == (tmp_path / "set" / "train" / "dog" / "2.png").read_bytes()
    (tmp_path / "set" / "train" / "dog" / "2.png").unlink()
    with pytest.raises(DataError, match=r"row 5: .*dog/2.png: cannot be read: No such file"):
        data.train.read(5)


def test_labels_of_text(tmp_path, raw):
    features = datasets.Features({"image": datasets.Value("binary"), "label": datasets.Value("string")})
    rows = {"image": raw, "label": ["b", "a"] * 3}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    data = open_source("disk", tmp_path / "saved", validation_fraction=0.0)
    assert data.classes == ("a", "b")
    assert [data.train.read(i) for i in range(6)] == raw


def test_columns_must_be_clear(tmp_path, raw):
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "fine": datasets.ClassLabel(names=["x", "y"]),
            "coarse": datasets.ClassLabel(names=["p", "q"]),
            "size": datasets.Value("float32"),
        }
    )
    images = [{"bytes": b, "path": None} for b in raw]
    rows = {"image": images, "fine": [0, 1] * 3, "coarse": [1, 0] * 3, "size": [0.5] * 6}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=r"Say which in data.label_column.*'fine', 'coarse'"):
        open_source("disk", tmp_path / "saved")
    assert open_source("disk", tmp_path / "saved", label_column="coarse").classes == ("p", "q")
    with pytest.raises(DataError, match=r"labels are of type float"):
        open_source("disk", tmp_path / "saved", label_column="size")
    with pytest.raises(DataError, match=r"expected images, or binary"):
        open_source("disk", tmp_path / "saved", label_column="fine", image_column="size")


def test_withheld_test_labels(tmp_path, raw):
    splits = {"train": make(raw[:4], [0, 1, 0, 1]), "test": make(raw[4:], [-1, -1])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    data = open_source("disk", tmp_path / "saved", validation_fraction=0.0)
    assert data.test is None
    assert any("withheld" in note for note in data.notes)


def prepare_cache(cache: Path, parquet_folder: Path, commit: str) -> None:
    """What `load_dataset('somebody/images')` leaves behind, made from local files."""
    built = datasets.load_dataset_builder(str(parquet_folder), cache_dir=str(cache.parent / "built"))
    built.download_and_prepare()
    target = cache / "somebody___images" / "default" / "0.0.0" / commit
    shutil.copytree(built.cache_dir, target)
    for file in target.glob(f"{built.dataset_name}-*.arrow"):
        file.rename(target / file.name.replace(built.dataset_name, "images", 1))
    info = json.loads((target / "dataset_info.json").read_text())
    (target / "dataset_info.json").write_text(json.dumps(info | {"dataset_name": "images", "config_name": "default"}))


def test_the_cache_is_used_without_a_network_and_its_commit_is_known(tmp_path, parquet_folder, raw):
    prepare_cache(tmp_path / "hf", parquet_folder, COMMIT)
    for revision in (None, COMMIT):
        data = open_source("hub", "somebody/images", revision=revision, validation_fraction=0.0)
        assert data.identity["commit"] == COMMIT
        assert data.identity["place"] == "somebody/images"
        assert data.train.read(5) == raw[5]
    for other, says in (("f" * 40, "is not that commit"), ("v2", "may be another")):
        with pytest.raises(DataError, match=says):
            open_source("hub", "somebody/images", revision=other)


def test_no_network_and_no_cache(tmp_path):
    start = time.monotonic()
    with pytest.raises(DataError, match=r"the hub cannot be reached") as caught:
        open_source("hub", "nobody/nothing")
    assert str(tmp_path / "hf") in str(caught.value)
    assert time.monotonic() - start < 15


@pytest.mark.parametrize("name", ["a/b/c", "./not-there", "/not/there", "~/x"])
def test_names_that_are_neither(name):
    with pytest.raises(DataError, match=r"neither a folder here nor a name on the hub"):
        open_source("hub", name)


def test_no_code_of_a_data_set_is_run(tmp_path):
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(DataError, match=r"cannot be loaded"):
        open_source("hub", folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("features", "columns", "keys"),
    [
        ({"tags": datasets.Sequence(datasets.ClassLabel(names=["dog", "cat", "cow"]))},
         {"tags": [[0, 1], [2], []]}, {}),
        ({"tags": datasets.Sequence(datasets.Value("string"))}, {"tags": [["dog", "cat"], ["cow"], []]},
         {"label_column": "tags", "classes": ["dog", "cat", "cow"]}),
        ({name: datasets.Value("int64") for name in ("dog", "cat", "cow")},
         {"dog": [1, 0, 0], "cat": [1, 0, 0], "cow": [0, 1, 0]}, {"label_columns": ["dog", "cat", "cow"]}),
        ({"tags": datasets.Value("string")}, {"tags": ["dog;cat", "cow", ""]},
         {"label_column": "tags", "label_separator": ";", "classes": ["dog", "cat", "cow"]}),
    ],
)  # fmt: skip
def test_several_labels_an_image(features, columns, keys, raw, tmp_path):
    rows = {"img": [{"bytes": one, "path": None} for one in raw[:3]], **columns}
    made = datasets.Dataset.from_dict(rows, features=datasets.Features({"img": datasets.Image(), **features}))
    made.save_to_disk(str(tmp_path / "saved"))
    data = open_source("disk", tmp_path / "saved", task="multi_label", validation_fraction=0.0, **keys)
    assert data.classes == ("dog", "cat", "cow")
    assert data.train.labels_N.tolist() == [[True, True, False], [False, False, True], [False] * 3]
