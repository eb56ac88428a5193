"""`data.exclude`: what a folder or a table leaves out."""

import csv
import os
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.forked import exit_code_of
from tests.unit.data.test_folder_layout import made
from tlscale.data.sources.excluded import excluded_paths, write_excluded
from tlscale.data.sources.open import open_data
from tlscale.errors import DataError
from tlscale.recipe.schema import DataSection

NAMES = st.text(st.characters(blacklist_characters="/\0", blacklist_categories=("Cs",)), min_size=1, max_size=8)


def section(tmp_path, source="folder", path="photos", **keys) -> DataSection:
    keys = {"validation_fraction": 0, "exclude": str(tmp_path / "x.csv")} | keys
    return DataSection(source=source, path=str(tmp_path / path), **keys)


@given(st.lists(st.lists(NAMES, min_size=1, max_size=3).map("/".join), max_size=6))
def test_any_path_comes_back_and_none_is_a_formula(tmp_path_factory, paths):
    tmp_path = tmp_path_factory.mktemp("x")
    write_excluded(tmp_path / "x.csv", [(path, "=1+1") for path in paths])
    if not paths:
        assert not (tmp_path / "x.csv").exists()
        return
    shortest = {os.path.normpath(path) for path in paths}
    root = tmp_path / "photos"
    if any(path == "." or path.split("/")[0] == ".." for path in shortest):
        with pytest.raises(DataError, match="not below the data"):
            excluded_paths(section(tmp_path), root)
    else:
        assert excluded_paths(section(tmp_path), root) == {str(root / path) for path in shortest}
    with open(tmp_path / "x.csv", newline="", encoding="utf-8") as file:
        cells = [row[0] for row in csv.reader(file)]
    assert [cell for cell in cells if cell[:1] in ("=", "+", "-", "@", "\t", "\r")] == []


def test_files_and_whole_folders_are_left_out(tmp_path):
    made(tmp_path / "photos", "ash/1.jpg", "ash/2.jpg", "ash/notes.txt", "oak/1.jpg", "birch/1.jpg", "empty/")
    write_excluded(tmp_path / "x.csv", [("ash/2.jpg", "a"), ("ash/notes.txt", "b"), ("birch", "c"), ("empty", "d")])
    data = open_data(section(tmp_path), 0)
    assert data.classes == ("ash", "oak")
    assert [data.train.where(i) for i in range(len(data.train))] == [
        str(tmp_path / "photos" / name) for name in ("ash/1.jpg", "oak/1.jpg")
    ]


def test_rows_of_a_table_are_left_out_before_their_files_are_looked_for(tmp_path):
    made(tmp_path, "1.jpg", "2.jpg")
    (tmp_path / "t.csv").write_text("path,label\n1.jpg,ash\n./2.jpg,oak\ngone.jpg,birch\n")
    with pytest.raises(DataError, match="are not there"):
        open_data(section(tmp_path, "manifest", "t.csv", exclude=None), 0)
    write_excluded(tmp_path / "x.csv", [("gone.jpg", "not there")])
    assert open_data(section(tmp_path, "manifest", "t.csv"), 0).classes == ("ash", "oak")
    write_excluded(tmp_path / "x.csv", [("gone.jpg", "not there"), ("2.jpg", "bad")])
    with pytest.raises(DataError, match="one class only"):
        open_data(section(tmp_path, "manifest", "t.csv"), 0)


@pytest.mark.parametrize("listed", ["a/1.jpg", "./a/1.jpg", "{root}/a/1.jpg"])
@pytest.mark.parametrize("named", ["a/1.jpg", "b/../a/1.jpg", "{root}/a/1.jpg"])
def test_a_table_of_images_may_name_them_in_any_spelling(listed, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made(tmp_path, "a/1.jpg", "a/2.jpg", "b/3.jpg")
    (tmp_path / "t.csv").write_text(f"path,label\n{named.format(root=tmp_path)},ash\na/2.jpg,ash\nb/3.jpg,oak\n")
    write_excluded(tmp_path / "x.csv", [(listed.format(root=tmp_path), "bad")])
    for path in ("t.csv", str(tmp_path / "t.csv")):
        data = open_data(section(tmp_path, "manifest").model_copy(update={"path": path}), 0)
        assert len(data.train) == 2


@pytest.mark.parametrize("path", [".", "../photos", "../photos/", "{root}/x/../photos"])
def test_a_folder_leaves_out_by_whichever_name_it_is_called(path, tmp_path, monkeypatch):
    made(tmp_path / "photos", "ash/1.jpg", "ash/2.jpg", "oak/1.jpg")
    (tmp_path / "x").mkdir()
    monkeypatch.chdir(tmp_path / "photos")
    write_excluded(tmp_path / "x.csv", [("ash/2.jpg", "bad")])
    data = open_data(section(tmp_path).model_copy(update={"path": path.format(root=tmp_path)}), 0)
    assert len(data.train) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "cannot be read"), ("file,why\n1.jpg,x\n", "no column 'path'"), ("path,reason\n/a.jpg,x\n", "not below")],
)
def test_a_wrong_table_is_named(text, words, tmp_path):
    made(tmp_path / "photos", "ash/1.jpg", "oak/1.jpg")
    if text is not None:
        (tmp_path / "x.csv").write_text(text)
    with pytest.raises(DataError) as caught:
        open_data(section(tmp_path), 0)
    assert caught.value.key == "data.exclude"
    assert words in str(caught.value)


@pytest.mark.parametrize("kind", ["pipe", "device", "hole"])
def test_what_is_no_table_is_not_read(kind, tmp_path):
    made(tmp_path / "photos", "ash/1.jpg", "oak/1.jpg")
    place = tmp_path / "x.csv"
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "device":
        place.symlink_to("/dev/zero")
    else:
        with place.open("wb") as file:
            file.truncate(300 << 30)
    said = {"pipe": "it is a named pipe", "device": "it is a device", "hole": "it has over"}[kind]
    outcome = exit_code_of(lambda: refused(tmp_path, said), before=lambda: signal.alarm(20))
    assert outcome == 0


def refused(tmp_path, said: str) -> None:
    with pytest.raises(DataError, match=rf"data\.exclude: .*x\.csv cannot be read: {said}"):
        excluded_paths(section(tmp_path), tmp_path / "photos")


def test_a_name_of_any_length_is_left_out_and_shown_shortened(tmp_path):
    made(tmp_path, "1.jpg", "2.jpg")
    name = "x" * 200_000 + ".jpg"
    (tmp_path / "t.csv").write_text(f"path,label\n1.jpg,ash\n2.jpg,oak\n{name},oak\n")
    with pytest.raises(DataError, match="are not there") as raised:
        open_data(section(tmp_path, "manifest", "t.csv", exclude=None), 0)
    assert len(str(raised.value)) < 1000
    write_excluded(tmp_path / "x.csv", [(name, "no name of a file")])
    before = csv.field_size_limit()
    assert open_data(section(tmp_path, "manifest", "t.csv"), 0).classes == ("ash", "oak")
    assert csv.field_size_limit() == before
