"""Files are whole or as before, and their hashes are those of what is on the disk."""

import errno
import hashlib
import json
import os
import pwd

import pytest

from tlscale.errors import TlscaleError
from tlscale.storage.cache import cache_root, make_cache_folder, share_with_group
from tlscale.storage.files import (
    file_sha256,
    flush_and_hash,
    naming_disk_errors,
    naming_file,
    reporting_disk_errors,
    text_sha256,
    write_json,
    write_text,
)


def test_hashes_are_those_of_the_bytes(tmp_path):
    text = "\u00e4\n" * 100_000
    (tmp_path / "a").write_bytes(text.encode())
    expected = hashlib.sha256(text.encode()).hexdigest()
    assert text_sha256(text) == file_sha256(tmp_path / "a") == expected
    assert flush_and_hash(tmp_path / "a") == (300_000, expected)


def test_files_are_whole_or_as_before(tmp_path):
    path = tmp_path / "result.json"
    write_json(path, {"top1": 0.5})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"top1": float("nan")})
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "a\ud800")
    assert json.loads(path.read_text()) == {"top1": 0.5}
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


def test_a_file_that_cannot_be_written_is_named_with_the_way_on(tmp_path):
    target = tmp_path / "result.json"
    target.mkdir()
    with pytest.raises(TlscaleError, match="--resume") as caught, naming_disk_errors(target):
        write_json(target, {"top1": 1.0})
    assert str(target) in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"], "nothing half-written is left"


def test_what_a_disk_raises_without_a_name_gets_one(tmp_path):
    said = r"'.*/a/model' cannot be read or written: Input/output error.*--resume"
    with pytest.raises(TlscaleError, match=said), reporting_disk_errors(), naming_file(tmp_path / "a" / "model"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    with pytest.raises(BrokenPipeError), reporting_disk_errors():  # who reads our output has left
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def test_a_name_that_is_too_long_is_not_the_disks_fault(tmp_path):
    with pytest.raises(TlscaleError) as raised, reporting_disk_errors():
        (tmp_path / ("x" * 300)).stat()
    assert (raised.value.exit_code, raised.value.remedy) == (2, "Give a shorter one")
    assert "the name is too long" in raised.value.problem


@pytest.mark.parametrize("mode", [0o775, 0o755])
def test_a_cache_is_its_groups_where_its_folder_is(tmp_path, mode):
    umask = os.umask(0o022)
    try:
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache").chmod(mode)
        folder = tmp_path / "cache" / "codes" / "locks"
        make_cache_folder(folder)
        make_cache_folder(folder)
        (folder / "file").write_text("")
        share_with_group(folder / "file")
        share_with_group(folder / "gone")
    finally:
        os.umask(umask)
    shared = 0o020 if mode == 0o775 else 0
    made = [folder.parent, folder, folder / "file"]
    assert [path.stat().st_mode & 0o777 for path in made] == [0o755 | shared, 0o755 | shared, 0o644 | shared]


def test_a_cache_whose_name_is_not_utf8_is_an_error(monkeypatch):
    monkeypatch.setenv("TLSCALE_CACHE", "/tmp/caf\udce9")
    with pytest.raises(TlscaleError, match="TLSCALE_CACHE: '/tmp/caf.*' is not UTF-8") as raised:
        cache_root()
    assert raised.value.exit_code == 2


def test_no_home_says_what_to_set(monkeypatch):
    monkeypatch.delenv("TLSCALE_CACHE")
    monkeypatch.delenv("HOME")

    def nobody(number):
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    with pytest.raises(TlscaleError, match="no home folder.*Set TLSCALE_CACHE"):
        cache_root()
