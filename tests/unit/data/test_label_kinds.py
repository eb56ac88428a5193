"""Labels of a column that are no classes are refused by a stated rule; names of classes are not."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.recipes.wrong_data import put_image
from tlscale.data.sources.label_kinds import are_numbers, separator_of
from tlscale.data.sources.open import BadImages, open_data
from tlscale.errors import DataError
from tlscale.recipe.schema import DataSection

SPECIES = [
    f"Animalia;Chordata;{genus} {one}" for genus in ("Parus", "Turdus", "Corvus") for one in ("a", "b", "c", "d")
]


@pytest.mark.parametrize(
    ("names", "separator"),
    [
        (["young;female", "young;male", "old;female"], ";"),
        (["cat|dog", "dog|cow", "cow|cat", "cat", "pig"], "|"),
        (["beach, sea", "sea, sunset", "beach, sunset, sea", "mountain"], ","),
        (["a;b", "c"], None),
        (["a;b", "a;c", "b"], None),  # two texts alone
        (["tench, Tinca tinca", "goldfish, Carassius auratus", "crane, bird", "crane, machine"], None),
        (SPECIES, None),  # each has a part of its own
        (["T-shirt/top", "Ankle boot", "Dress"], None),
        ([], None),
    ],
)
def test_several_labels(names, separator):
    assert separator_of(dict.fromkeys(names, 5)) == separator


@pytest.mark.parametrize(
    ("names", "images", "column", "expected"),
    [
        (range(10), 1, None, False),
        (range(100), 500, None, False),  # as of CIFAR-100
        (range(1, 103), 10, "label", False),  # from 1 on
        (range(0, 1000, 3), 9, None, False),  # some classes of more
        ([1355868, *range(1360000, 1400000, 900)], 30, "species", False),  # numbers of a catalogue
        (range(18, 66), 40, None, True),  # ages
        (range(1950, 2021, 2), 40, None, True),  # years, every second
        (range(0, 91), 12, "age", True),
        (range(0, 91), 12, "patient_age_years", True),
        (range(0, 91), 12, "stage", False),
        (range(18, 66), 40, "weight_class", False),
        (range(101, 151), 40, "species_id", False),
        (range(0, 91), 12, "age_group", False),
        (range(0, 900, 7), 1, None, True),  # each its own
        ([0.5 * step for step in range(25)], 20, None, True),
        ([0.5, 1.0, 1.5, 2.0], 20, "size", False),
        ([f"{number:03}" for number in range(120)], 9, None, False),
        ([*range(40, 80), "unknown"], 9, "age", False),  # a class that is no number
    ],
)
def test_numbers(names, images, column, expected):
    assert are_numbers({str(name): images for name in names}, column) is expected


def table(folder, labels, column="label", kind=None) -> dict:
    for row in range(len(labels)):
        put_image(folder / f"{row}.png", grey=row)
    paths = [f"{row}.png" for row in range(len(labels))]
    pq.write_table(pa.table({"path": paths, column: pa.array(labels, kind)}), folder / "list.parquet")
    return {"source": "manifest", "path": str(folder / "list.parquet"), "label_column": column}


JOINED = ["young;female", "young;male", "old;female"] * 2
AGES = [str(age) for age in range(20, 45)] * 2


@pytest.mark.parametrize(
    ("labels", "fragments"),
    [
        (
            JOINED,
            (
                "look like several an image, with ';' between them: 'old;female'",
                "data.label_separator: ';'",
                "data.task: single_label",
            ),
        ),
        (AGES, ("look like numbers, of which there are 25", "Regression is not supported", "data.task: single_label")),
        ([[0, 1], [1], []], ("of type list", "write data.task: multi_label")),
        ([20.5, 30.0, 25.5], ("of type double", "Regression is not supported")),
    ],
)
def test_what_is_no_class_is_refused(labels, fragments, tmp_path):
    with pytest.raises(DataError) as caught:
        open_data(DataSection(**table(tmp_path, labels)), 0)
    assert [fragment for fragment in fragments if fragment not in str(caught.value)] == []


@pytest.mark.parametrize(("labels", "key"), [(JOINED, "task"), (JOINED, "classes"), (AGES, "task")])
def test_who_says_that_they_are_classes_is_believed(labels, key, tmp_path):
    section = (
        table(tmp_path, labels) | {"task": {"task": "single_label"}, "classes": {"classes": sorted(set(labels))}}[key]
    )
    assert open_data(DataSection(**section), 0).classes == tuple(sorted(set(labels)))


@pytest.mark.parametrize("labels", [JOINED, AGES])
def test_a_run_that_has_begun_goes_on(labels, tmp_path):
    """The run was made by a version that knew no such rule."""
    section = DataSection(**table(tmp_path, labels))
    assert open_data(section, 0, bad_images=BadImages()).classes == tuple(sorted(set(labels)))
