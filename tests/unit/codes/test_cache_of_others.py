"""A cache that is shared, read-only or another user's, and codes that go away while a run reads them."""

import os
import pickle
import signal

import pytest
import torch

from tests.forked import GROUP, be, exit_code_of, folder_for_all, obey_permissions, skip_unless_root
from tests.unit.codes.test_store import KEY, OTHERS, assert_right, missing, opened, put, shard_of
from tlscale.codes.store import CodesStore
from tlscale.data.content import ContentIndex
from tlscale.errors import TlscaleError

ROWS = range(100)


@pytest.mark.parametrize("loads", [False, True])
def test_codes_that_are_cut_short_while_they_are_mapped_are_an_error(tmp_path, loads):
    store = CodesStore(tmp_path)
    put(store, ROWS, per_shard=100)
    codes = opened(store, ROWS)
    for path in tmp_path.glob("*/*.0.safetensors"):
        os.truncate(path, 0)

    def read():
        with pytest.raises(TlscaleError, match="cut short.*--resume"):
            codes.load() if loads else codes.take([50])

    assert exit_code_of(read) != -signal.SIGBUS
    assert exit_code_of(read) == 0
    assert opened(store, ROWS) is None
    assert put(store, ROWS), "they are computed again"
    assert_right(opened(store, ROWS), ROWS)


def test_codes_are_read_in_as_many_calls_as_it_takes(tmp_path):
    store = CodesStore(tmp_path)
    put(store, ROWS)
    many = [row % 100 for row in range(3000)]
    codes = opened(store, ROWS)
    taken, few = codes.take(many), codes.take(range(100))
    assert all(torch.equal(one[2900:], other) for one, other in zip(taken, few, strict=True))
    again = pickle.loads(pickle.dumps(codes))
    del codes  # a copy has its own memory
    assert all(torch.equal(one, other) for one, other in zip(again.take(range(100)), few, strict=True))


@pytest.mark.parametrize("mode", [0o2775, 0o755])
def test_a_group_shares_a_cache_whose_folder_it_may_write_to(mode):
    skip_unless_root()
    with folder_for_all() as top:
        root = top / "cache"
        root.mkdir()
        os.chown(root, 20_001, GROUP)
        root.chmod(mode)
        store, index = CodesStore(root / "codes"), ContentIndex(root / "contents.sqlite")
        stamp = [bytes([number]) * 80 for number in range(2)]

        def first():
            put(store, range(20))
            index.add({stamp[0]: b"0" * 32})

        def second():
            assert missing(store, range(20)) == []
            store.release(store.try_lock([KEY], "1" * 16))
            assert put(store, range(40)) == list(range(20, 40))
            index.add({stamp[1]: b"1" * 32})
            assert set(index.look_up(stamp)) == set(stamp)
            assert store.prune("all") > 0

        assert exit_code_of(first, before=lambda: be(20_001)) == 0
        assert (exit_code_of(second, before=lambda: be(20_002)) == 0) == (mode == 0o2775)


def test_codes_of_a_cache_that_is_anothers_are_for_this_run_alone(tmp_path, capfd):
    store = CodesStore(tmp_path / "codes")
    put(store, range(20))
    folders = [tmp_path / "codes", *(tmp_path / "codes").rglob("*/")]

    def use():
        for folder in folders:
            folder.chmod(0o555)
        assert_right(opened(store, range(20)), range(20))
        assert store.spare_root([OTHERS[0]]) == store.spare_root(OTHERS) != store.root
        spare = CodesStore(store.spare_root(OTHERS))
        assert put(spare, range(5)) == list(range(5))
        store.spare.must_cache = True
        with pytest.raises(TlscaleError, match="cannot write codes.*Permission denied.*TLSCALE_CACHE"):
            store.spare_root(OTHERS)

    assert exit_code_of(use, before=obey_permissions) == 0
    said = capfd.readouterr().err
    assert said.count("nothing is cached in") == 1
    assert "Permission denied" in said
    for folder in folders:
        folder.chmod(0o755)
    assert store.spare_root(OTHERS) is None


@pytest.mark.parametrize("what", ["file", "pipe", "circle", "device", "long"])
def test_codes_are_for_this_run_alone_where_no_folder_can_be(what, tmp_path, capfd):
    place = tmp_path / ("x" * 300 if what == "long" else what)
    put_there = {
        "file": place.touch,
        "pipe": lambda: os.mkfifo(place),
        "circle": lambda: place.symlink_to(place),
        "device": lambda: place.symlink_to("/dev/null"),
        "long": lambda: None,
    }
    put_there[what]()
    store = CodesStore(place / "codes")
    spare = CodesStore(store.spare_root([KEY]))
    assert put(spare, range(5)) == list(range(5))
    assert "nothing is cached in" in capfd.readouterr().err
    store.spare.must_cache = True
    with pytest.raises(TlscaleError, match="cannot write codes"):
        store.spare_root([KEY])


def test_a_limit_spares_what_is_anothers(tmp_path):
    store = CodesStore(tmp_path)
    shard_of(store, range(20), OTHERS[0])
    shard_of(store, range(20), OTHERS[1])

    def evict():
        store.folder(OTHERS[0]).chmod(0o555)
        (store.folder(OTHERS[1])).chmod(0o755)
        assert store.prune(0) > 0
        assert missing(store, range(20), OTHERS[0]) == []
        assert missing(store, range(20), OTHERS[1]) != []

    assert exit_code_of(evict, before=obey_permissions) == 0
    store.folder(OTHERS[0]).chmod(0o755)
