"""predictions.parquet: every image once and in order, the figures that follow from it, names, and how it is written."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.recompute import assert_follows
from tlscale.data.sources.open import ImageSplit
from tlscale.data.sources.stores import ArrayStore, BytesStore, FileStore
from tlscale.data.sources.tables import LabelledTable
from tlscale.errors import TlscaleError
from tlscale.training.metrics import Tally, summary
from tlscale.training.predictions import MOST_LOGITS, Predictions, image_names, read_predictions, write_predictions


def split_of(store, labels, rows=None):
    table = LabelledTable(store, np.asarray(labels, dtype=np.int64))
    return ImageSplit("test", table, np.arange(len(labels)) if rows is None else np.asarray(rows))


def numbered(count, num_classes, seed=0, rows=None):
    labels = np.random.default_rng(seed).integers(0, num_classes, count)
    return split_of(ArrayStore("images", np.zeros((count, 1, 1), np.uint8), "x"), labels, rows)


def collected(split, classes, logits_NC, order, batch=7):
    """Predictions and figures of the same batches, in some order."""
    predictions, tally = Predictions(split, classes), Tally(len(classes), "cpu")
    labels_N = torch.from_numpy(split.labels_N)
    for positions_B in torch.split(torch.as_tensor(order), batch):
        logits_BC, labels_B = logits_NC[positions_B], labels_N[positions_B]
        wide_BC = logits_BC if logits_BC.dtype == torch.float64 else logits_BC.float()
        losses_B = torch.nn.functional.cross_entropy(wide_BC, labels_B, reduction="none")
        tally.update(logits_BC, labels_B, losses_B)
        predictions.add(positions_B, logits_BC)
    return predictions, summary(tally, classes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("count", "num_classes"), [(1, 2), (50, 3), (60, 9), (40, MOST_LOGITS + 3)])
def test_the_figures_follow_from_the_file_alone(count, num_classes, dtype, tmp_path):
    split, classes = numbered(count, num_classes), [f"c{number}" for number in range(num_classes)]
    generator = torch.Generator().manual_seed(1)
    # In steps of a half, so that classes tie; the true class is likely.
    logits_NC = (2 * torch.randn(count, num_classes, generator=generator)).round() / 2
    logits_NC[torch.arange(count), torch.from_numpy(split.labels_N)] += 3
    logits_NC[0] = 0.0  # all classes tie
    order = np.random.default_rng(0).permutation(count)
    predictions, figures = collected(split, classes, logits_NC.to(dtype), order)
    write_predictions(tmp_path / "p.parquet", predictions)
    assert_follows(figures, tmp_path / "p.parquet", rel=1e-5)
    table = read_predictions(tmp_path / "p.parquet")
    assert table["row"].to_pylist() == list(range(count))
    narrow, wide = ("logits", "top_logits") if num_classes <= MOST_LOGITS else ("top_logits", "logits")
    assert wide not in table.column_names
    kept = np.array(table[narrow].to_pylist())
    assert kept.shape == (count, num_classes if narrow == "logits" else 5)
    assert table.schema.field(narrow).type.value_type == (pa.float64() if dtype == torch.float64 else pa.float32())
    if narrow == "logits":
        np.testing.assert_array_equal(kept, logits_NC.to(dtype).double().numpy())
    else:
        sorted_NK = -np.sort(-logits_NC.to(dtype).double().numpy(), axis=1)[:, :5]
        np.testing.assert_array_equal(kept, sorted_NK)
        assert [row[0] for row in table["top_labels"].to_pylist()] == table["label"].to_pylist()


def test_a_row_of_nan_is_no_answer(tmp_path):
    split, classes = numbered(20, 6), list("abcdef")
    logits_NC = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    logits_NC[3, 2] = logits_NC[11] = torch.nan
    predictions, figures = collected(split, classes, logits_NC, range(20))
    write_predictions(tmp_path / "p.parquet", predictions)
    assert figures["num_without_answer"] == 2
    assert_follows(figures, tmp_path / "p.parquet")
    table = read_predictions(tmp_path / "p.parquet")
    for column in ("label", "probability", "true_probability"):
        assert [place for place, value in enumerate(table[column].to_pylist()) if value is None] == [3, 11]


def test_rows_are_those_of_the_table_that_the_split_is_of(tmp_path):
    split = numbered(10, 3, rows=[1, 4, 8])
    predictions, _ = collected(split, list("abc"), torch.zeros(3, 3), [2, 0, 1])
    write_predictions(tmp_path / "p.parquet", predictions)
    table = read_predictions(tmp_path / "p.parquet")
    assert table["row"].to_pylist() == [1, 4, 8]
    assert table["true_label"].to_pylist() == ["abc"[code] for code in split.labels_N]
    about = json.loads(pq.read_schema(tmp_path / "p.parquet").metadata[b"tlscale"])
    assert about == {"format": 1, "classes": list("abc"), "split": "test"}


def test_an_image_that_is_missing_or_comes_twice_is_no_file(tmp_path):
    for order in ([0, 1, 2], [0, 1, 1, 2, 3]):
        split = numbered(4, 3)
        predictions, _ = collected(split, list("abc"), torch.zeros(4, 3), order)
        with pytest.raises(AssertionError):
            write_predictions(tmp_path / "p.parquet", predictions)
        assert list(tmp_path.iterdir()) == []


def test_it_is_the_old_file_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "p.parquet"
    path.write_bytes(b"old")
    predictions, _ = collected(numbered(4, 3), list("abc"), torch.zeros(4, 3), range(4))

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr("os.fsync", full)
        with pytest.raises(TlscaleError, match=r"p\.parquet.*No space left"):
            write_predictions(path, predictions)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["p.parquet"]
    write_predictions(path, predictions)
    assert len(read_predictions(path)) == 4


# -- names ------------------------------------------------------------------------------------------------------------


def names_of(store, count):
    return image_names(split_of(store, [0] * count), np.arange(count))


def test_names_do_not_tell_where_the_data_are(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/data/people/jane")
    root = "/home/joe/photos"
    paths = [
        "train/ash/1.jpg",
        "/home/joe/photos/oak/2.jpg",
        "/home/sue/3.jpg",
        "/data/people/jane/4.jpg",
        "/mnt/5.jpg",
    ]
    store = FileStore(root, pa.array(paths, pa.large_string()), "x", np.zeros((5, 5), np.int64), 0)
    assert names_of(store, 5) == ["train/ash/1.jpg", "oak/2.jpg", "~/3.jpg", "~/4.jpg", "../../../mnt/5.jpg"]
    assert names_of(ArrayStore("/home/joe/t10k-images", np.zeros((2, 1, 1), np.uint8), "x"), 2) == [
        *("t10k-images image 0", "t10k-images image 1"),
    ]
    table = BytesStore("table.parquet", pa.chunked_array([[b"a", b"b", b"c"]]), np.array([0, 2]), "x")
    assert names_of(table, 2) == ["table.parquet row 0", "table.parquet row 2"]
