"""Write codes to a file that other tools read: search, clustering, a data frame.

| column | holds |
|---|---|
| `path` | the image's path below the data's root, or a place such as `table.parquet row 7` |
| `split` | train, validation or test |
| `label` | the name of its class |
| `row` | its row in its split of the source, from 0; a hold-out of train has rows of train |
| one a layer | its codes: a list of D numbers, float32 (float64 of a run in fp64); named as in `tlscale codes list` |

Parquet has all of it. For one layer `.npy` has the matrix (N, D), and a `.csv` of the same name the other columns.

Promise: every image of every split once, split by split in their order; whole or not at all.

Shapes: N images of all splits, B images that are written at once, D features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from tlscale.codes.reader import Codes
from tlscale.data.sources.open import ImageSplit
from tlscale.data.sources.tables import has_several, label_text
from tlscale.errors import DataError, option
from tlscale.storage.files import replacing, reporting_disk_errors
from tlscale.storage.run_folder import refuse_not_utf8
from tlscale.training.prediction_rows import csv_line
from tlscale.training.predictions import image_names

SUFFIXES = (".parquet", ".npy")
_CHUNK = 4096
_ROWS = ("path", "split", "label", "row")


def check_file(out: Path, num_layers: int) -> None:
    """Refuse a file that cannot be written, before anything is computed.

    Raises:
        DataError: its ending, its folder, or the number of layers for it.
    """
    refuse_not_utf8(out)
    if out.suffix.lower() not in SUFFIXES:
        remedy = f"End it in one of {', '.join(SUFFIXES)}"
        raise DataError(f"'{out}' has no ending of a kind that is written", key=option("out"), remedy=remedy)
    if not out.parent.is_dir():
        raise DataError(f"there is no folder '{out.parent}'", key=option("out"), remedy="Make it first")
    if out.suffix.lower() == ".npy" and num_layers > 1:
        remedy = "Name one layer and one pooling (codes.layer, codes.pool), or write .parquet"
        raise DataError(
            f"a .npy file holds codes of one layer, and here are {num_layers}", key=option("out"), remedy=remedy
        )


def rows_file(out: Path) -> Path | None:
    """Return the table that belongs to a matrix; None of a file that has all of it."""
    return out.with_suffix(".csv") if out.suffix.lower() == ".npy" else None


def write_codes(out: Path, splits: Sequence[ImageSplit], codes: Mapping[str, Codes], classes: Sequence[str]) -> None:
    """Write the codes of each split.

    Raises:
        TlscaleError: they cannot be written.
    """
    with reporting_disk_errors():
        if out.suffix.lower() == ".parquet":
            _write_parquet(out, _tables(splits, codes, classes))
        else:
            _write_matrix(out, splits, codes, classes)


def _tables(splits: Sequence[ImageSplit], codes: Mapping[str, Codes], classes: Sequence[str]) -> Iterator[pa.Table]:
    """Give the rows of some images at once."""
    for split in splits:
        own = codes[split.name]
        for start in range(0, len(split), _CHUNK):
            at_B = np.arange(start, min(start + _CHUNK, len(split)))
            columns = {
                "path": pa.array(image_names(split, at_B), pa.string()),
                "split": pa.array([split.name] * len(at_B), pa.string()),
                "label": _labels(split, at_B, classes),
                "row": pa.array(split.rows_N[at_B], pa.int64()),
            }
            for spec, values_BD in zip(own.values, own.take(at_B), strict=True):
                numbers_BD = _numbers(values_BD)
                columns[spec.name] = pa.FixedSizeListArray.from_arrays(
                    pa.array(numbers_BD.ravel()), numbers_BD.shape[1]
                )
            yield pa.table(columns)


def _labels(split: ImageSplit, at_B: npt.NDArray[np.int64], classes: Sequence[str]) -> pa.Array:
    """Return the label of each image as text; several are joined."""
    labels_B = split.labels_N[at_B]
    if has_several(labels_B):
        return pa.array([label_text(label_C, classes) for label_C in labels_B], pa.string())
    return pa.array(classes, pa.string()).take(pa.array(labels_B))


def _numbers(values_BD: torch.Tensor) -> npt.NDArray[Any]:
    """Return codes in a type that other tools read: halves are float32."""
    wide = values_BD if values_BD.dtype == torch.float64 else values_BD.float()
    return wide.flatten(1).numpy()


def _write_parquet(out: Path, tables: Iterator[pa.Table]) -> None:
    first = next(tables)  # there are training images, always
    with replacing(out) as aside, pq.ParquetWriter(aside, first.schema, compression="zstd") as writer:
        for table in chain([first], tables):
            writer.write_table(table)


def _write_matrix(out: Path, splits: Sequence[ImageSplit], codes: Mapping[str, Codes], classes: Sequence[str]) -> None:
    """Write the matrix and its rows, some at a time; the rows get their name first."""
    rows_path = rows_file(out)
    assert rows_path is not None
    num_images, header = sum(map(len, splits)), np.lib.format.write_array_header_1_0
    with (
        replacing(out) as matrix_aside,
        replacing(rows_path) as rows_aside,
        matrix_aside.open("wb") as matrix,
        rows_aside.open("w", encoding="utf-8", newline="") as rows,
    ):
        rows.write(csv_line(_ROWS))
        for table in _tables(splits, codes, classes):
            column = table.column(len(_ROWS)).combine_chunks()
            values_BD = column.flatten().to_numpy().reshape(len(column), -1)
            if not matrix.tell():
                shape = num_images, values_BD.shape[1]
                header(matrix, {"descr": values_BD.dtype.str, "fortran_order": False, "shape": shape})
            matrix.write(values_BD.tobytes())
            rows.writelines(csv_line(map(str, cells.values())) for cells in table.select(_ROWS).to_pylist())
