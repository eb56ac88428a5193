"""One row a source: here how it is read and recognised, in the recipe which keys it takes."""

import pytest

from tlscale.data.sources import open as opening
from tlscale.errors import DataError
from tlscale.recipe.schema import DataSection
from tlscale.recipe.sources import SOURCE_KEYS, SOURCES


def test_each_source_of_recipes_has_a_reader():
    assert set(opening.SOURCES) == set(SOURCES)


def test_all_keys_of_sources_are_keys_of_the_recipe_that_may_be_missing():
    fields = DataSection.model_fields
    assert all(fields[key].default is None for key in SOURCE_KEYS)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("key", SOURCE_KEYS)
def test_a_source_takes_its_own_keys_and_no_others(source, key):
    values = {
        "path": "somewhere",
        "fallback": "sample",
        "class_folder": "top",
        "task": "single_label",
        "label_columns": ["one", "two"],
        **dict.fromkeys(("config", "revision"), "one"),
    }
    given = {"path": "somewhere"} if SOURCES[source].path != "none" else {}
    takes = given if key == "path" else SOURCES[source].keys
    beside = {"task": "multi_label"} if key in ("label_columns", "label_separator") else {}
    section = {"source": source, **given, **beside, key: values.get(key, "column")}
    if key in takes:
        assert DataSection(**section).source == source
    else:
        with pytest.raises(ValueError, match=rf"{key}: has no effect with source '{source}'\. Remove it .*: \w+"):
            DataSection(**section)


def test_a_reader_that_is_missing_is_an_error_with_all_that_there_are():
    section = DataSection.model_construct(source="tape", path="x")
    with pytest.raises(DataError, match=r"data.source: there is no 'tape'. There are: disk, idx, "):
        opening.read_source(section)


@pytest.mark.parametrize(
    ("files", "source"),
    [
        (["dataset_dict.json", "train/state.json"], "disk"),
        (["state.json"], "disk"),
        (["t10k-images-idx3-ubyte.gz", "cat/1.png"], "idx"),
        (["train-images.idx3-ubyte"], "idx"),
        (["train.parquet"], "hub"),
        (["train.parquet", "cat/1.png"], "folder"),
        (["cat/1.png"], "folder"),
        ([], "folder"),
    ],
)
def test_a_folder_is_recognised_by_what_is_in_it(tmp_path, files, source):
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    assert opening.recognised_source(str(tmp_path)) == source


def test_tables_and_names_are_recognised(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert opening.recognised_source("fashion_mnist") == "fashion_mnist"
    (tmp_path / "fashion_mnist").mkdir()
    assert opening.recognised_source("fashion_mnist") == "folder"
    for name, source in (("a.csv", "manifest"), ("A.PQ", "manifest"), ("a.png", None)):
        (tmp_path / name).touch()
        assert opening.recognised_source(name) == source
    assert opening.recognised_source("not_there.csv") is None
