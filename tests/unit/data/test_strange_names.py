"""Names that nobody expects: not UTF-8, alike to the eye, hidden, with line breaks or escape sequences in them."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.recipes.wrong_data import put_folder, put_image
from tlscale.data.sources.labels import encode_labels, sort_labels
from tlscale.data.sources.open import open_data
from tlscale.errors import DataError
from tlscale.recipe.schema import DataSection

E_ACUTE, E_THEN_ACUTE = "caf\u00e9", "cafe\u0301"


def open_folder(root: Path, **keys: object):
    return open_data(DataSection.model_validate({"source": "folder", "path": str(root), **keys}), 0)


@pytest.mark.parametrize("name", ["cat/caf\udce9.png", "caf\udce9/0.png", "caf\udce9/\udcff.png"])
def test_names_that_are_not_utf8_are_named_with_what_to_do(name: str, tmp_path: Path):
    put_folder(tmp_path, **{"cat": 2, "dog": 2, name.split("/")[0]: 2})
    os.replace(tmp_path / "dog" / "1.png", tmp_path / name)
    with pytest.raises(DataError, match=r"b'(caf)?\\x(e9|ff)(\.png)?' is not UTF-8.*convmv"):
        open_folder(tmp_path)


ALIKE = [
    (E_ACUTE, E_THEN_ACUTE),
    ("cat", "c\u200bat"),
    ("cat", "\ufeffcat"),
    ("a b", "a\u00a0b"),
    ("a b", "a  b"),
    ("cat", "ca\u034ft"),
    ("cat", "\u3164cat"),
    ("cat", "cat\ufe0f"),
    ("cat", "cat\U000e0101"),
    ("1", "1.0"),
    ("0", "-0"),
]


@pytest.mark.parametrize(("one", "other"), ALIKE)
def test_labels_that_look_alike_are_refused(one: str, other: str, tmp_path: Path):
    with pytest.raises(DataError, match="two classes") as caught:
        open_folder(put_folder(tmp_path, **{one: 2, other: 2, "zebra": 2}))
    assert ascii(one) in str(caught.value)
    assert ascii(other) in str(caught.value)


def test_a_test_split_with_another_form_of_a_label_is_told_so(tmp_path: Path):
    put_folder(tmp_path, **{f"train__{E_ACUTE}": 2, "train__tea": 2, f"test__{E_THEN_ACUTE}": 2, "test__tea": 2})
    with pytest.raises(DataError, match="same to the eye"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    "names", [("007", "7"), ("1.10", "1.1"), ("\u0915\u094d\u200d\u0937", "b"), ("A", "a"), ("x\u00b2", "x2")]
)
def test_labels_that_differ_to_the_eye_are_two(names: tuple[str, str], tmp_path: Path):
    assert set(open_folder(put_folder(tmp_path, **dict.fromkeys(names, 3))).classes) == set(names)


def test_a_missing_number_is_no_label():
    column = pa.chunked_array([["1", "nan", "2.0"]])
    with pytest.raises(DataError, match=r"x: rows have the label 'nan' among numbers"):
        encode_labels(column, "x")
    assert encode_labels(pa.chunked_array([["nan", "ciabatta"]]), "x")[0] == ("ciabatta", "nan")


@pytest.mark.parametrize("name", ["nan", "NaN", "NA", "<NA>", "null", "N_A", "#N_A", "NaT"])
def test_a_class_called_as_if_it_were_missing_is_said(name: str, tmp_path: Path):
    name = name.replace("_", "/")
    rows = "".join(f"{label}{i}.png,{label.replace('_', '/')}\n" for label in ("x", "y") for i in range(3))
    for label in ("x", "y"):
        for i in range(3):
            put_image(tmp_path / f"{label}{i}.png", grey=i)
    (tmp_path / "t.csv").write_text("path,label\n" + rows.replace(",y\n", f",{name}\n"))
    keys = {"source": "manifest", "path": str(tmp_path / "t.csv"), "validation_fraction": 0.0}
    said = f"MISSING LABELS? {name!r} is a class here"
    assert any(said in note for note in open_data(DataSection(**keys), 0).notes)
    assert not any(said in note for note in open_data(DataSection(**keys, classes=["x", name]), 0).notes)


def test_none_may_be_a_class(tmp_path: Path):
    data = open_folder(put_folder(tmp_path, none=3, scratch=3))
    assert not any("MISSING" in note for note in data.notes)


def test_the_order_of_labels_hangs_on_nothing_but_the_labels():
    # As integers, 0 and -0 would be equal, and their order that of a set, which is another in each process.
    assert sort_labels({"0", "-0", "10", "2"}) == ("-0", "0", "10", "2")
    assert sort_labels({"-1", "0", "10", "2", "9" * 5000}) == ("-1", "0", "10", "2", "9" * 5000)


def test_hidden_class_folders_are_announced(tmp_path: Path):
    put_folder(tmp_path, cat=3, dog=3, **{".horse": 3})
    (tmp_path / ".cache").mkdir()
    notes = [note for note in open_folder(tmp_path).notes if "hidden" in note]
    assert len(notes) == 1
    assert notes[0].startswith("SKIPPED: ")
    assert "'.horse'" in notes[0]
    assert ".cache" not in notes[0]


def test_text_in_parquet_that_is_not_utf8_is_an_error(tmp_path: Path):
    put_folder(tmp_path, cat=2)
    offsets = pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0")
    broken = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"\xffb")])
    sound = {"path": ["cat/0.png", "cat/1.png"], "label": ["a", "b"], "split": ["train", "train"]}
    for column in sound:
        pq.write_table(pa.table({**sound, column: broken}), tmp_path / "list.parquet")
        with pytest.raises(DataError, match="UTF8"):
            open_folder(tmp_path / "list.parquet", source="manifest")


def test_a_name_with_a_line_break_stays_in_its_line(tmp_path: Path):
    put_folder(tmp_path, cat=2, dog=2)
    (tmp_path / "cat" / "x\ntop1 1.0000\n  top1 \x1b[31m.csv").write_text("")
    with pytest.raises(DataError, match="no ending of an image") as caught:
        open_folder(tmp_path)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert r"x\ntop1 1.0000\n  top1 \x1b[31m.csv" in str(caught.value)
