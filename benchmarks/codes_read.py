"""Reading codes (cached features) in random order: tlscale's store against one plain array, on disk and in memory.

    python benchmarks/codes_read.py [--rounds 101] [--threads 1]

Each round takes a batch of random rows once in each way, so that a busy machine slows all of them. `plain memmap` is
one contiguous .npy file and NumPy's fancy index, `plain tensor` one tensor in memory and `index_select`: what somebody
would write for one array that is never added to. All files are in the page cache. Also measured: what a hit costs, all
of whose bytes are hashed. Prints Markdown.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from tlscale.codes.key import CodesKey
from tlscale.codes.reader import Codes
from tlscale.codes.shards import ValueSpec, rows_per_shard
from tlscale.codes.store import CodesStore
from tlscale.data.content import digest_array

# (what it is like, values of an image, images)
SIZES = (
    ("ResNet-18, penultimate", (512,), 60_000),
    ("ResNet-50, penultimate", (2048,), 20_000),
    ("ResNet-18, layer3 at 160 px", (256, 10, 10), 4_000),
)
BATCHES = (64, 256)


def ids_of(rows: np.ndarray) -> np.ndarray:
    """Return digests that stand for the contents of images."""
    return digest_array([hashlib.sha256(str(row).encode()).digest() for row in rows.tolist()])


def put_codes(folder: Path, shape: tuple[int, ...], num_images: int) -> tuple[CodesStore, CodesKey, np.ndarray]:
    """Write the same random values to the store and to one plain file, and return that file mapped."""
    values = np.random.default_rng(0).standard_normal((num_images, *shape), dtype=np.float32)
    np.save(folder / "plain.npy", values)
    store, spec = CodesStore(folder / "codes"), ValueSpec("x", shape, "float32", False)
    key = CodesKey("", {}, ("x",), ("as is",), "auto", {}, {})
    step = rows_per_shard(spec.row_bytes)
    rows = [np.arange(start, min(start + step, num_images)) for start in range(0, num_images, step)]
    for rows_R in rows:
        store.write_shard(key, ids_of(rows_R), (torch.from_numpy(values[rows_R]),), (spec,), "benchmark")
    return store, key, np.load(folder / "plain.npy", mmap_mode="r")


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def read_times(codes: Codes, plain: np.ndarray, batch: int, rounds: int) -> tuple[float, ...]:
    """Median microseconds of a batch: plain memmap, store, plain tensor, store in memory."""
    loaded, tensor = codes.load(), torch.from_numpy(np.array(plain))
    ways: tuple[Callable[[np.ndarray], torch.Tensor], ...] = (
        lambda at: torch.from_numpy(plain[at]),
        lambda at: codes.take(at)[0],
        lambda at: tensor.index_select(0, torch.from_numpy(at)),
        lambda at: loaded.take(at)[0],
    )
    rng = np.random.default_rng(1)
    check = rng.integers(0, len(codes), batch)
    assert all(torch.equal(ways[0](check), way(check)) for way in ways)
    times = []
    for _ in range(rounds):
        at = rng.integers(0, len(codes), batch)
        times.append([1e6 * seconds(partial(way, at)) for way in ways])
    return tuple(np.median(times, axis=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=101)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    hits = []
    print("| codes | batch | plain memmap, µs | store, µs | ratio | plain tensor, µs | store in memory, µs | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for name, shape, num_images in SIZES:
        with tempfile.TemporaryDirectory() as folder:
            store, key, plain = put_codes(Path(folder), shape, num_images)
            open_all = partial(store.open, key, ids_of(np.arange(num_images)))
            hit_s = statistics.median(seconds(open_all) for _ in range(5))
            codes = open_all()
            assert codes is not None
            hits.append((name, codes.num_bytes / 2**20, hit_s))
            for batch in BATCHES:
                a, b, c, d = read_times(codes, plain, batch, args.rounds)
                label = f"{name}, {codes.row_bytes // 1024} KiB x {num_images:,}"
                print(f"| {label} | {batch} | {a:.0f} | {b:.0f} | {b / a:.2f} | {c:.0f} | {d:.0f} | {d / c:.2f} |")
    print("\n| a hit, every byte hashed | MiB | s | MiB/s |\n|---|---|---|---|")
    for name, mib, hit_s in hits:
        print(f"| {name} | {mib:.0f} | {hit_s:.3f} | {mib / hit_s:.0f} |")


if __name__ == "__main__":
    main()
