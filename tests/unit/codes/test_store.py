"""The store of codes: what is read is what was written, to the last bit, or it is not there."""

import hashlib
import json
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
from tlscale.codes.store import CodesStore
from tlscale.data.content import digest_array
from tlscale.errors import DataError, TlscaleError

SPECS = (ValueSpec("layer3", (2, 3, 4), "float32", True), ValueSpec("penultimate", (5,), "bfloat16", False))
KEY = CodesKey(
    weights="w",
    transform={"image_size": 32},
    layers=("layer3", "penultimate"),
    pools=("as is", "as is"),
    dtype="auto",
    compute={},
    versions={"torch": torch.__version__},
)
OTHERS = [replace(KEY, weights=f"w {number}") for number in range(4)]


REQUEST = "0" * 16


def ids_of(rows) -> np.ndarray:
    """What stands for the contents of these images."""
    return digest_array([hashlib.sha256(str(int(row)).encode()).digest() for row in rows])


def shard_of(store, rows, key=KEY, specs=SPECS, values=None, request=REQUEST):
    """Write a shard of these rows."""
    return store.write_shard(key, ids_of(rows), values or values_of(rows, specs), specs, request)


def missing(store, rows, key=KEY) -> list[int]:
    """Which of these rows the store lacks."""
    return [row for row in rows if store.open(key, ids_of([row])) is None]


def opened(store, rows, key=KEY, **keys):
    return store.open(key, ids_of(rows), **keys)


def values_of(rows, specs=SPECS) -> tuple[torch.Tensor, ...]:
    """What stands for the codes of these rows: each row has its own values."""
    made = []
    for spec in specs:
        numel = int(np.prod(spec.shape, dtype=int))
        flat = torch.tensor(np.asarray(rows)[:, None] * 7.0 + np.arange(numel)) % 251
        made.append(flat.reshape(len(rows), *spec.shape).to(spec.torch_dtype))
    return tuple(made)


def put(store, rows, key=KEY, specs=SPECS, per_shard=10):
    """Write what is missing of these rows, as an extraction would; which those are."""
    rows = sorted(set(map(int, rows)))
    there = store.take_inventory(key, ids_of(rows), REQUEST).has(ids_of(rows))
    lost = [row for row, is_there in zip(rows, there, strict=True) if not is_there]
    for start in range(0, len(lost), per_shard):
        shard_of(store, lost[start : start + per_shard], key, specs)
    return lost


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
        assert set(missing(store, rows)) == set(rows) - there
        assert (opened(store, rows) is None) == bool(set(rows) - there)
        assert set(put(store, rows, per_shard=per_shard)) == set(rows) - there
        there |= set(rows)
        assert_right(opened(store, rows), rows)
    everything = sorted(there)
    assert_right(opened(store, everything, KEY), everything)
    assert sum(entry.num_rows for entry in store.entries()) == len(there)  # none is kept twice


def test_what_is_asked_for_says_what_it_is(store):
    put(store, range(25))
    codes = opened(store, [20, 3, 7], KEY)
    assert (len(codes), codes.values) == (3, SPECS)
    assert codes.row_bytes == 2 * 3 * 4 * 4 + 5 * 2
    assert codes.num_bytes == 3 * codes.row_bytes
    assert codes.path == store.folder(KEY)
    assert codes.num_computed == 0


def test_no_images_are_refused(store):
    with pytest.raises(DataError, match="of no image"):
        store.open(KEY, ids_of([]))


def test_an_image_may_be_asked_for_several_times(store):
    put(store, range(5))
    assert_right(opened(store, [3, 1, 3, 3]), [3, 1, 3, 3])


def test_addresses_that_end_in_zeros_are_told_apart(store):
    """NumPy drops zero bytes at the end of items."""
    ids = digest_array([bytes([1]) * 31 + b"\0", bytes([1]) * 30 + b"\0\0", bytes([1]) * 32, bytes(32)])
    store.write_shard(KEY, ids, values_of(range(4)), SPECS, REQUEST)
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        assert_right(store.open(KEY, ids[order]), order)


@pytest.mark.parametrize("positions", [[3], [-1], [0, 1, 2, 3]])
def test_positions_out_of_range_are_refused(store, positions):
    put(store, range(3))
    codes = opened(store, range(3), KEY)
    for some in (codes, codes.load()):
        with pytest.raises(IndexError):
            some.take(np.array(positions))


def test_no_positions_are_no_values(store):
    put(store, range(3))
    codes = opened(store, range(3), KEY)
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
    shard_of(store, range(20), key, specs, (values,))
    codes = opened(store, range(20), key)
    for some in (codes, codes.load()):
        (got,) = some.take(np.arange(20))
        assert got.dtype == values.dtype
        # As bytes: random bits have NaNs among them.
        assert got.contiguous().unsqueeze(-1).view(torch.uint8).tolist() == raw.tolist()


def test_the_memory_order_is_the_networks(store):
    put(store, range(30))
    codes = opened(store, range(30))
    for some in (codes, codes.load()):
        for count in (1, 7):
            maps, vectors = some.take(np.arange(count))
            assert maps.is_contiguous(memory_format=torch.channels_last)
            assert not maps.is_contiguous()
            assert vectors.is_contiguous()


def test_what_is_taken_may_be_overwritten(store):
    put(store, range(30))
    before = contents(store.root)
    codes = opened(store, range(30))
    for some in (codes, codes.load()):
        for value in some.take(np.arange(30)):
            value.fill_(99)
        assert_right(some, range(30))
    assert contents(store.root) == before


def test_codes_that_were_read_into_memory_need_no_file(store):
    put(store, range(30))
    loaded = opened(store, range(5, 25), KEY).load()
    shutil.rmtree(store.root)
    assert_right(loaded, range(5, 25))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_what_is_mapped_outlives_its_removal_and_keeps_no_file_open(store):
    put(store, range(40), per_shard=1)
    before = len(os.listdir("/proc/self/fd"))
    codes = opened(store, range(40))
    assert len(os.listdir("/proc/self/fd")) == before  # thousands of shards would meet the limit of open files
    assert store.prune("all") > 0
    assert opened(store, range(40)) is None
    assert_right(codes, range(40))


def test_the_size_of_shards():
    assert rows_per_shard(1) == 4096
    assert rows_per_shard(8192) == 4096
    assert rows_per_shard(8193) == 2048
    assert rows_per_shard(2**30) == BLOCK
    assert {rows_per_shard(2**power) % BLOCK for power in range(32)} == {0}


def test_the_cache_folder_is_the_environments(monkeypatch, tmp_path):
    monkeypatch.setenv("TLSCALE_CACHE", str(tmp_path / "cache"))
    assert CodesStore().root == tmp_path / "cache" / "codes"
    monkeypatch.delenv("TLSCALE_CACHE")
    assert CodesStore().root == Path.home() / ".cache" / "tlscale" / "codes"


def test_a_shard_that_is_written_again_is_not_changed_under_its_readers(store):
    put(store, range(10))
    codes = opened(store, range(10))
    shard_of(store, range(10), values=tuple(value + 1 for value in values_of(range(10))))
    assert_right(codes, range(10))
    assert torch.equal(opened(store, range(10)).take([3])[1], values_of([3])[1] + 1)


def test_another_key_finds_nothing(store):
    put(store, range(10))
    assert opened(store, range(10), replace(KEY, weights="other")) is None


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
NUM_FILES = 3 * 4  # three shards of four files


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_of_any_file_is_found_and_never_read(tmp_path, damage):
    store = CodesStore(tmp_path)
    put(store, range(30))
    sound = contents(store.folder(KEY))
    assert len(sound) == NUM_FILES
    assert store.verify() == []
    for name in sound:
        damage(store.folder(KEY) / name)
        said: list[str] = []
        assert opened(store, range(30), say=said.append) is None, name
        lost = name.endswith(".json") and damage is os.unlink  # a shard that was never finished looks so
        assert bool(said) != lost, name
        assert len(store.verify()) == (0 if lost else 1), name
        assert all(str(store.folder(KEY)) in line for line in store.verify())
        assert len(put(store, range(30))) == 10, name
        assert contents(store.folder(KEY)) == sound, name
        assert store.verify() == []
        assert_right(opened(store, range(30)), range(30))


def test_damage_in_a_shard_costs_only_its_rows(store):
    put(store, range(30))
    damaged = next(path for path in store.folder(KEY).glob("*.0.safetensors"))
    flip(damaged)
    lost = missing(store, range(30))
    assert len(lost) == 10
    others = np.setdiff1d(np.arange(30), lost)
    assert_right(opened(store, others), others)
    assert_right(opened(store, others[::-1]), others[::-1])
    assert put(store, others[:3]) == []  # does not touch it
    assert missing(store, range(30)) == lost


def test_without_verification_sizes_are_looked_at(store):
    put(store, range(30))
    path = next(store.folder(KEY).glob("*.0.safetensors"))
    flip(path)
    assert opened(store, range(30), KEY, verify=False) is not None
    truncate(path)
    assert opened(store, range(30), KEY, verify=False) is None


def swap(one: Path, other: Path):
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


@pytest.mark.parametrize("suffix", [".0.safetensors", ".1.safetensors", ".ids.safetensors", ".json"])
def test_files_of_two_shards_that_were_swapped(store, suffix):
    put(store, range(30))
    names = sorted(store.folder(KEY).glob(f"*{suffix}"))
    swap(names[0], names[1])
    assert len(store.verify()) == 2
    assert opened(store, range(30)) is None
    assert len(put(store, range(30))) == 20
    assert_right(opened(store, range(30)), range(30))
    assert store.verify() == []


def test_entries_that_were_swapped_are_not_mistaken_for_one_another(store):
    put(store, range(30), OTHERS[0])
    put(store, range(30), OTHERS[1])
    swap(store.folder(OTHERS[0]), store.folder(OTHERS[1]))
    assert len(store.verify()) == 6
    for key in OTHERS[:2]:
        said: list[str] = []
        assert opened(store, range(30), key, say=said.append) is None
        assert "belongs to other codes" in said[0]
    assert len(put(store, range(30), OTHERS[0])) == 30  # nor are their shards, which have the same rows


def test_a_shard_of_another_entry_is_not_taken_over(store):
    put(store, range(10), OTHERS[0])
    shutil.copytree(store.folder(OTHERS[0]), store.folder(OTHERS[1]))
    said: list[str] = []
    inventory = store.take_inventory(OTHERS[1], ids_of(range(10)), REQUEST, said.append)
    assert not inventory.has(ids_of(range(10))).any()
    assert inventory.values == ()
    assert len(said) == 1
    assert put(store, range(10), OTHERS[1]) == list(range(10))
    assert_right(opened(store, range(10), OTHERS[1]), range(10))


# --- Writers that were killed -----------------------------------------------------------------------------------------


def test_what_killed_writers_left_is_removed_and_what_they_finished_is_used(store):
    for rows in (range(10), range(20, 30)):
        shard_of(store, rows)
    draft = f".{REQUEST}.0123.0.safetensors"
    for name in ("0123.0.safetensors", draft, ".0123.json.77", ".ffff.0123.0.safetensors"):
        (store.folder(KEY) / name).write_bytes(b"half")
    held = store.try_lock([KEY], "ffff")  # another is at work on other images
    assert_right(opened(store, range(10)), range(10))
    assert store.verify() == []
    (entry,) = store.entries()
    assert (entry.complete, entry.num_rows, entry.key) == (True, 20, KEY.to_plain())
    assert put(store, range(30)) == list(range(10, 20))
    assert_right(opened(store, range(30)), range(30))
    assert [path.name for path in store.folder(KEY).glob(".*")] == [".ffff.0123.0.safetensors"]
    store.release(held)
    assert put(store, range(30)) == []
    clean = CodesStore(store.root.parent / "clean")
    put(clean, range(30))
    assert contents(store.folder(KEY)) == contents(clean.folder(KEY))


def test_finished_shards_of_a_larger_request_serve_a_smaller_one(store):
    shard_of(store, range(10))
    assert put(store, range(5, 15)) == list(range(10, 15))
    assert_right(opened(store, range(15)), range(15))


def test_shards_of_other_values_are_not_mixed_in(store):
    put(store, range(20))
    wider = (replace(SPECS[0], shape=(2, 3, 5)), SPECS[1])
    shard_of(store, range(20, 30), specs=wider)
    assert len(put(store, range(30))) == 10
    assert_right(opened(store, range(30)), range(30))


def test_another_writer_of_the_same_shard_changes_nothing(store):
    put(store, range(10))
    before = {path: path.stat().st_ino for path in store.folder(KEY).iterdir()}
    shard_of(store, range(10), request="1" * 16)
    assert {path: path.stat().st_ino for path in store.folder(KEY).iterdir()} == before


# --- Locks ------------------------------------------------------------------------------------------------------------


def test_who_wants_other_images_of_an_entry_does_not_wait(store):
    one, other = store.try_lock([KEY], "a"), store.try_lock([KEY, OTHERS[0]], "b")
    assert one is not None
    assert other is not None
    assert store.try_lock([KEY], "a") is None
    assert store.try_lock([OTHERS[1], OTHERS[0]], "b") is None
    again = store.try_lock([OTHERS[1]], "b")  # nothing is held by who did not get all
    for locks in (one, other, again):
        store.release(locks)
    assert [path for path in (store.root / "locks").iterdir() if "." in path.name] == []


# --- Room -------------------------------------------------------------------------------------------------------------


def use_in_order(store, *keys):
    """As if they had been used in this order, a while ago."""
    for second, key in enumerate(keys):
        for path in store.folder(key).glob("*.json"):
            os.utime(path, (1e9 + second, 1e9 + second))


def there(store):
    return [key for key in OTHERS if store.folder(key).is_dir()]


def test_what_was_not_used_for_longest_goes_first(store):
    for key in OTHERS:
        put(store, range(10), key)
    use_in_order(store, OTHERS[2], OTHERS[0], OTHERS[3], OTHERS[1])
    assert [entry.digest for entry in store.entries()] == [OTHERS[i].digest() for i in (1, 3, 0, 2)]
    assert opened(store, range(3), OTHERS[2]) is not None  # which uses it
    assert store.entries()[0].digest == OTHERS[2].digest()
    size = store.entries()[0].num_bytes
    store.limit_bytes = round(4.5 * size)
    store.make_room(size, ())
    assert there(store) == OTHERS[1:]
    store.make_room(2 * size, ())
    assert there(store) == [OTHERS[1], OTHERS[2]]


def test_an_entry_that_outgrows_the_limit_loses_its_own_shards_that_were_not_used_for_longest(store):
    put(store, range(40))
    size = store.entries()[0].num_bytes // 4
    for number, path in enumerate(sorted(store.folder(KEY).glob("*.json"))):
        os.utime(path, (1e9 + number, 1e9 + number))
    names = sorted(path.stem for path in store.folder(KEY).glob("*.json"))
    store.limit_bytes = round(4.5 * size)
    store.make_room(2 * size, {(KEY.digest(), names[0])}, REQUEST)
    assert sorted(path.stem for path in store.folder(KEY).glob("*.json")) == [names[0], names[3]]
    assert len(missing(store, range(40))) == 20
    assert store.verify() == []


def test_an_entry_that_is_being_written_is_not_evicted(store):
    for key in OTHERS[:3]:
        put(store, range(30), key)
    use_in_order(store, *OTHERS[:3])
    locks = store.try_lock([OTHERS[0]], REQUEST)
    said: list[str] = []
    assert store.try_lock([OTHERS[0]], REQUEST) is None
    assert store.prune(store.entries()[0].num_bytes, said.append) > 0
    assert there(store) == [OTHERS[0]]
    assert "being written" in said[0]
    assert store.prune("all") == 0
    store.release(locks)
    assert store.prune("all") > 0
    assert there(store) == []


def test_codes_over_the_limit_are_refused_and_nothing_is_removed(store):
    put(store, range(30), OTHERS[0])
    store.limit_bytes = 10_000_000
    with pytest.raises(TlscaleError, match=r"codes.cache_gib: .*need 19.1 MiB, but all codes may take 9.5 MiB"):
        store.check_room(20_000_000, 0)
    assert there(store) == [OTHERS[0]]


def test_codes_that_the_disk_has_no_room_for_are_refused(store):
    with pytest.raises(TlscaleError, match=r"need 1048576.0 GiB in '.*', but that disk has .* left"):
        store.check_room(0, 2**50)


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
    assert missing(store, range(3)) == [0, 1, 2]
    assert not (tmp_path / "none").exists()


# --- A disk that does not take it -------------------------------------------------------------------------------------


def test_a_full_disk_leaves_what_is_finished_and_nothing_half(small_disk):
    store = CodesStore(small_disk / "codes")
    put(store, range(30))
    before = contents(store.root)
    rows = np.arange(100, 20_100)
    with pytest.raises(TlscaleError) as caught:
        shard_of(store, rows)
    assert f"cannot write 2.6 MiB of codes to '{store.folder(KEY)}': the disk is full" in str(caught.value)
    assert contents(store.root) == before
    assert_right(opened(store, range(30)), range(30))


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    store = CodesStore(tmp_path / "file" / "codes")
    with pytest.raises(TlscaleError, match="cannot write codes to .*: Not a directory"):
        store.try_lock([KEY], REQUEST)


# --- What an older version kept ---------------------------------------------------------------------------------------


def put_older(store, digest="a" * 64, *, has_manifest=True) -> Path:
    """As the first format had it; without a manifest as the second had it."""
    folder = store.root / digest
    folder.mkdir(parents=True)
    (folder / ("0123.rows.npy" if has_manifest else "0123.ids.npy")).write_bytes(bytes(100))
    (folder / "0123.json").write_text(json.dumps({"key": {"data": "x"}, "shard": {"name": "0123", "num_rows": 7}}))
    if has_manifest:
        (folder / "manifest.json").write_text(json.dumps({"key": {"data": "x"}, "shards": [{"num_rows": 7}]}))
        (folder / "used").touch()
        os.utime(folder / "used", (1e9, 1e9))
    return folder


@pytest.mark.parametrize("has_manifest", [True, False])
def test_an_entry_of_an_older_format_is_shown_and_removed_and_never_read(store, has_manifest):
    folder = put_older(store, has_manifest=has_manifest)
    put(store, range(10))
    newer, older = store.entries() if has_manifest else sorted(store.entries(), key=lambda entry: entry.is_older)
    assert (newer.is_older, older.is_older, older.path) == (False, True, folder)
    assert older.num_rows == (7 if has_manifest else 0)
    assert store.verify() == []
    if has_manifest:
        store.limit_bytes = older.num_bytes + newer.num_bytes
        store.make_room(1, ())  # it was not used for longest
    else:
        store.prune(["aaaa"])
    assert not folder.exists()
    assert_right(opened(store, range(10)), range(10))
