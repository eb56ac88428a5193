"""Tables of images as people have them: the columns by other names, rows that no run could use."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.unit.data.test_folder_layout import made
from tlscale.data.table_layout import guess_columns, name_splits, rows_to_leave_out
from tlscale.errors import DataError
from tlscale.recipe.schema import DataSection

GUESSED = {
    "usual names": ("path,label", {}),
    "the label by another name": ("file,species", {"label_column": "species"}),
    "both by other names": ("photo,species", {"image_column": "photo", "label_column": "species"}),
    "the label first": ("species,photo", {"image_column": "photo", "label_column": "species"}),
    "with splits": ("photo,split,species", {"image_column": "photo", "label_column": "species"}),
}
CELLS = {"path": "1.jpg", "file": "1.jpg", "photo": "1.jpg", "split": "train"}


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
@pytest.mark.parametrize("case", GUESSED)
def test_columns_are_guessed_where_there_is_one_reading(case, kind, tmp_path):
    header, guessed = GUESSED[case]
    made(tmp_path, "1.jpg")
    file = tmp_path / f"t.{kind}"
    names = header.split(",")
    row = [CELLS.get(name, "ash") for name in names]
    if kind == "parquet":
        pq.write_table(pa.table({name: [cell] for name, cell in zip(names, row, strict=True)}), file)
    else:
        sign = "," if kind == "csv" else "\t"
        file.write_text(f"{sign.join(names)}\n{sign.join(row)}\n")
    assert guess_columns(file) == guessed


@pytest.mark.parametrize("header", ["path,label,label", "path,path", "photo,species,species"])
def test_columns_of_the_same_name_are_refused(header, tmp_path):
    made(tmp_path, "1.jpg")
    (tmp_path / "t.csv").write_text(f"{header}\n{','.join(CELLS.get(name, 'ash') for name in header.split(','))}\n")
    with pytest.raises(DataError, match=r"columns of the same name: '\w+'. Give each a name of its own"):
        guess_columns(tmp_path / "t.csv")


@pytest.mark.parametrize("text", ["photo,species,place\n1.jpg,ash,here\n", "species,place\nash,here\n", "path,file\n"])
def test_columns_that_cannot_be_told_are_no_guess(text, tmp_path):
    made(tmp_path, "1.jpg")
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match="no telling which column"):
        guess_columns(tmp_path / "t.csv")


def test_rows_of_no_use_are_listed_with_their_reason(tmp_path):
    made(tmp_path, "1.jpg", "2.jpg", "folder.jpg/")
    (tmp_path / "t.csv").write_text("path,label\n1.jpg,ash\n2.jpg,\ngone.jpg,oak\nfolder.jpg,oak\n")
    left_out = rows_to_leave_out(DataSection(source="manifest", path=str(tmp_path / "t.csv")))
    assert set(left_out) == {"2.jpg", "gone.jpg", "folder.jpg"}
    assert left_out["2.jpg"] == "it has no label"
    assert "folder" in left_out["folder.jpg"]


def test_a_table_without_a_header_or_with_paths_of_elsewhere_is_told_apart(tmp_path):
    made(tmp_path, "a/1.jpg", "a/2.jpg")
    (tmp_path / "bare.csv").write_text("a/1.jpg,ash\na/2.jpg,oak\n")
    with pytest.raises(DataError, match="first line names an image"):
        guess_columns(tmp_path / "bare.csv")
    (tmp_path / "windows.csv").write_text("path,label\na\\1.jpg,ash\na\\2.jpg,oak\n")
    with pytest.raises(DataError, match="none of its images is of use.*with / between folders"):
        rows_to_leave_out(DataSection(source="manifest", path=str(tmp_path / "windows.csv")))


def test_splits_are_named_however_they_are_spelt(tmp_path):
    def named(*values) -> dict[str, str]:
        rows = [f"{number}.jpg,ash,{value}" for number, value in enumerate(values)]
        (tmp_path / "t.csv").write_text("\n".join(["path,label,Split", *rows]) + "\n")
        return name_splits(DataSection(source="manifest", path=str(tmp_path / "t.csv")))

    assert named("train", "test", "train") == {}
    keys = {"train_split": "Train", "validation_split": "VAL", "test_split": "testing"}
    assert named("VAL", "Train", "testing", "Train") == keys
    with pytest.raises(DataError, match="may both be the test split"):
        named("train", "test", "Test")
    with pytest.raises(DataError, match="nothing to train on"):
        named("val", "test")
