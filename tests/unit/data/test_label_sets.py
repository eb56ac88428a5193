"""Several labels an image: the three ways to write them are one, and what is none of them is an error."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.recipes.wrong_data import put_image
from tlscale.data.sources.labelled import open_labelled
from tlscale.data.sources.open import open_data
from tlscale.errors import DataError
from tlscale.recipe.schema import DataSection

SETS = [["cat", "dog"], ["dog"], [], ["cow"], ["cow", "cat"], ["dog", "cow"], ["cat"], ["dog"]]
CLASSES = ("cat", "cow", "dog")


def lists(sets) -> dict:
    return {"label": sets}


def texts(sets) -> dict:
    return {"label": ["; ".join(one) for one in sets]}


def flags(sets, kind=int) -> dict:
    return {name: [kind(name in one) for one in sets] for name in ("dog", "cat", "cow")}


def put_table(folder, columns, ending="parquet", **keys) -> DataSection:
    """Write a table of tiny images; the keys are of `data`, with `task: multi_label`."""
    count = len(next(iter(columns.values())))
    for row in range(count):
        put_image(folder / f"{row}.png", grey=row)
    table = pa.table({"path": [f"{row}.png" for row in range(count)], **columns})
    file = folder / f"list.{ending}"
    if ending == "csv":
        import pyarrow.csv

        pyarrow.csv.write_csv(table, file)
    else:
        pq.write_table(table, file)
    return DataSection(source="manifest", path=str(file), **{"task": "multi_label", **keys})


def label_sets(data, split) -> list[set[str]]:
    return [{data.classes[i] for i in np.flatnonzero(row)} for row in split.labels_N]


@pytest.mark.parametrize(
    ("ending", "columns", "keys", "classes"),
    [
        ("parquet", lists(SETS), {}, CLASSES),
        ("parquet", texts(SETS), {"label_separator": ";"}, CLASSES),
        ("csv", texts(SETS), {"label_separator": ";"}, CLASSES),
        ("csv", flags(SETS), {"label_columns": ["dog", "cow", "cat"]}, ("dog", "cow", "cat")),  # as the recipe has it
        ("parquet", flags(SETS), {"label_columns": ["cat", "dog", "cow"]}, ("cat", "dog", "cow")),
        ("csv", flags(SETS, float), {"label_columns": ["cat", "dog", "cow"]}, ("cat", "dog", "cow")),
        ("parquet", flags(SETS, bool), {"label_columns": ["cat", "dog", "cow"]}, ("cat", "dog", "cow")),
    ],
)
def test_three_ways_to_write_them(ending, columns, keys, classes, tmp_path):
    data = open_data(put_table(tmp_path, columns, ending, validation_fraction=0.0, train_limit=None, **keys), 0)
    assert data.classes == classes
    assert data.has_several_labels
    assert label_sets(data, data.train) == [set(one) for one in SETS]
    assert "train: 1 of 8 images have none of the labels" in data.notes


def test_numbers_in_lists_are_places_in_the_classes(tmp_path):
    sets = [[0, 2], [1], [], [2]]
    data = open_data(put_table(tmp_path, {"label": sets}, classes=list(CLASSES), validation_fraction=0.0), 0)
    assert label_sets(data, data.train) == [{"cat", "dog"}, {"cow"}, set(), {"dog"}]


def test_a_last_separator_and_blanks_say_nothing(tmp_path):
    section = put_table(tmp_path, {"label": ["cat;dog;", " dog ; cow", ";", "cow"]}, label_separator=";",
                        validation_fraction=0.0)  # fmt: skip
    data = open_data(section, 0)
    assert label_sets(data, data.train) == [{"cat", "dog"}, {"cow", "dog"}, set(), {"cow"}]


@pytest.mark.parametrize(
    ("columns", "keys", "fragments"),
    [
        (texts(SETS), {}, ("of type string, and not of lists", "data.label_separator", "data.label_columns")),
        (texts(SETS), {"label_separator": "|"}, ("data.label_separator", "no row has '|'", "look as if they had ';'")),
        (lists(SETS), {"label_separator": ";"}, ("of type list<", "has no separator", "Take it out")),
        ({"label": [["cat"], None, ["dog"]]}, {}, ("1 of 3 rows are null", "Write an empty list")),
        ({"label": [["cat|dog"], ["dog"]]}, {}, ("labels with '|'", "'cat|dog'")),
        ({"label": [["cat "], ["dog"]]}, {}, ("labels with spaces around them",)),
        ({"label": [[0.5], [1.5]]}, {}, ("of type double", "Regression is not supported")),
        ({"cat": [0, 1], "dog": [1, -1]}, {"label_columns": ["cat", "dog"]}, ("'dog'", "'-1', where 0 and 1")),
        ({"cat": ["0", ""], "dog": ["1", "0"]}, {"label_columns": ["cat", "dog"]}, ("'cat'", "'', where 0 and 1")),
        ({"cat": [0, None], "dog": [1, 0]}, {"label_columns": ["cat", "dog"]}, ("1 of 2 rows are null",)),
        (flags(SETS), {"label_columns": ["cat", "dgo"]}, ("data.label_columns", "no column 'dgo'", "'dog'")),
        (flags(SETS), {"label_columns": ["cat", "path"]}, ("cannot be of both the images and the labels",)),
        (lists([["cat"], ["cat"], []]), {}, ("has one class only, 'cat'",)),
    ],
)  # fmt: skip
def test_wrong_label_sets(columns, keys, fragments, tmp_path):
    with pytest.raises(DataError) as caught:
        open_data(put_table(tmp_path, columns, **keys), 0)
    assert [fragment for fragment in fragments if fragment not in str(caught.value)] == []


def test_one_file_with_two_label_sets(tmp_path):
    section = put_table(tmp_path, lists(SETS))
    table = pq.read_table(section.path)
    twice = pa.table({"path": [*table["path"].to_pylist(), "0.png"], "label": [*SETS, ["cow"]]})
    pq.write_table(twice, section.path)
    with pytest.raises(DataError, match=r"1 file has two labels: .*0.png is 'cow' and .*0.png is 'cat\|dog'"):
        open_data(section, 0)


def test_images_that_are_only_scored_may_have_one_label_each(tmp_path):
    section = put_table(tmp_path, {"label": ["dog", "cat", ""]}, label_separator=";")
    found = open_labelled(section, CLASSES)
    assert found.split.labels_N.tolist() == [[False, False, True], [True, False, False], [False] * 3]


def test_a_run_is_other_data_with_one_label_more(tmp_path):
    one = open_data(put_table(tmp_path / "a", lists(SETS)), 0).identity["labels_sha256"]
    other = open_data(put_table(tmp_path / "b", lists([["cat"], *SETS[1:]])), 0).identity["labels_sha256"]
    assert one == open_data(put_table(tmp_path / "c", lists(SETS)), 0).identity["labels_sha256"] != other


def test_classes_that_are_nearly_as_many_as_images_are_announced(tmp_path):
    names = [f"n{row // 2:02}" for row in range(24)]
    data = open_data(put_table(tmp_path / "few", {"label": names[:23]}, task=None), 0)
    assert any(note.startswith("MANY CLASSES: 12 of them, and 23 training images") for note in data.notes)
    data = open_data(put_table(tmp_path / "enough", {"label": names}, task=None), 0)
    assert not any("MANY CLASSES" in note for note in data.notes)
