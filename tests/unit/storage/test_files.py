"""Files are whole or as before, and their hashes are those of what is on the disk."""

import hashlib
import json

import pytest

from tlscale.errors import TlscaleError
from tlscale.storage.files import file_sha256, flush_and_hash, naming_disk_errors, text_sha256, write_json, write_text


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
