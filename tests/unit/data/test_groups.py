"""Groups as the sources name them, and splits that do not cut them."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.recipes.wrong_data import put_folder, put_image
from tlscale.data.identity import used_identity
from tlscale.data.sources.labelled import open_labelled
from tlscale.data.sources.open import ImageData, open_data
from tlscale.errors import DataError, RecipeError
from tlscale.recipe import matching
from tlscale.recipe.schema import DataSection


def section_of(source: str, path: Path, **keys) -> DataSection:
    return DataSection.model_validate({"source": source, "path": str(path), **keys})


def open_source(source: str, path: Path, seed: int = 0, **keys) -> ImageData:
    return open_data(section_of(source, path, **keys), seed)


def put_patients(folder: Path, num_patients: int = 12, photos: int = 4) -> Path:
    """A folder of `CLASS/patientN_K.png`; each patient has one class."""
    for patient in range(num_patients):
        for photo in range(photos):
            put_image(folder / "ab"[patient % 2] / f"patient{patient}_{photo}.png", grey=patient * photos + photo)
    return folder


def put_table(folder: Path, rows: list[str], head: str = "path,label,patient") -> Path:
    (folder / "list.csv").write_text("\n".join([head, *rows]) + "\n")
    return folder / "list.csv"


def patient_rows(folder: Path, *, without: str | None = None) -> list[str]:
    """Rows of a table of `put_patients`; the patient `without` has an empty cell."""
    rows = []
    for path in sorted(folder.glob("*/*.png")):
        patient = path.name.split("_")[0]
        rows.append(f"{path.relative_to(folder)},{path.parent.name},{'' if patient == without else patient}")
    return rows


def names(split) -> set[str]:
    return {Path(split.where(i)).name for i in range(len(split))}


def patients(split) -> set[str]:
    return {name.split("_")[0] for name in names(split)}


@pytest.mark.parametrize("limit", [None, 12, 30])
@pytest.mark.parametrize("seed", range(3))
def test_no_patient_is_in_train_and_in_validation(tmp_path, seed, limit):
    put_patients(tmp_path)
    data = open_source("folder", tmp_path, seed, group_regex=r"patient\d+", validation_fraction=0.25, train_limit=limit)
    assert not patients(data.train) & patients(data.validation)
    assert len(data.train) + len(data.validation) == (limit or 48)
    assert len(names(data.validation)) == 4 * len(patients(data.validation))  # what a limit cuts is in train
    assert limit == 12 or set(data.validation.labels_N.tolist()) == {0, 1}
    assert any("in 12 groups (data.group_regex: patient\\d+)" in note for note in data.notes)


def test_a_table_and_a_folder_hold_the_same_patients_out(tmp_path):
    put_patients(tmp_path)
    keys = {"validation_fraction": 0.25}
    by_path = open_source("folder", tmp_path, group_regex=r"(patient\d+)_", **keys)
    by_column = open_source("manifest", put_table(tmp_path, patient_rows(tmp_path)), group_column="patient", **keys)
    by_both = open_source("manifest", tmp_path / "list.csv", group_regex=r"(patient\d+)_", **keys)
    assert names(by_path.validation) == names(by_column.validation) == names(by_both.validation)


@pytest.mark.parametrize("limit", [None, 20])
def test_the_order_of_a_table_changes_nothing(tmp_path, limit):
    put_patients(tmp_path)
    rows = patient_rows(tmp_path, without="patient3")
    kept = []
    for order in range(4):
        random.Random(order).shuffle(rows)
        data = open_source("manifest", put_table(tmp_path, rows), group_column="patient", train_limit=limit)
        kept.append((names(data.train), names(data.validation)))
    assert all(one == kept[0] for one in kept)


def test_images_without_a_group_are_a_group_each(tmp_path):
    put_patients(tmp_path, num_patients=2, photos=12)  # each patient is all of its class
    table = put_table(tmp_path, patient_rows(tmp_path))
    with pytest.raises(DataError, match="each class has one training group"):
        open_source("manifest", table, group_column="patient")
    table = put_table(tmp_path, patient_rows(tmp_path, without="patient0"))
    data = open_source("manifest", table, group_column="patient", validation_fraction=0.2)
    assert patients(data.validation) == {"patient0"}
    assert 0 < len(data.validation) < 12
    assert any("12 images without one are a group each" in note for note in data.notes)
    assert any("none of 'b', whose only training group stays in train" in note for note in data.notes)
    folder = open_source("folder", tmp_path, group_regex=r".*?(patient1)|.", validation_fraction=0.2)
    assert names(folder.validation) == names(data.validation)


def test_a_limit_that_leaves_no_whole_group_to_hold_out_is_an_error(tmp_path):
    put_patients(tmp_path)
    with pytest.raises(DataError, match=r"none of 5 images can be held out: groups that the limit cuts") as caught:
        open_source("folder", tmp_path, group_regex=r"patient\d+", train_limit=5)
    assert caught.value.key == "data.train_limit"
    assert len(open_source("folder", tmp_path, group_regex=r"patient\d+", train_limit=16).validation) == 4


def test_groups_of_one_image_change_nothing_and_it_is_said(tmp_path):
    put_patients(tmp_path)
    data = open_source("folder", tmp_path, group_regex=r"patient\d+_\d+")
    assert any(note.startswith("groups: each has one image") for note in data.notes)


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([1, 1, 2, None, 3, 3]), ["1", "1", "2", None, "3", "3"]),
        (pa.array([1.0, 1.0, 2.0, float("nan"), 3.0, None]), ["1", "1", "2", None, "3", None]),
        (pa.array([" a", "a ", "b", "", " ", "c"]), ["a", "a", "b", None, None, "c"]),
        (pa.array(["x", "x", "y", "y", None, "z"]).dictionary_encode(), ["x", "x", "y", "y", None, "z"]),
        (pa.array([True, True, False, False, None, True]), ["true", "true", "false", "false", None, "true"]),
    ],
)
@pytest.mark.parametrize("source", ["manifest", "hub"])
def test_columns_of_groups(tmp_path, source, column, expected):
    images = [put_image(tmp_path / "images" / f"{i}.png", i).read_bytes() for i in range(6)]
    (tmp_path / "data").mkdir()
    table = pa.table({"image": pa.array(images, pa.binary()), "label": ["a", "b"] * 3, "patient": column})
    pq.write_table(table, tmp_path / "data" / "train.parquet")
    path = tmp_path / "data" / ("train.parquet" if source == "manifest" else "")
    data = open_source(source, path, group_column="patient", validation_fraction=0.0)
    assert data.train.groups_N.to_pylist() == expected


def test_wrong_types_are_named(tmp_path):
    images = [put_image(tmp_path / f"{i}.png", i).read_bytes() for i in range(2)]
    for column, says in ((pa.array([1.5, 2.0]), "whole numbers"), (pa.array([[1], [2]]), "of type list")):
        pq.write_table(pa.table({"image": images, "label": ["a", "b"], "patient": column}), tmp_path / "t.parquet")
        with pytest.raises(DataError, match=says) as caught:
            open_source("manifest", tmp_path / "t.parquet", group_column="patient")
        assert caught.value.key == "data.group_column"
    with pytest.raises(DataError, match="the images are in the table") as caught:
        open_source("manifest", tmp_path / "t.parquet", group_regex="a")
    assert caught.value.key == "data.group_regex"


def test_an_expression_that_takes_for_ever_is_refused(tmp_path, monkeypatch):
    put_image(put_patients(tmp_path) / "a" / f"{'a' * 60}.png")
    monkeypatch.setattr(matching, "LIMIT_S", 0.5)
    with pytest.raises(RecipeError, match=r"takes more than 0.5 s") as caught:
        open_source("folder", tmp_path, group_regex="(a+)+b")
    assert caught.value.key == "data.group_regex"


def test_a_group_in_two_splits_is_allowed_on_request_and_said(tmp_path):
    put_patients(tmp_path)
    rows = [f"{row},{'test' if '_3' in row else 'train'}" for row in patient_rows(tmp_path)]
    table = put_table(tmp_path, rows, "path,label,patient,split")
    with pytest.raises(DataError, match=r"12 groups are in both train and test, such as 'patient0'"):
        open_source("manifest", table, group_column="patient")
    data = open_source("manifest", table, group_column="patient", groups_across_splits="allow")
    assert any(note.startswith("LEAK: 12 groups are in both train and test") for note in data.notes)
    assert data.groups.to_plain()["in_two_splits"] == [
        {"splits": ["train", "test"], "num_groups": 12, "example": "patient0"}
    ]
    assert data.identity["groups"]["num_groups"] == {"train": 12, "test": 12}


def test_one_group_is_no_groups_and_a_permission_that_nothing_needs_is_told(tmp_path):
    put_patients(tmp_path)
    rows = [f"{row},{'test' if 'patient0' in row else 'train'}" for row in patient_rows(tmp_path)]
    table = put_table(tmp_path, rows, "path,label,patient,split")
    idle = "groups: none is in two splits, so that data.groups_across_splits: allow changes nothing"
    data = open_source("manifest", table, group_column="patient", groups_across_splits="allow")
    assert idle in data.notes
    assert any(" in 1 group (data.group_column" in note for note in data.notes)
    rows = [row.replace(",test", ",train") if "_0" in row else row for row in rows]
    put_image(tmp_path / "a" / "alone.png")
    table = put_table(tmp_path, [*rows, "./a/alone.png,a,,test"], "path,label,patient,split")
    data = open_source("manifest", table, group_column="patient", groups_across_splits="allow")
    assert idle not in data.notes
    assert any(note.startswith("LEAK: 1 group is in both train and test") for note in data.notes)
    assert any("; 1 image without one is a group" in note for note in data.notes)


def test_rows_of_one_file_join_their_groups(tmp_path):
    put_patients(tmp_path)
    rows = patient_rows(tmp_path)
    # The first photo of each patient is a photo of the one after the next, too: all of a class are one.
    again = [f"./a/patient{patient}_0.png,a,patient{patient + 2}" for patient in range(0, 8, 2)]
    table = put_table(tmp_path, rows + again)
    for seed in range(4):
        data = open_source("manifest", table, seed, group_column="patient", validation_fraction=0.3)
        joined = {"patient0", "patient2", "patient4", "patient6", "patient8"}
        assert len(patients(data.validation) & joined) in (0, 5)
        assert not patients(data.train) & patients(data.validation)


def test_groups_are_of_the_identity_where_they_decide(tmp_path):
    put_patients(tmp_path)
    rows = patient_rows(tmp_path)
    other = [row.replace(",patient11", ",patient9") if "patient11_" in row else row for row in rows]

    def used(rows: list[str], **keys) -> str:
        return used_identity(open_source("manifest", put_table(tmp_path, rows), **keys)).sha256

    ungrouped, grouped = {"validation_fraction": 0.0}, {"group_column": "patient"}
    assert used(rows, **grouped, **ungrouped) == used(rows, **ungrouped) == used(other, **grouped, **ungrouped)
    assert used(rows, **grouped, train_limit=48) != used(other, **grouped, train_limit=48)
    assert used(rows, **grouped) == used(rows, **grouped)


def test_images_to_score_keep_their_groups(tmp_path):
    put_patients(tmp_path)
    rows = [f"{row},{'test' if 'patient1' in row else 'train'}" for row in patient_rows(tmp_path)]
    table = put_table(tmp_path, rows, "path,label,patient,split")
    scored = open_labelled(section_of("manifest", table, group_column="patient"), ("a", "b"), name="test")
    assert set(scored.split.groups_N.to_pylist()) == {"patient1", "patient10", "patient11"}


def test_skipped_images_leave_their_group_whole(tmp_path):
    put_patients(tmp_path)
    for number in range(0, 12, 3):
        (tmp_path / "ab"[number % 2] / f"patient{number}_1.png").write_bytes(b"damaged")
    keys = {"group_regex": r"patient\d+", "on_bad_image": "skip", "validation_fraction": 0.25}
    data = open_source("folder", tmp_path, **keys)
    assert len(data.train) + len(data.validation) == 44
    assert not patients(data.train) & patients(data.validation)


def test_without_groups_a_table_of_groups_draws_as_before(tmp_path):
    put_folder(tmp_path, a=20, b=20)
    rows = [f"{name}/{row}.png,{name},{row // 4}" for name in "ab" for row in range(20)]
    plain = open_source("manifest", put_table(tmp_path, rows), 3, train_limit=30)
    assert plain.groups is None
    assert plain.validation.rows_N.tolist() == [11, 16, 35]


@pytest.mark.parametrize(
    ("one", "other"),
    [("caf\u00e9", "cafe\u0301"), ("p1", "p\u200b1"), ("1", "1.0"), ("p  1", "p 1"), ("p1", "p1\u3164")],
)
@pytest.mark.parametrize("splits", [("train", "train"), ("train", "test")])
def test_groups_that_look_alike_are_refused(one: str, other: str, splits: tuple[str, str], tmp_path: Path):
    """One patient in two spellings would be trained on and scored."""
    put_patients(tmp_path)
    names = {"patient0": (one, splits[0]), "patient1": (other, splits[1])}
    rows = []
    for row in patient_rows(tmp_path):
        path, label, patient = row.split(",")
        rows.append(",".join((path, label, *names.get(patient, (patient, "train")))))
    table = put_table(tmp_path, rows, "path,label,patient,split")
    with pytest.raises(DataError, match="data.group_column: .*the groups .* but two groups") as raised:
        open_source("manifest", table, group_column="patient")
    assert ascii(one) in str(raised.value)
    assert ascii(other) in str(raised.value)
