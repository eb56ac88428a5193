"""Write the predictions on the scored split, one row an image: `predictions.parquet` of a run folder.

Promise: the file has every image of the split once, in its order, whatever the number of processes, and it is there
before `result.json`. The scored figures of `result.json` follow from it alone.

| column | holds |
|---|---|
| `path` | the image's path below the data's root, or a place such as `table.parquet row 7` |
| `row` | the image's row in its split of the source, from 0; a hold-out of train has rows of train |
| `group` | of data with groups: the name of the image's group; null where it is a group of its own |
| `true_label`, `label` | class names; `label` is null where the network gave no number (NaN) |
| `probability` | of `label`: softmax in the precision of the run, which picks the bin of the calibration error |
| `true_probability` | of `true_label`, in double precision: minus its logarithm is the cross-entropy of the image |
| `calibrated_probability` | where validation images chose a calibration: of `label`, as `tlscale predict` gives it |
| `logits` | a list of C numbers, in the order of the classes: float32, or float64 of a run in fp64 |
| `top_labels`, `top_logits` | with more than `MOST_LOGITS` classes, in place of `logits`: the best 5 |

The metadata of the schema has under `tlscale` a JSON object: `format`, `classes` (names, in order), `split`; and
`calibration`, where there is a calibrated probability: its temperature, and how sets of labels are made of it.

Shapes: N images of the split, B images of a batch, C classes, K = 5 answers.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from tlscale.data.sources.joined import JoinedStore
from tlscale.data.sources.open import ImageSplit
from tlscale.data.sources.stores import FileStore
from tlscale.data.sources.tables import Ints, RawStore, has_several
from tlscale.distributed.device import CopyToCpu
from tlscale.distributed.processes import Processes
from tlscale.errors import RunFolderError, TlscaleError, first_line
from tlscale.models.calibration import Calibration
from tlscale.storage import faults
from tlscale.storage.files import naming_disk_errors, replacing
from tlscale.training.group_interval import GroupHits

FORMAT = 1
MOST_LOGITS = 1000
"""With more classes than this only the best 5 logits of an image are stored."""
_TOP = 5
_CHUNK = 4096  # images that are written, or handed to the main process, at once
NO_ANSWER = -1
"""In place of a class number, where the network gave NaN."""
T = TypeVar("T")
_HOME = re.compile(r"^/(home|Users)/[^/]+/")


def answers(logits_BC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits in float32 or float64, class numbers (B,) or `NO_ANSWER`, and probabilities (B, C)."""
    logits_BC = logits_BC if logits_BC.dtype == torch.float64 else logits_BC.float()
    answered_B = ~logits_BC.isnan().any(dim=1)
    finite_BC = torch.nan_to_num(logits_BC)
    return logits_BC, torch.where(answered_B, finite_BC.argmax(dim=1), NO_ANSWER), finite_BC.softmax(dim=1)


class Predictions:
    """Collect this process's predictions on a split, on the CPU; with many classes only the best of each image."""

    def __init__(self, split: ImageSplit, classes: Sequence[str], calibration: Calibration | None = None) -> None:
        self.split, self.classes = split, tuple(classes)
        self.calibration = calibration
        self._on_the_way: list[CopyToCpu] = []
        self._kept: list[dict[str, Tensor]] = []
        counts_hits = split.groups_N is not None and not has_several(split.labels_N)
        self._group_hits = GroupHits(split, split.groups_N) if counts_hits else None

    @torch.no_grad()
    def add(self, positions_B: Tensor, logits_BC: Tensor) -> None:
        """Take a batch, without waiting for the device: it is read on the CPU when the next one has been computed.

        Positions are those in the split; logits in fp16 and bf16 are taken to float32, as `metrics.Tally` does.
        """
        logits_BC, labels_B, probabilities_BC = answers(logits_BC)
        earlier, self._on_the_way = self._on_the_way, []
        self._on_the_way.append(CopyToCpu((positions_B, logits_BC, labels_B, probabilities_BC.amax(dim=1))))
        self._keep(earlier)

    def _keep(self, batches: Iterable[CopyToCpu]) -> None:
        for batch in batches:
            positions_B, logits_BC, labels_B, probability_B = batch.wait()
            truth_B1 = torch.from_numpy(self.split.labels_N[positions_B.numpy()])[:, None]
            if self._group_hits is not None:
                self._group_hits.add(positions_B, labels_B == truth_B1[:, 0])
            finite_BC = torch.nan_to_num(logits_BC).double()
            true_B = finite_BC.log_softmax(dim=1).gather(1, truth_B1)[:, 0].exp()
            kept = {"position": positions_B, "label": labels_B, "probability": probability_B.double(), "true": true_B}
            if len(self.classes) <= MOST_LOGITS:
                kept["logits"] = logits_BC
            else:
                kept["top"] = _best_of(finite_BC)
                kept["top_logits"] = logits_BC.gather(1, kept["top"])
            self._kept.append(kept)

    def _keep_all(self) -> None:
        self._keep(self._on_the_way)
        self._on_the_way = []

    def over_groups(
        self, figures: dict[str, Any], total: Callable[[Tensor], Tensor] = lambda counts: counts
    ) -> dict[str, Any]:
        """Return the figures with intervals over groups; as they are where the recipe names no groups.

        Those of several labels are over groups already.

        `total` sums counts over all processes, which then have to call this all.
        """
        if self._group_hits is None:
            return figures
        self._keep_all()
        return self._group_hits.over_groups(figures, self.classes, total)

    def tables(self) -> Iterator[pa.Table]:
        """Give the rows of the images that this process has, in the order of the split, some at a time."""
        self._keep_all()
        if not self._kept:
            return
        columns = {name: torch.cat([kept[name] for kept in self._kept]) for name in self._kept[0]}
        for order_B in torch.split(columns["position"].argsort(), _CHUNK):
            yield self._table({name: column[order_B].numpy() for name, column in columns.items()})

    def _groups(self, positions_B: Ints) -> dict[str, pa.Array]:
        """Return the column of the groups, where the recipe names some."""
        groups_N = self.split.groups_N
        return {} if groups_N is None else {"group": groups_N.take(pa.array(positions_B))}

    def _table(self, columns: dict[str, np.ndarray]) -> pa.Table:
        positions_B, names = columns["position"], pa.array(self.classes, pa.string())
        answers_B = columns["label"]
        labels_B = pa.array(answers_B, mask=answers_B == NO_ANSWER)
        is_none_B = answers_B == NO_ANSWER
        arrays = {
            "path": pa.array(image_names(self.split, positions_B), pa.string()),
            "row": pa.array(self.split.rows_N[positions_B], pa.int64()),
            **self._groups(positions_B),
            "true_label": names.take(pa.array(self.split.labels_N[positions_B])),
            "label": names.take(labels_B),
            "probability": pa.array(columns["probability"], mask=is_none_B),
            "true_probability": pa.array(columns["true"], mask=is_none_B),
        }
        about: dict[str, Any] = {"format": FORMAT, "classes": list(self.classes), "split": self.split.name}
        if "logits" in columns:
            if self.calibration is not None:
                every_BC = self.calibration.probabilities(torch.from_numpy(columns["logits"])).numpy()
                of_label_B = np.take_along_axis(every_BC, np.maximum(answers_B, 0)[:, None], axis=1)[:, 0]
                arrays["calibrated_probability"] = pa.array(of_label_B, mask=is_none_B)
                about["calibration"] = self.calibration.model_dump()
            arrays["logits"] = lists(pa.array(columns["logits"].ravel()), len(self.classes))
        else:
            arrays["top_labels"] = lists(names.take(pa.array(columns["top"].ravel())), _TOP)
            arrays["top_logits"] = lists(pa.array(columns["top_logits"].ravel()), _TOP)
        return pa.table(arrays).replace_schema_metadata({"tlscale": json.dumps(about, ensure_ascii=False)})


def lists(values: pa.Array, length: int) -> pa.ListArray:
    """Divide values into lists of one length."""
    return pa.ListArray.from_arrays(np.arange(0, len(values) + 1, length, dtype=np.int32), values)


def _best_of(logits_BC: Tensor) -> Tensor:
    """Return the classes of the highest logits, (B, K), best first; of equal ones the first, as `metrics` counts."""
    values_BK, labels_BK = logits_BC.topk(_TOP, dim=1)
    tied_B = (logits_BC >= values_BK[:, -1:]).sum(dim=1) > _TOP  # topk does not say which of them it takes
    labels_BK[tied_B] = logits_BC[tied_B].argsort(dim=1, descending=True, stable=True)[:, :_TOP]
    labels_BK = labels_BK.sort(dim=1).values
    return labels_BK.gather(1, logits_BC.gather(1, labels_BK).argsort(dim=1, descending=True, stable=True))


def image_names(split: ImageSplit, positions_B: Ints) -> list[str]:
    """Return names of images by which a person finds them in the data, and that do not tell where the data are."""
    return _names_in(split.table.store, split.rows_N[positions_B])


def _names_in(store: RawStore, rows_N: Ints) -> list[str]:
    if isinstance(store, JoinedStore):
        return [name for part, at_N in store.runs(rows_N) for name in _names_in(part, at_N)]
    if not isinstance(store, FileStore):
        return [readable(os.path.basename(store.where(row))) for row in rows_N.tolist()]
    return [readable(_below(store, path)) for path in store.paths_N.take(pa.array(rows_N)).to_pylist()]


def _below(store: FileStore, path: str) -> str:
    """Return the path from the data's root on; `~/...` where a file elsewhere is in somebody's home."""
    below = os.path.relpath(path, os.path.abspath(store.root)) if os.path.isabs(path) else path
    if below.split(os.sep)[0] != "..":
        return below
    own = os.path.expanduser("~") + os.sep
    at_home = f"~{os.sep}{path.removeprefix(own)}" if path.startswith(own) else _HOME.sub("~/", path)
    return at_home if at_home.startswith("~") else below


def readable(name: str) -> str:
    """Return the name of a file as UTF-8: bytes of a file name that are none are escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def write_predictions(path: Path, predictions: Predictions, processes: Processes | None = None) -> None:
    """Write all predictions to the main process's `path`, whole or not at all.

    To be called on all processes, each with its own predictions; `processes` None: this one has all images.

    Raises:
        TlscaleError: on every process, where the disk is full or fails.
    """

    def write(tables: Iterable[pa.Table]) -> None:
        with naming_disk_errors(path):
            _write(path, tables, predictions.split)

    _use_on_main(predictions, processes, write)


def gather_predictions(predictions: Predictions, processes: Processes | None = None) -> pa.Table | None:
    """Return all predictions, in the order of the split, on the main process; None on the others, which call it too."""
    return _use_on_main(predictions, processes, pa.concat_tables)


def _use_on_main(
    predictions: Predictions, processes: Processes | None, use: Callable[[Iterable[pa.Table]], T]
) -> T | None:
    if processes is None:
        return use(predictions.tables())
    tables = _from_all(predictions.tables(), processes)
    errors: list[Exception] = []
    made = None
    try:
        if processes.is_main:
            made = use(tables)
    except Exception as error:
        errors.append(error)
    try:
        for _ in tables:  # what the others hand over, also to a main process that failed
            pass
    except Exception as error:
        errors.append(error)
    processes.run_on_main(_raise_first, errors)
    return made


def _raise_first(errors: Sequence[Exception]) -> None:
    if errors:
        raise errors[0]


def _write(path: Path, tables: Iterable[pa.Table], split: ImageSplit) -> None:
    num_written, writer = 0, None
    with replacing(path) as aside:
        try:
            for table in tables:
                writer = writer or pq.ParquetWriter(aside, table.schema, compression="zstd")
                rows_B = split.rows_N[num_written : num_written + len(table)]
                assert np.array_equal(table["row"].to_numpy(), rows_B), "every image once, in the order of the split"
                writer.write_table(table)
                num_written += len(table)
            assert num_written == len(split), f"predictions of {num_written} of {len(split)} images"
        finally:
            if writer is not None:
                writer.close()
        faults.at("predictions")


def _from_all(tables: Iterator[pa.Table], processes: Processes) -> Iterator[pa.Table]:
    """Give on the main process the tables of all, by rank, which is the order of the split; elsewhere none.

    An error of any process is raised on the main one when all have handed over theirs: none waits for one that is gone.
    """
    failed: TlscaleError | None = None
    for rank in range(processes.world_size):
        if processes.rank not in (0, rank):
            continue
        own = _or_error(tables) if processes.rank == rank else None
        while (item := processes.to_main(next(own, None) if own is not None else None, rank)) is not None:
            if isinstance(item, TlscaleError):
                failed = failed or item
            elif processes.is_main and failed is None:
                yield item
    if processes.is_main and failed is not None:
        raise failed


def _or_error(tables: Iterator[pa.Table]) -> Iterator[pa.Table | TlscaleError]:
    try:
        yield from tables
    except Exception as error:  # one that is not ours may not even be picklable
        yield (
            error if isinstance(error, TlscaleError) else TlscaleError(f"predictions cannot be put together: {error!r}")
        )


def read_predictions(path: Path, columns: Sequence[str] | None = None, *, if_there: Collection[str] = ()) -> pa.Table:
    """Read the predictions of a run, in the order of its scored split; `columns` of them, or all.

    Args:
        if_there: further columns that only some runs have.

    Raises:
        RunFolderError: the file is damaged.
    """
    try:
        further = [name for name in pq.read_schema(path).names if name in if_there]
        return pq.read_table(path, columns=None if columns is None else [*columns, *further])
    except (pa.ArrowException, OSError, ValueError, LookupError) as error:
        problem = f"'{path}' is damaged: {first_line(error)}"
        raise RunFolderError(problem, remedy="Bring it back, or remove it") from error
