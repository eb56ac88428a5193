"""Compute codes once: over all processes, and resuming where a killed run was.

Promise: every forward pass has `BLOCK` images, so that codes do not depend on the batch size, the workers or the number
of processes. A row is stored under the address of what was read when it was computed. Of two runs that want the same
codes one computes, and the other waits and reads. Codes that are not finite are an error, and never stored.

Images whose addresses are not known yet are hashed as they are read, and decoded only where their codes are missing.

Shape letters: N images that are requested, P positions among them, R images of a shard, B images of a block.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from tlscale.codes.blocks import AddressedImages, Extraction, Module
from tlscale.codes.entry import checked_ids
from tlscale.codes.key import CodesKey
from tlscale.codes.reader import Codes
from tlscale.codes.shards import BLOCK, Ints, rows_per_shard
from tlscale.codes.store import CodesStore
from tlscale.data.content import Digests, digest_bytes
from tlscale.distributed.processes import Processes
from tlscale.distributed.signals import check_stop
from tlscale.errors import TlscaleError
from tlscale.tracking.console import Console
from tlscale.tracking.progress import Pace
from tlscale.tracking.stopwatch import format_duration

_WAIT_S = 0.5
_REPORT_EVERY_S = 10.0
_ROUNDS = 3  # what is found corrupt at the end is computed again


def extract_codes(
    store: CodesStore,
    keys: Sequence[CodesKey],
    images: AddressedImages,
    *,
    module: Module,
    processes: Processes,
    console: Console,
    title: str,
) -> Codes:
    """Get the codes of some images, under each of the keys; those that the store lacks are computed and stored.

    To be called on every process, with a store in one folder. An error on one of them reaches all.

    Args:
        module: gives the values that the keys' layers name, in this order; the first dimension of each is the images.
            It is called without gradients, in the mode that it is in, and must not talk to the other processes.
        title: what the images are, for messages.

    Raises:
        DataError: codes are NaN or infinite, or an image cannot be read.
        ModelError: the values cannot be stored.
        Stopped: it was asked to stop; what is computed by then stays.
        TlscaleError: the disk is full, the codes exceed the limit, or a process does not see the store's folder.
    """
    say, tell, num_computed = _once(console.say), console.detail, 0
    ids_N, known_N = processes.run_on_main(images.known)
    ids_N = checked_ids(ids_N).copy()
    name = "" if known_N.all() else processes.run_on_main(images.name)
    request = hashlib.sha256(ids_N.tobytes() + name.encode()).hexdigest()[:16]  # who asks for the same at once waits
    codes = _look(store, keys, ids_N, processes, say) if known_N.all() else None
    if codes is None:
        store = _place_to_write(store, keys, processes)
    for _ in range(_ROUNDS):
        if codes is not None:
            break
        with processes.watchdog.watching(), _sole_writer(store, keys, request, processes, say):
            work = Extraction(store, keys, images, module, request, ids_N, known_N.copy())
            num_computed += _compute(work, processes, say, tell, title)
            known_N[:] = True
            codes = _reopened(work, processes, say)
    if codes is None:
        raise TlscaleError(f"codes in '{store.root}' are removed or corrupt as fast as they are computed")
    images.found(ids_N)
    codes.num_computed = num_computed
    if not num_computed:
        size = f"{len(codes):,} images x {codes.row_bytes:,} bytes"
        tell(f"codes of {title}: found in the cache, {size}, in '{codes.path}'")
    return codes


def plan_shards(positions_P: Ints, num_rows: int) -> list[Ints]:
    """Split the images that may be missing into shards, whoever writes them: in order, the last shard the smallest."""
    return [positions_P[start : start + num_rows] for start in range(0, len(positions_P), num_rows)]


def shards_of(shards: list[Ints], rank: int, world_size: int) -> list[Ints]:
    """Select the shards that process `rank` writes, round by round; empty where nothing is left in the last round."""
    num_rounds = -(-len(shards) // world_size)
    mine = shards[rank::world_size]
    return mine + [np.zeros(0, np.int64)] * (num_rounds - len(mine))


def _once(say: Callable[[str], None]) -> Callable[[str], None]:
    """Drop repeated messages: the same corruption is found by who looks and by who repairs."""
    said: set[str] = set()

    def say_once(text: str) -> None:
        if text not in said:
            said.add(text)
            say(text)

    return say_once


def _open_all(
    store: CodesStore, keys: Sequence[CodesKey], ids_N: Digests, *, verify: bool, say: Callable[[str], None]
) -> Codes | None:
    found = []
    for key in keys:
        codes = store.open(key, ids_N, verify=verify, say=say)
        if codes is None:
            return None
        found.append(codes)
    return found[0].joined_with(found[1:])


def _look(
    store: CodesStore, keys: Sequence[CodesKey], ids_N: Digests, processes: Processes, say: Callable[[str], None]
) -> Codes | None:
    """Open the codes, if every process can read them; every byte is compared with the records, on one of them."""
    if not processes.run_on_main(lambda: _open_all(store, keys, ids_N, verify=True, say=say) is not None):
        return None
    codes = _open_all(store, keys, ids_N, verify=False, say=say)
    return None if processes.any(codes is None) else codes


def _place_to_write(store: CodesStore, keys: Sequence[CodesKey], processes: Processes) -> CodesStore:
    """Return the store; where it may not be written to, one of this run alone, so that it can compute all the same."""
    root = processes.run_on_main(store.spare_root, keys)
    return store if root is None else CodesStore(root, store.limit_bytes, shard_bytes=store.shard_bytes)


def _reopened(work: Extraction, processes: Processes, say: Callable[[str], None]) -> Codes | None:
    """Open what is there now; None where an expected shard is corrupt."""
    if processes.any(work.found_late):  # what nobody asked for by address was not verified
        return _look(work.store, work.keys, work.ids_N, processes, say)
    there = processes.run_on_main(
        lambda: _open_all(work.store, work.keys, work.ids_N, verify=False, say=say) is not None
    )
    return processes.run_on_all(_opened_here, work, processes.rank) if there else None


def _opened_here(work: Extraction, rank: int) -> Codes:
    codes = _open_all(work.store, work.keys, work.ids_N, verify=False, say=lambda text: None)
    if codes is None:
        raise TlscaleError(
            f"process {rank} does not find the codes in '{work.store.root}'",
            remedy="All processes of a run must see one folder: set TLSCALE_CACHE to one that all machines share",
        )
    return codes


@contextmanager
def _sole_writer(
    store: CodesStore,
    keys: Sequence[CodesKey],
    request: str,
    processes: Processes,
    say: Callable[[str], None],
) -> Iterator[None]:
    """Hold the locks of the request, on the main process for all; they die with that process."""
    locks: list[Any] = []

    def try_once() -> bool:
        held = store.try_lock(keys, request)
        locks.extend(held or ())
        return held is not None

    try:
        if not processes.run_on_main(try_once):
            say(f"codes: waiting for another run that computes the same codes, in '{store.folder(keys[0])}'")
            while not processes.run_on_main(try_once):
                time.sleep(_WAIT_S)
                processes.watchdog.beat()
                processes.run_on_all(check_stop, "waiting for another run that computes the same codes")
        yield
    finally:
        store.release(locks)


def _compute(
    work: Extraction, processes: Processes, say: Callable[[str], None], tell: Callable[[str], None], title: str
) -> int:
    """Compute what is missing, each process its shards; return the number of images, over all processes."""
    store, known_ids = work.store, work.ids_N[work.known_N]
    work.inventories = processes.run_on_main(
        lambda: tuple(store.take_inventory(key, known_ids, work.request, say) for key in work.keys)
    )
    todo_P = work.todo()
    if not len(todo_P):
        return 0
    work.values = tuple(inventory.values for inventory in work.inventories)
    if not all(work.values):
        work.values = processes.run_on_main(lambda: work.learn(todo_P[:BLOCK]))
    num_missing = int(np.count_nonzero(work.known_N[todo_P]))
    num_wanted = len(np.unique(work.ids_N[work.known_N])) + int(np.count_nonzero(~work.known_N))
    may_be_there = num_missing < len(todo_P) and any(len(inventory.there_M) for inventory in work.inventories)
    processes.run_on_main(
        lambda: store.check_room(
            (num_missing if may_be_there else num_wanted) * work.row_bytes, num_missing * work.row_bytes
        )
    )
    tell(f"codes of {title}: {_announced(work, len(todo_P), may_be_there=may_be_there)}")
    began_s, pace = time.monotonic(), Pace(len(todo_P), f"codes of {title}", every_s=_REPORT_EVERY_S)

    def on_block(num_images: int) -> None:
        processes.watchdog.beat()
        pace.add(num_images * processes.world_size)  # all processes have about equal shares

    inventories = zip(work.keys, work.inventories, strict=True)
    spared = {(key.digest(), name) for key, inventory in inventories for name in inventory.used}
    shards = plan_shards(todo_P, rows_per_shard(work.row_bytes, store.shard_bytes))
    with pace:  # the other processes' last images are not counted by this one
        for positions_P in shards_of(shards, processes.rank, processes.world_size):
            spared |= _round(work, positions_P, spared, processes, say, on_block)
    if num_computed := len(work.done):
        took_s = max(time.monotonic() - began_s, 1e-9)
        speed = f"{num_computed / took_s:.0f} images/s"
        tell(f"codes of {title}: {num_computed:,} images computed in {format_duration(took_s)}, {speed}")
    return num_computed


def _announced(work: Extraction, num_images: int, *, may_be_there: bool) -> str:
    names = ", ".join(spec.describe() for spec in work.specs[:3]) + (" ..." if len(work.specs) > 3 else "")
    if may_be_there:
        return f"reading {num_images:,} images, and computing the new ones ({names})"
    place = work.store.folder(work.keys[0]) if len(work.keys) == 1 else work.store.root
    of = f" of {len(work.ids_N):,}" if num_images < len(work.ids_N) else ""
    size = num_images * work.row_bytes / 2**20
    return f"computing {num_images:,}{of} images ({names}), {size:.1f} MiB in '{place}'"


def _round(
    work: Extraction,
    positions_P: Ints,
    spared: set[tuple[str, str]],
    processes: Processes,
    say: Callable[[str], None],
    on_block: Callable[[int], None],
) -> set[tuple[str, str]]:
    """Compute and write one shard on each process; return the shards that were written."""
    ids_P, new_R, values = processes.run_on_all(work.chunk, positions_P, on_block)
    before: set[bytes] = set()
    done_P = positions_P[: len(ids_P)]  # of a process that was asked to stop not all
    for rank, (positions, ids, new) in enumerate(processes.gather((done_P, ids_P, new_R))):
        work.ids_N[positions] = ids
        if rank == processes.rank:  # the process before it in line keeps an image that two have computed
            fresh_R = np.array([address not in before for address in digest_bytes(new)], dtype=bool)
        before |= set(digest_bytes(new))
    num_bytes = len(before) * work.row_bytes
    processes.run_on_main(work.store.make_room, num_bytes, spared, work.request, say)
    if not fresh_R.all():
        new_R, values = new_R[fresh_R], tuple(value[torch.from_numpy(fresh_R)] for value in values)
    written = processes.run_on_all(lambda: work.write(new_R, values) if len(new_R) else [])
    work.done |= before
    processes.run_on_all(check_stop, "computing codes", f"What is computed stays in '{work.store.root}'")
    return {shard for some in processes.gather(written) for shard in some}
