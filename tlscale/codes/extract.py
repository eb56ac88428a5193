"""Computes codes, once: over all processes, and going on from where a killed run was.

Promise: every forward pass has `BLOCK` images, in the order of the table's rows, so that codes do not depend on the
batch size, the workers or the number of processes. Of two runs that want the same codes one computes, and the other
waits and reads. Codes that are not finite are an error, and never kept.

Shape letters: N images that are asked for, R rows of a shard, B images of a block.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tlscale import faults
from tlscale.codes.key import CodesKey
from tlscale.codes.reading import Codes
from tlscale.codes.shards import BLOCK, DTYPES, Ints, Shard, ValueSpec, rows_per_shard
from tlscale.codes.store import CodesStore, Stock, checked_rows
from tlscale.dist import Processes
from tlscale.errors import DataError, ModelError, Stopped, TlscaleError
from tlscale.progress import Progress, format_duration

Load = Callable[[Ints], Any]
Module = Callable[[Any], tuple[Tensor, ...]]
Values = tuple[Tensor, ...]
_WAIT_S = 1.0  # at most: the other processes wait for the main one meanwhile, and their patience ends some time
_SAY_EVERY_S = 10.0


def extract_codes(
    store: CodesStore,
    key: CodesKey,
    rows_N: Ints,
    *,
    load: Load,
    module: Module,
    processes: Processes,
    screen: Progress,
    title: str,
    should_stop: Callable[[], bool] | None = None,
) -> Codes:
    """The codes of some rows of the table; those that the store lacks are computed and kept.

    To be called on every process. An error on one of them reaches all.

    Args:
        store: the same folder for all processes.
        rows_N: distinct rows, in any order.
        load: positions in `rows_N`, int64 (BLOCK,), to what `module` wants.
        module: gives the values that `key.layers` names, in this order; the first dimension of each is the images.
            It is called without gradients, in the mode that it is in, and must not talk to the other processes.
        title: what the images are, for messages.
        should_stop: asked after each block; the shards that are finished by then are kept.

    Raises:
        DataError: a row is asked for twice; or codes are NaN or infinite.
        ModelError: the values are not what can be kept.
        Stopped: it was asked to stop.
        TlscaleError: the disk is full, the codes exceed the limit, or a process does not see the store's folder.
    """
    rows_N, say = checked_rows(rows_N), _once(screen.say)
    codes = _look(store, key, rows_N, processes, say)
    if codes is None:
        with processes.watchdog.watching(), _sole_writer(store, key, processes, say, should_stop):
            stock = processes.on_main(lambda: store.take_stock(key, rows_N, say))
            if len(stock.missing_R) or not stock.is_committed:
                work = _Extraction(store, key, rows_N, load, module, should_stop)
                _compute(work, stock, processes, say, title)
            codes = processes.on_all(lambda: _reopened(store, key, rows_N, processes.rank))
            codes.num_computed = len(stock.missing_R)
    if not codes.num_computed:
        say(f"codes of {title}: hit, {len(codes):,} images x {codes.row_bytes:,} bytes, from '{codes.path}'")
    return codes


def plan_shards(missing_R: Ints, num_rows: int) -> list[Ints]:
    """The shards to be written, whoever writes them: the missing rows, ascending, `num_rows` in each but the last."""
    return [missing_R[start : start + num_rows] for start in range(0, len(missing_R), num_rows)]


def shards_of(shards: list[Ints], rank: int, world_size: int) -> list[Ints | None]:
    """What process `rank` writes, round by round; None where it has nothing to do in the last round."""
    num_rounds = -(-len(shards) // world_size)
    mine: list[Ints | None] = [*shards[rank::world_size]]
    return mine + [None] * (num_rounds - len(mine))


def _once(say: Callable[[str], None]) -> Callable[[str], None]:
    """Says nothing twice: the same damage is found by who looks and by who repairs."""
    said: set[str] = set()

    def say_once(text: str) -> None:
        if text not in said:
            said.add(text)
            say(text)

    return say_once


def _look(
    store: CodesStore, key: CodesKey, rows_N: Ints, processes: Processes, say: Callable[[str], None]
) -> Codes | None:
    """The codes, if every process can read them; every byte is compared with the manifest, on one of them."""
    if not processes.on_main(lambda: store.open(key, rows_N, say=say) is not None):
        return None
    codes = store.open(key, rows_N, verify=False)
    return None if processes.any(codes is None) else codes


def _reopened(store: CodesStore, key: CodesKey, rows_N: Ints, rank: int) -> Codes:
    codes = store.open(key, rows_N, verify=False)
    if codes is None:
        raise TlscaleError(
            f"process {rank} does not find the codes in '{store.folder(key)}'. All processes of a run must see one "
            "folder: set TLSCALE_CACHE to one that all machines share"
        )
    return codes


@contextmanager
def _sole_writer(
    store: CodesStore,
    key: CodesKey,
    processes: Processes,
    say: Callable[[str], None],
    should_stop: Callable[[], bool] | None,
) -> Iterator[None]:
    """Hold the entry's lock, on the main process for all; it dies with that process."""
    with ExitStack() as held:

        def try_once(timeout_s: float) -> bool:
            lock = store.try_lock(key, timeout_s)
            if lock is not None:
                held.callback(lock.release)
            return lock is not None

        if not processes.on_main(lambda: try_once(0)):
            say(f"codes: waiting for another run that computes the same codes, in '{store.folder(key)}'")
            while not processes.on_main(lambda: try_once(_WAIT_S)):
                processes.watchdog.beat()
                if processes.any(should_stop is not None and should_stop()):
                    raise Stopped("stopped while waiting for another run that computes the same codes")
        yield


@dataclass
class _Extraction:
    """What it takes to compute a block."""

    store: CodesStore
    key: CodesKey
    rows_N: Ints
    load: Load
    module: Module
    should_stop: Callable[[], bool] | None
    values: tuple[ValueSpec, ...] = ()
    """Empty until the first block."""
    first: dict[bytes, Values] = field(default_factory=dict)
    """The block that the values were learnt from, by its rows, so that it is not computed twice."""

    def learn(self, rows_B: Ints) -> tuple[ValueSpec, ...]:
        """Compute a block to see what the values are."""
        raw = self._forward(rows_B)
        specs = tuple(_spec_of(name, v, self.key.dtype) for name, v in zip(self.key.layers, raw, strict=True))
        self.values = specs
        self.first[rows_B.tobytes()] = self._kept(raw, rows_B)
        return specs

    def write(self, rows_R: Ints, on_block: Callable[[int], None]) -> Shard:
        """Compute and write a shard; `on_block` gets the number of images of each block when it is done."""
        values_R = [torch.empty((len(rows_R), *spec.shape), dtype=spec.torch_dtype) for spec in self.values]
        for start in range(0, len(rows_R), BLOCK):
            rows_B = rows_R[start : start + BLOCK]
            for kept, new in zip(values_R, self._block(rows_B), strict=True):
                kept[start : start + BLOCK] = new
            on_block(len(rows_B))
            faults.at("codes.block")
            if self.should_stop is not None and self.should_stop():
                raise Stopped(
                    f"stopped while computing codes; those that are finished are kept in "
                    f"'{self.store.folder(self.key)}', and the same run goes on from them"
                )
        return self.store.write_shard(self.key, rows_R, values_R, self.values)

    def write_all(self, shards: Sequence[Ints], on_block: Callable[[int], None]) -> list[Shard]:
        """`write` for each of some shards."""
        return [self.write(rows_R, on_block) for rows_R in shards]

    def _block(self, rows_B: Ints) -> Values:
        return self.first.pop(rows_B.tobytes(), None) or self._kept(self._forward(rows_B), rows_B)

    @cached_property
    def _order_N(self) -> Ints:  # noqa: N802
        return np.argsort(self.rows_N)

    def _forward(self, rows_B: Ints) -> Values:
        # A short block is filled up: a network's arithmetic may depend on the number of images.
        padded_B = np.concatenate([rows_B, np.repeat(rows_B[-1:], BLOCK - len(rows_B))])
        positions_B = self._order_N[np.searchsorted(self.rows_N, padded_B, sorter=self._order_N)]
        with torch.no_grad():  # not inference mode: what comes from it could not be trained on
            values = self.module(self.load(positions_B))
        assert len(values) == len(self.key.layers), f"{len(values)} values for {self.key.layers}"
        return values

    def _kept(self, values: Values, rows_B: Ints) -> Values:
        """The values as they are kept: on the CPU, in their dtype and in the default memory order, without padding."""
        kept = []
        for spec, value in zip(self.values, values, strict=True):
            if tuple(value.shape) != (BLOCK, *spec.shape):
                raise ModelError(
                    f"the value '{spec.name}' is {tuple(value.shape)} for these {BLOCK} images and "
                    f"{(BLOCK, *spec.shape)} for others; only what has one shape for all can be kept as codes"
                )
            value = value.detach()[: len(rows_B)]
            stored = value.to(spec.torch_dtype).contiguous().cpu()
            _refuse_non_finite(stored, value, spec, rows_B)
            kept.append(stored)
        return tuple(kept)


def _spec_of(name: str, value_B: Tensor, dtype: str) -> ValueSpec:
    """What is to be kept of a value, from a whole block of it."""
    if value_B.ndim == 0 or len(value_B) != BLOCK:
        raise ModelError(
            f"the value '{name}' is {tuple(value_B.shape)} for {BLOCK} images; only what has the images as its first "
            "dimension can be kept as codes"
        )
    kind = dtype if dtype != "auto" and value_B.is_floating_point() else str(value_B.dtype).removeprefix("torch.")
    if kind not in DTYPES:
        raise ModelError(f"the value '{name}' is of dtype {kind}; codes can be kept as {', '.join(DTYPES)}")
    channels_last = (
        value_B.ndim == 4 and not value_B.is_contiguous() and value_B.is_contiguous(memory_format=torch.channels_last)
    )
    return ValueSpec(name, tuple(value_B.shape[1:]), kind, channels_last)


def _refuse_non_finite(stored_B: Tensor, value_B: Tensor, spec: ValueSpec, rows_B: Ints) -> None:
    if not stored_B.is_floating_point() or bool(torch.isfinite(stored_B).all()):
        return
    bad_B = ~torch.isfinite(stored_B).flatten(1).all(1) if stored_B.ndim > 1 else ~torch.isfinite(stored_B)
    rows = rows_B[bad_B.numpy()].tolist()
    shown = ", ".join(map(str, rows[:5])) + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")
    if bool(torch.isfinite(value_B).all()):
        why = f"too large for {spec.dtype}. Keep them in another dtype: codes.dtype"
    else:
        why = "NaN or infinite as the network gives them. Look at its weights, or at compute.precision"
    raise DataError(f"the codes '{spec.name}' of the images in the rows {shown} of the table are {why}")


def _compute(work: _Extraction, stock: Stock, processes: Processes, say: Callable[[str], None], title: str) -> None:
    """Compute what is missing, each process its shards, and make it visible at the end."""
    missing_R = stock.missing_R
    work.values = stock.values or processes.on_main(lambda: work.learn(missing_R[:BLOCK]))
    row_bytes = sum(spec.row_bytes for spec in work.values)
    shards = plan_shards(missing_R, rows_per_shard(row_bytes, work.store.shard_bytes))
    processes.on_main(lambda: work.store.make_room(work.key, len(missing_R) * row_bytes, say))
    pace = _Pace(len(missing_R), processes, say, title)
    pace.begin(work.values, len(work.rows_N), work.store.folder(work.key))
    written: list[Shard] = []
    for rows_R in shards_of(shards, processes.rank, processes.world_size):
        mine = () if rows_R is None else (rows_R,)
        written += processes.on_all(partial(work.write_all, mine, pace.add))
    everywhere = [shard for some in processes.gather(written) for shard in some]
    processes.on_main(lambda: work.store.commit(work.key, work.values, [*stock.shards, *everywhere]))
    pace.end()


class _Pace:
    """How far the computation is; all processes have about equal shares."""

    def __init__(self, total: int, processes: Processes, say: Callable[[str], None], title: str) -> None:
        self._total, self._world_size, self._say, self._title = total, processes.world_size, say, title
        self._watchdog = processes.watchdog
        self._done = 0
        self._began_s = self._said_s = time.monotonic()

    def begin(self, values: tuple[ValueSpec, ...], num_asked: int, folder: Path) -> None:
        """Say what is computed, and where it is kept."""
        if not self._total:
            return
        size = self._total * sum(spec.row_bytes for spec in values) / 2**20
        names = ", ".join(spec.describe() for spec in values[:3]) + (" ..." if len(values) > 3 else "")
        of = f" of {num_asked:,}" if self._total < num_asked else ""
        self._say(
            f"codes of {self._title}: computing {self._total:,}{of} images ({names}), {size:.1f} MiB in '{folder}'"
        )

    def add(self, num_images: int) -> None:
        """So many more are done, on this process."""
        self._watchdog.beat()
        self._done += num_images
        now_s = time.monotonic()
        if now_s - self._said_s >= _SAY_EVERY_S:
            self._said_s = now_s
            done = min(self._done * self._world_size, self._total)
            rate = done / (now_s - self._began_s)
            self._say(
                f"codes of {self._title}: {done:,} of {self._total:,} images, {rate:.0f} images/s, "
                f"eta {format_duration((self._total - done) / rate)}"
            )

    def end(self) -> None:
        """Say how long it took."""
        if self._total:
            took_s = max(time.monotonic() - self._began_s, 1e-9)
            self._say(
                f"codes of {self._title}: {self._total:,} images computed in {format_duration(took_s)}, "
                f"{self._total / took_s:.0f} images/s"
            )
