"""The store of codes: what is read is what was written, to the last bit, or it is not there."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tlscale.codes.key import CodesKey
from tlscale.codes.shards import BLOCK, DTYPES, ValueSpec, rows_per_shard
from tlscale.codes.store import CodesStore, codes_root
from tlscale.errors import DataError, TlscaleError

SPECS = (ValueSpec("layer3", (2, 3, 4), "float32", True), ValueSpec("penultimate", (5,), "bfloat16", False))
KEY = CodesKey(
    weights="w",
    transform={"image_size": 32},
    layers=("layer3", "penultimate"),
    pools=("as is", "as is"),
    dtype="auto",
    compute={},
    data="table",
    versions={"torch": torch.__version__},
)
OTHERS = [replace(KEY, data=f"table {number}") for number in range(4)]


def values_of(rows, specs=SPECS) -> tuple[torch.Tensor, ...]:
    """What stands for the codes of these rows: each row has its own values."""
    made = []
    for spec in specs:
        numel = int(np.prod(spec.shape, dtype=int))
        flat = torch.tensor(np.asarray(rows)[:, None] * 7.0 + np.arange(numel)) % 251
        made.append(flat.reshape(len(rows), *spec.shape).to(spec.torch_dtype))
    return tuple(made)


def put(store, rows, key=KEY, specs=SPECS, per_shard=10):
    """Write and commit what is missing of these rows, as an extraction would."""
    stock = store.take_stock(key, np.asarray(rows))
    parts = [stock.missing_R[i : i + per_shard] for i in range(0, len(stock.missing_R), per_shard)]
    shards = [store.write_shard(key, rows_R, values_of(rows_R, specs), specs) for rows_R in parts]
    store.commit(key, specs, [*stock.shards, *shards])
    return stock.missing_R


def assert_right(codes, rows, specs=SPECS):
    """The codes are those of these rows, in this order, also in part, in any order, and from memory."""
    positions = np.random.default_rng(0).integers(0, len(rows), 2 * len(rows))
    for some in (codes, codes.load()):
        for at in (np.arange(len(rows)), positions):
            for got, expected in zip(some.take(at), values_of(np.asarray(rows)[at], specs), strict=True):
                assert got.dtype == expected.dtype
                assert torch.equal(got, expected)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def store(tmp_path):
    return CodesStore(tmp_path / "codes")


# --- What is written is what is read ----------------------------------------------------------------------------------

ROWS = st.lists(st.integers(0, 300), min_size=1, max_size=80, unique=True)


@settings(max_examples=40, deadline=None)
@given(requests=st.lists(ROWS, min_size=1, max_size=4), per_shard=st.integers(1, 40))
def test_any_requests_one_after_the_other(tmp_path_factory, requests, per_shard):
    store = CodesStore(tmp_path_factory.mktemp("codes"))
    there: set[int] = set()
    for rows in requests:
        rows_N = np.array(rows)
        assert store.missing(KEY, rows_N).tolist() == sorted(set(rows) - there)
        assert (store.open(KEY, rows_N) is None) == bool(set(rows) - there)
        assert set(put(store, rows, per_shard=per_shard)) == set(rows) - there
        there |= set(rows)
        assert_right(store.open(KEY, rows_N), rows)
    everything = sorted(there)
    assert_right(store.open(KEY, np.array(everything)), everything)
    assert sum(entry.num_rows for entry in store.entries()) == len(there)  # none is kept twice


def test_what_is_asked_for_says_what_it_is(store):
    put(store, range(25))
    codes = store.open(KEY, np.array([20, 3, 7]))
    assert (len(codes), codes.rows_N.tolist(), codes.values) == (3, [20, 3, 7], SPECS)
    assert codes.row_bytes == 2 * 3 * 4 * 4 + 5 * 2
    assert codes.num_bytes == 3 * codes.row_bytes
    assert codes.path == store.folder(KEY)
    assert codes.num_computed == 0


@pytest.mark.parametrize("rows", [[1, 2, 1], [], [-1, 3]])
def test_rows_that_make_no_sense_are_refused(store, rows):
    for ask in (store.open, store.missing, store.take_stock):
        with pytest.raises(DataError, match=r"row 1 were asked for 2 times|of no image|no row -1"):
            ask(KEY, np.array(rows, dtype=np.int64))


@pytest.mark.parametrize("positions", [[3], [-1], [0, 1, 2, 3]])
def test_positions_out_of_range_are_refused(store, positions):
    put(store, range(3))
    codes = store.open(KEY, np.arange(3))
    for some in (codes, codes.load()):
        with pytest.raises(IndexError):
            some.take(np.array(positions))


def test_no_positions_are_no_values(store):
    put(store, range(3))
    codes = store.open(KEY, np.arange(3))
    for some in (codes, codes.load()):
        assert [value.shape for value in some.take(np.array([], dtype=np.int64))] == [(0, 2, 3, 4), (0, 5)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_every_dtype_comes_back_bit_for_bit(store, dtype, shape):
    specs = (ValueSpec("x", shape, dtype, False),)
    key = replace(KEY, layers=("x",), pools=("as is",))
    size = torch.empty(0, dtype=DTYPES[dtype]).element_size()
    raw = torch.randint(0, 2 if dtype == "bool" else 256, (20, *shape, size), dtype=torch.uint8)
    values = raw.view(DTYPES[dtype]).squeeze(-1).contiguous()
    shard = store.write_shard(key, np.arange(20), (values,), specs)
    store.commit(key, specs, [shard])
    codes = store.open(key, np.arange(20))
    for some in (codes, codes.load()):
        (got,) = some.take(np.arange(20))
        assert got.dtype == values.dtype
        # As bytes: random bits have NaNs among them.
        assert got.contiguous().unsqueeze(-1).view(torch.uint8).tolist() == raw.tolist()


def test_the_memory_order_is_the_networks(store):
    put(store, range(30))
    codes = store.open(KEY, np.arange(30))
    for some in (codes, codes.load()):
        for count in (1, 7):
            maps, vectors = some.take(np.arange(count))
            assert maps.is_contiguous(memory_format=torch.channels_last)
            assert not maps.is_contiguous()
            assert vectors.is_contiguous()


def test_what_is_taken_may_be_overwritten(store):
    put(store, range(30))
    before = contents(store.root)
    codes = store.open(KEY, np.arange(30))
    for some in (codes, codes.load()):
        for value in some.take(np.arange(30)):
            value.fill_(99)
        assert_right(some, range(30))
    assert contents(store.root) == before


def test_codes_are_read_into_memory_up_to_a_limit(store):
    put(store, range(30))
    codes = store.open(KEY, np.arange(5, 25))
    assert codes.load(codes.num_bytes - 1) is codes
    loaded = codes.load(codes.num_bytes)
    assert (codes.in_memory, loaded.in_memory) == (False, True)
    assert loaded.load() is loaded
    shutil.rmtree(store.root)
    assert_right(loaded, range(5, 25))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_what_is_mapped_outlives_its_removal_and_keeps_no_file_open(store):
    put(store, range(40), per_shard=1)
    before = len(os.listdir("/proc/self/fd"))
    codes = store.open(KEY, np.arange(40))
    assert len(os.listdir("/proc/self/fd")) == before  # thousands of shards would meet the limit of open files
    assert store.prune("all") > 0
    assert store.open(KEY, np.arange(40)) is None
    assert_right(codes, range(40))


def test_the_size_of_shards():
    assert rows_per_shard(1) == 4096
    assert rows_per_shard(8192) == 4096
    assert rows_per_shard(8193) == 2048
    assert rows_per_shard(2**30) == BLOCK
    assert {rows_per_shard(2**power) % BLOCK for power in range(32)} == {0}


def test_the_cache_folder_is_the_environments(monkeypatch, tmp_path):
    monkeypatch.setenv("TLSCALE_CACHE", str(tmp_path / "cache"))
    assert CodesStore().root == codes_root() == tmp_path / "cache" / "codes"
    monkeypatch.delenv("TLSCALE_CACHE")
    assert codes_root() == Path.home() / ".cache" / "tlscale" / "codes"


def test_a_shard_that_is_written_again_is_not_changed_under_its_readers(store):
    put(store, range(10))
    codes = store.open(KEY, np.arange(10))
    store.write_shard(KEY, np.arange(10), tuple(value + 1 for value in values_of(range(10))), SPECS)
    assert_right(codes, range(10))
    assert store.open(KEY, np.arange(10)) is None  # the manifest is of the old bytes


def test_another_key_finds_nothing(store):
    put(store, range(10))
    assert store.open(replace(KEY, weights="other"), np.arange(10)) is None


# --- What is damaged is found, and never read -------------------------------------------------------------------------


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\0")


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


def flip_header(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 2
    path.write_bytes(bytes(data))


def empty(path):
    path.write_bytes(b"")


def scramble(path):
    path.write_bytes(b"\xff" * path.stat().st_size)


def other_json(path):
    path.write_bytes(b'{"sha256": 1}' + b" " * max(0, path.stat().st_size - 13))


DAMAGES = [truncate, lengthen, flip, flip_header, empty, scramble, other_json, os.unlink]
NUM_FILES = 1 + 3 * 4  # three shards of four files, and the manifest


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_of_any_file_is_found_and_never_read(tmp_path, damage):
    store = CodesStore(tmp_path)
    put(store, range(30))
    sound = contents(store.folder(KEY))
    names = [name for name in sound if name != "used"]
    assert len(names) == NUM_FILES
    assert store.verify() == []
    for name in names:
        damage(store.folder(KEY) / name)
        said: list[str] = []
        codes = store.open(KEY, np.arange(30), say=said.append)
        is_record = name.endswith(".json") and name != "manifest.json"  # read only where there is no manifest
        lost = name == "manifest.json" and damage is os.unlink
        assert (codes is None) == (not is_record), name
        assert bool(said) == (codes is None and not lost), name
        assert lost or len(store.verify()) == 1, name
        assert all(str(store.folder(KEY)) in line for line in store.verify())
        if codes is not None:
            assert_right(codes, range(30))
        again = put(store, range(30))
        assert len(again) == (0 if name.endswith(".json") else 10), name
        assert contents(store.folder(KEY)) == sound, name
        assert store.verify() == []
        assert_right(store.open(KEY, np.arange(30)), range(30))


def test_damage_in_a_shard_costs_only_its_rows(store):
    put(store, range(30))
    damaged = next(path for path in store.folder(KEY).glob("*.0.npy"))
    flip(damaged)
    lost = store.missing(KEY, np.arange(30))
    assert len(lost) == 10
    others = np.setdiff1d(np.arange(30), lost)
    assert_right(store.open(KEY, others), others)
    assert_right(store.open(KEY, others[::-1]), others[::-1])
    assert put(store, others[:3]).size == 0  # does not touch it
    assert store.missing(KEY, np.arange(30)).tolist() == lost.tolist()


def test_without_verification_sizes_are_looked_at(store):
    put(store, range(30))
    path = next(store.folder(KEY).glob("*.0.npy"))
    flip(path)
    assert store.open(KEY, np.arange(30), verify=False) is not None
    truncate(path)
    assert store.open(KEY, np.arange(30), verify=False) is None


def swap(one: Path, other: Path):
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


@pytest.mark.parametrize("suffix", [".0.npy", ".1.npy", ".rows.npy", ".json"])
def test_files_of_two_shards_that_were_swapped(store, suffix):
    put(store, range(30))
    names = sorted(path for path in store.folder(KEY).glob(f"*{suffix}") if path.name != "manifest.json")
    swap(names[0], names[1])
    assert len(store.verify()) == 2
    codes = store.open(KEY, np.arange(30))
    assert (codes is None) == (suffix != ".json")
    assert len(put(store, range(30))) == (0 if suffix == ".json" else 20)
    assert_right(store.open(KEY, np.arange(30)), range(30))
    assert store.verify() == []


def test_entries_that_were_swapped_are_not_mistaken_for_one_another(store):
    put(store, range(30), OTHERS[0])
    put(store, range(30), OTHERS[1])
    swap(store.folder(OTHERS[0]), store.folder(OTHERS[1]))
    assert len(store.verify()) == 2
    for key in OTHERS[:2]:
        said: list[str] = []
        assert store.open(key, np.arange(30), say=said.append) is None
        assert "belongs to other codes" in said[0]
    assert len(put(store, range(30), OTHERS[0])) == 30  # nor are their shards, which have the same rows


def test_a_shard_of_another_entry_is_not_taken_over(store):
    put(store, range(10), OTHERS[0])
    shutil.copytree(store.folder(OTHERS[0]), store.folder(OTHERS[1]))
    (store.folder(OTHERS[1]) / "manifest.json").unlink()
    said: list[str] = []
    stock = store.take_stock(OTHERS[1], np.arange(10), said.append)
    assert stock.missing_R.tolist() == list(range(10))
    assert stock.shards == ()
    assert len(said) == 1
    assert list(store.folder(OTHERS[1]).glob("*.npy")) == []


# --- Writers that were killed -----------------------------------------------------------------------------------------


def test_finished_shards_without_a_manifest_are_seen_by_the_next_writer_only(store):
    for rows in (np.arange(10), np.arange(20, 30)):
        store.write_shard(KEY, rows, values_of(rows), SPECS)
    (store.folder(KEY) / "0123.0.npy").write_bytes(b"half")
    (store.folder(KEY) / ".manifest.json.77").write_bytes(b"half")
    assert store.open(KEY, np.arange(10)) is None
    assert store.verify() == []
    (entry,) = store.entries()
    assert (entry.complete, entry.num_rows, entry.key) == (False, 20, KEY.to_plain())
    assert put(store, range(30)).tolist() == list(range(10, 20))
    assert_right(store.open(KEY, np.arange(30)), range(30))
    clean = CodesStore(store.root.parent / "clean")
    put(clean, range(30))
    assert contents(store.folder(KEY)) == contents(clean.folder(KEY))


def test_finished_shards_of_a_larger_request_serve_a_smaller_one(store):
    rows = np.arange(10)
    store.write_shard(KEY, rows, values_of(rows), SPECS)
    assert put(store, range(5, 15)).tolist() == list(range(10, 15))
    assert_right(store.open(KEY, np.arange(15)), range(15))


def test_shards_of_other_values_are_not_mixed_in(store):
    put(store, range(10))
    wider = (replace(SPECS[0], shape=(2, 3, 5)), SPECS[1])
    store.write_shard(KEY, np.arange(10, 20), values_of(range(10, 20), wider), wider)
    assert len(put(store, range(20))) == 10
    assert_right(store.open(KEY, np.arange(20)), range(20))


# --- Room -------------------------------------------------------------------------------------------------------------


def use_in_order(store, *keys):
    """As if they had been used in this order, a while ago."""
    for second, key in enumerate(keys):
        os.utime(store.folder(key) / "used", (1e9 + second, 1e9 + second))


def there(store):
    return [key for key in OTHERS if store.folder(key).is_dir()]


def test_what_was_not_used_for_longest_goes_first(store):
    for key in OTHERS:
        put(store, range(30), key)
    use_in_order(store, OTHERS[2], OTHERS[0], OTHERS[3], OTHERS[1])
    assert [entry.digest for entry in store.entries()] == [OTHERS[i].digest() for i in (1, 3, 0, 2)]
    assert store.open(OTHERS[2], np.arange(3)) is not None  # which uses it
    assert store.entries()[0].digest == OTHERS[2].digest()
    size = store.entries()[0].num_bytes
    store.limit_bytes = round(4.5 * size)
    store.make_room(KEY, size)
    assert there(store) == OTHERS[1:]
    store.make_room(KEY, 2 * size)
    assert there(store) == [OTHERS[1], OTHERS[2]]
    store.make_room(OTHERS[2], round(3.4 * size))  # its own size counts, and it stays
    assert there(store) == [OTHERS[2]]


def test_an_entry_that_is_being_written_is_not_evicted(store):
    for key in OTHERS[:3]:
        put(store, range(30), key)
    use_in_order(store, *OTHERS[:3])
    lock = store.try_lock(OTHERS[0], 0)
    said: list[str] = []
    assert store.try_lock(OTHERS[0], 0) is None
    assert store.prune(store.entries()[0].num_bytes, said.append) > 0
    assert there(store) == [OTHERS[0]]
    assert "being written" in said[0]
    assert store.prune("all") == 0
    lock.release()
    assert store.prune("all") > 0
    assert there(store) == []


def test_codes_over_the_limit_are_refused_and_nothing_is_removed(store):
    put(store, range(30), OTHERS[0])
    store.limit_bytes = 10_000_000
    with pytest.raises(TlscaleError, match=r"need 19.1 MiB, but all codes may take 9.5 MiB.*codes.cache_gib"):
        store.make_room(KEY, 20_000_000)
    assert there(store) == [OTHERS[0]]


def test_codes_that_the_disk_has_no_room_for_are_refused(store):
    with pytest.raises(TlscaleError, match=r"need 1048576.0 GiB in '.*', but that disk has .* left"):
        store.make_room(KEY, 2**50)


def test_entries_are_pruned_by_their_first_digits(store):
    for key in OTHERS:
        put(store, range(10), key)
    digests = [key.digest() for key in OTHERS]
    sizes = {entry.digest: entry.num_bytes for entry in store.entries()}
    assert store.prune([digests[0][:10], digests[2]]) == sizes[digests[0]] + sizes[digests[2]]
    assert there(store) == [OTHERS[1], OTHERS[3]]
    for wrong in ("f" * 64, "", digests[1][:-1] + "z"):
        with pytest.raises(TlscaleError, match="no codes in .* begin with .*there are") as caught:
            store.prune([wrong])
        assert digests[1][:12] in str(caught.value)
        with pytest.raises(TlscaleError):
            store.verify(wrong)
    assert store.verify(digests[1][:8]) == []


def test_only_our_own_folders_are_removed(store):
    put(store, range(10))
    (store.root / "thesis").mkdir()
    (store.root / "thesis" / "a.tex").write_text("x")
    (store.root / f".removed-{'0' * 64}.1").mkdir()  # of a process that was killed
    store.prune("all")
    assert sorted(path.name for path in store.root.iterdir()) == ["locks", "thesis"]


def test_an_empty_store_is_looked_at_without_making_it(tmp_path):
    store = CodesStore(tmp_path / "none" / "codes")
    assert (store.entries(), store.verify(), store.prune("all"), store.prune(0)) == ([], [], 0, 0)
    assert store.missing(KEY, np.arange(3)).tolist() == [0, 1, 2]
    assert not (tmp_path / "none").exists()


# --- A disk that does not take it -------------------------------------------------------------------------------------


def test_a_full_disk_leaves_what_is_finished_and_nothing_half(small_disk):
    store = CodesStore(small_disk / "codes")
    put(store, range(30))
    before = contents(store.root)
    rows = np.arange(100, 20_100)
    with pytest.raises(TlscaleError) as caught:
        store.write_shard(KEY, rows, values_of(rows), SPECS)
    assert f"cannot write 2.2 MiB of codes to '{store.folder(KEY)}': the disk is full" in str(caught.value)
    assert contents(store.root) == before
    assert_right(store.open(KEY, np.arange(30)), range(30))


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    store = CodesStore(tmp_path / "file" / "codes")
    with pytest.raises(TlscaleError, match="cannot write codes to .*: Not a directory"):
        store.try_lock(KEY, 0)
