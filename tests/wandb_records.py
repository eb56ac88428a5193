"""Reads a `.wandb` file back: what an offline run of W&B really holds, record by record.

The file is a log in the format of LevelDB's: a header of 7 bytes (`:W&B`, a magic number, a version), then blocks of
32 KiB (the header is in the first). A record is one chunk or several: checksum (CRC-32 of type and payload, plain),
length, type (1 full, 2 first, 3 middle, 4 last), payload. No chunk crosses a block, and a rest of a block that is too
short for a chunk's header is zeros. The payload is W&B's protobuf message `Record`.
"""

import json
import struct
import zlib
from pathlib import Path

HEADER = struct.Struct("<4sHB")
CHUNK = struct.Struct("<IHB")
BLOCK = 32 * 1024
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def payloads(path):
    """The payloads of all records, in order; any damage is an AssertionError."""
    data = Path(path).read_bytes()
    assert len(data) >= HEADER.size, f"{path} is too short"
    ident, magic, version = HEADER.unpack_from(data)
    assert (ident, magic, version) == (b":W&B", 0xBEE1, 0), f"{path} is no W&B log"
    position, parts = HEADER.size, None
    while position < len(data):
        left = BLOCK - position % BLOCK
        if left < CHUNK.size:
            assert not any(data[position : position + left]), f"padding that is not zero at {position}"
            position += left
            continue
        checksum, length, kind = CHUNK.unpack_from(data, position)
        payload = data[position + CHUNK.size : position + CHUNK.size + length]
        assert len(payload) == length, f"a chunk is cut off at {position}"
        assert length <= left - CHUNK.size, f"a chunk leaves its block at {position}"
        assert checksum == zlib.crc32(bytes([kind]) + payload), f"checksum at {position}"
        assert (parts is None) == (kind in (FULL, FIRST)), f"chunk of type {kind} out of order at {position}"
        parts = [*(parts or []), payload]
        if kind in (FULL, LAST):
            yield b"".join(parts)
            parts = None
        position += CHUNK.size + length
    assert parts is None, "the last record is not complete"


def records(path):
    """The `Record` messages of a file."""
    from wandb.proto import wandb_internal_pb2

    return [wandb_internal_pb2.Record.FromString(payload) for payload in payloads(path)]


def _values(items):
    """key -> value of repeated items; a nested key is joined by '.'."""
    return {(".".join(item.nested_key) or item.key): json.loads(item.value_json) for item in items}


class OfflineRun:
    """One `.wandb` file: `run` (message), `config`, `history` (rows in order), `metrics`, `summary`, `exit_code`."""

    def __init__(self, path):
        self.path = Path(path)
        self.records = records(path)
        self.kinds = [record.WhichOneof("record_type") for record in self.records]
        self.run = next(record.run for record in self.records if record.HasField("run"))
        self.config = _values(self.run.config.update)
        self.history = [_values(record.history.item) for record in self.records if record.HasField("history")]
        self.metrics = [record.metric for record in self.records if record.HasField("metric")]
        self.summary = {}
        for record in self.records:
            if record.HasField("summary"):
                self.summary.update(_values(record.summary.update))
        self.exit_code = next((record.exit.exit_code for record in self.records if record.HasField("exit")), None)

    def rows(self):
        """History without W&B's own columns."""
        return [{key: value for key, value in row.items() if not key.startswith("_")} for row in self.history]


def offline_runs(run_dir):
    """All offline segments below a run folder, oldest first."""
    return [OfflineRun(path) for path in sorted(Path(run_dir).glob("wandb/offline-run-*/run-*.wandb"))]
