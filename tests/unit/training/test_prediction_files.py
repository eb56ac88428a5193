"""Files of predictions: harmless to spreadsheets, and resumed from any place to the very same bytes."""

import csv
import io
import itertools
import json
import os

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tlscale.errors import ResumeError, RunFolderError
from tlscale.training.prediction_files import Screen, TextFile, TextFormat
from tlscale.training.prediction_parts import ParquetFile
from tlscale.training.prediction_rows import Answers, Columns, csv_line
from tlscale.training.predictions import NO_ANSWER

CLASSES = ("=cmd|' /C calc'!A0", "an \x1b[31mescape", "a, b\nc")
COLUMNS = Columns(CLASSES, top_k=2, all_probabilities=True)
STARTS = ["", "=", 'say "', "two\nlines", "\r", "a,b", "@", "-", "é", "+", "\udcff"]
PATHS = [f"{start}{number}.png" for number, start in enumerate(STARTS)]
CHUNK = 4
ABOUT = {"model": "m", "columns": COLUMNS.names}


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_pipe_is_refused_and_not_waited_for(ending, tmp_path):
    os.mkfifo(tmp_path / f"p.{ending}")
    with pytest.raises(RunFolderError, match="is not replaced"):
        sink_of(tmp_path / f"p.{ending}").begin()
    assert not sink_of(tmp_path / f"p.{ending}").is_complete


def answers_of(paths):
    """Different for each path; one in five cannot be read."""
    numbers = [PATHS.index(path) for path in paths]
    labels = np.array([NO_ANSWER if number % 5 == 2 else number % 3 for number in numbers])
    probabilities = np.array([np.roll([0.7, 0.2, 0.1], number) for number in numbers], np.float32)
    probabilities[labels == NO_ANSWER] = np.nan
    return Answers(labels, probabilities, ["broken, \n=1" if label == NO_ANSWER else None for label in labels])


def sink_of(path, about=ABOUT, columns=COLUMNS):
    if path.suffix == ".parquet":
        return ParquetFile(path, columns, about, ends)
    form = TextFormat.csv(columns) if path.suffix == ".csv" else TextFormat.jsonl(columns)
    return TextFile(path, form, columns, about, ends)


def ends():
    return itertools.count(CHUNK, CHUNK)


def write(sink, images, ends=True):
    images = list(images)
    for start in range(0, len(images), CHUNK):
        sink.write(images[start : start + CHUNK], answers_of(images[start : start + CHUNK]))
    if ends:
        sink.end()
    else:
        sink.keep()


def whole(path):
    sink = sink_of(path)
    sink.begin()
    write(sink, PATHS)
    return path.read_bytes()


def test_no_cell_is_a_formula_and_all_come_back():
    text = csv_line(COLUMNS.names) + "".join(map(csv_line, COLUMNS.rows(PATHS, answers_of(PATHS))))
    rows = list(csv.reader(io.StringIO(text, newline="")))
    assert len(rows) == 1 + len(PATHS)
    assert not [cell for row in rows for cell in row if cell and cell[0] in "=+-@\t\r"]
    for path, row in zip(PATHS, rows[1:], strict=True):
        assert row[0] == (f"'{path}" if path[0] in "=+-@\r" else path)
    assert rows[1][1] == f"'{CLASSES[0]}"
    assert rows[1][2] == repr(float(np.float32(0.7)))
    assert rows[1][3:5] == ["an \x1b[31mescape", repr(float(np.float32(0.2)))]
    assert rows[3][1:] == [""] * 7 + ["broken, \n=1"]


def test_a_terminal_gets_nothing_to_obey(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    screen = Screen(COLUMNS)
    screen.begin()
    screen.write(PATHS[:4], answers_of(PATHS[:4]))
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "\\x1b[31m" in said
    assert len(said.splitlines()) == 5


def test_json_lines_hold_what_csv_holds(tmp_path):
    lines = whole(tmp_path / "p.jsonl").decode().split("\n")[:-1]
    rows = [json.loads(line) for line in lines]
    assert [list(row) for row in rows] == [COLUMNS.names] * len(PATHS)
    assert [row["path"] for row in rows] == [*PATHS[:-1], "\\xff10.png"]
    assert rows[2] == dict.fromkeys(COLUMNS.names) | {"path": PATHS[2], "error": "broken, \n=1"}


def test_parquet_holds_what_csv_holds(tmp_path):
    whole(tmp_path / "p.parquet")
    table = pq.read_table(tmp_path / "p.parquet")
    assert table.column_names == COLUMNS.names
    assert table["label"].null_count == 2
    rows = [json.loads(line) for line in whole(tmp_path / "p.jsonl").decode().split("\n")[:-1]]
    assert table.to_pylist() == rows
    assert {path.name for path in tmp_path.iterdir()} == {"p.parquet", "p.jsonl"}


@pytest.mark.parametrize("kind", [".csv", ".jsonl"])
def test_a_file_cut_anywhere_is_resumed_to_the_same_bytes(kind, tmp_path):
    path = tmp_path / f"p{kind}"
    expected = whole(path)

    @settings(max_examples=30, deadline=None)
    @given(st.integers(0, len(expected)))
    def cut_and_resume(end):
        path.write_bytes(expected[:end])
        sink = sink_of(path)
        sink._mark.put()
        resumed = sink.resume(iter(PATHS))
        assert resumed.num_rows % CHUNK == 0
        assert resumed.num_read == sum(number % 5 != 2 for number in range(resumed.num_rows))
        left = list(resumed.images)
        assert left == PATHS[resumed.num_rows :]
        write(sink, left)
        assert path.read_bytes() == expected
        assert sink.is_complete

    cut_and_resume()


@pytest.mark.parametrize("num_done", range(0, len(PATHS), CHUNK))
def test_parquet_is_resumed_from_its_parts(num_done, tmp_path):
    expected = whole(tmp_path / "whole.parquet")
    path = tmp_path / "p.parquet"
    sink = sink_of(path)
    sink.begin()
    for start in range(0, num_done, CHUNK):
        write(sink, PATHS[start : start + CHUNK], ends=False)  # a part each
    assert not path.exists()
    sink = sink_of(path)
    resumed = sink.resume(iter(PATHS))
    assert resumed.num_rows == num_done
    write(sink, resumed.images)
    assert path.read_bytes() == expected
    assert not (tmp_path / "p.parquet.parts").exists()


@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".parquet"])
def test_what_is_resumed_is_the_same_work(kind, tmp_path):
    path = tmp_path / f"p{kind}"
    sink = sink_of(path)
    sink.begin()
    write(sink, PATHS[:8], ends=False)
    with pytest.raises(RunFolderError, match="is unfinished"):
        sink_of(path).begin()
    with pytest.raises(ResumeError, match="with another model"):
        sink_of(path, {**ABOUT, "model": "n"}).resume(iter(PATHS))
    with pytest.raises(ResumeError, match="with another columns"):
        sink_of(path, {**ABOUT, "columns": ["path"]}).resume(iter(PATHS))
    for images, problem in (([PATHS[0], "other.png"], "image 2 is now 'other.png'"), (PATHS[:3], "there are now 3")):
        sink = sink_of(path)
        with pytest.raises(ResumeError, match=problem):
            sink.resume(iter(images))
        sink.keep()


SAVED = {
    "by Excel": lambda text: b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n"),
    "as UTF-16": lambda text: text.decode().encode("utf-16"),
    "with line ends of old Macs": lambda text: text.replace(b"\n", b"\r"),
    "in quotes": lambda text: text.replace(PATHS[0].encode(), f'"{PATHS[0]}"'.encode()),
    "with semicolons": lambda text: text.replace(b",", b";"),
}


@pytest.mark.parametrize("how", SAVED)
def test_a_file_that_a_spreadsheet_saved_is_not_begun_anew(how, tmp_path):
    path = tmp_path / "p.csv"
    sink = sink_of(path)
    sink.begin()
    write(sink, PATHS[:8], ends=False)
    sink.keep()
    path.write_bytes(saved := SAVED[how](path.read_bytes()))
    sink = sink_of(path)
    with pytest.raises(ResumeError, match=r"changed by another program.*p\.csv\.unfinished"):
        sink.resume(iter(PATHS))
    sink.keep()
    assert path.read_bytes() == saved


@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".parquet"])
def test_a_folder_that_cannot_be_made_is_named(kind, tmp_path):
    (tmp_path / "file").write_text("")
    for folder, why in (("file", "a file is in the way"), ("file/below", "a file is in the way")):
        with pytest.raises(RunFolderError, match=f"'{tmp_path / folder}' cannot be made: {why}"):
            sink_of(tmp_path / folder / f"p{kind}").begin()
    sink = sink_of(tmp_path / "not" / "there" / f"p{kind}")
    sink.begin()
    sink.keep()
    assert (tmp_path / "not" / "there").is_dir()


@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".parquet"])
def test_nothing_of_others_is_replaced(kind, tmp_path):
    path = tmp_path / f"p{kind}"
    path.write_text("path,species\na.png,oak\n")
    with pytest.raises(RunFolderError, match="does not hold predictions"):
        sink_of(path).begin()
    assert not sink_of(path).is_complete
    with pytest.raises(RunFolderError, match="does not hold predictions"):
        sink_of(path).resume(iter(PATHS))
    path.unlink()
    whole(path)
    assert whole(path), "but its own, when it is complete, is"
