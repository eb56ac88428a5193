"""`metrics.jsonl`: the log of a run, one JSON object a line, and the truth that trackers have a copy of.

Promise: a record that was written is there after the writer was killed, and after a power loss if `sync` was called
since; a resumed run goes on where its checkpoint was, so that no step is in the file twice.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tlscale.storage import faults
from tlscale.storage.files import flush, naming_disk_errors

_RECORD_KEYS = ("kind", "step", "epoch", "images_seen", "time_s")


class MetricsFile:
    """Write one JSON object a line, each flushed when it is written.

    JSON has no NaN and no infinity: these are written as the strings "NaN", "Infinity" and "-Infinity", which
    `float()` reads back.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._aside = path.with_name(path.name + ".tmp")
        with naming_disk_errors(path):
            self._aside.unlink(missing_ok=True)  # of a writer that was killed
            self._file = path.open("a", encoding="utf-8")
            flush(path.parent)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record; it has at least kind ('train' or 'evaluate'), step, epoch, images_seen and time_s.

        Raises:
            TlscaleError: the file cannot be written (the disk is full).
        """
        missing = [key for key in _RECORD_KEYS if key not in record]
        assert not missing, f"a record without {missing}"
        with naming_disk_errors(self._path):
            self._file.write(json.dumps(_spell_non_finite(record), ensure_ascii=False, allow_nan=False) + "\n")
            faults.at("metrics.line")
            self._file.flush()

    def sync(self) -> None:
        """Force what was written to the disk: before a checkpoint is saved that begins after it.

        Raises:
            TlscaleError: the disk fails.
        """
        with naming_disk_errors(self._path):
            os.fsync(self._file.fileno())

    def truncate_after(self, step: int, *, owes_evaluation: bool = False) -> dict[str, int]:
        """Drop what a resumed run does again: records after `step`, and lines that a killed writer left torn.

        Args:
            step: the last one that is done.
            owes_evaluation: drop the evaluation after it, too.

        Returns:
            kind -> the last step that the file held before; give it to `open_trackers` as `seen`.
        """
        lines = self._path.read_bytes().splitlines(keepends=True)
        records = [_parse_record(line) for line in lines]
        last_steps: dict[str, int] = {}
        for record in records:
            if record is not None:
                kind = str(record.get("kind"))
                last_steps[kind] = max(last_steps.get(kind, -1), record["step"])
        owed = ("evaluate", step) if owes_evaluation else None
        kept = [
            line
            for line, record in zip(lines, records, strict=True)
            if record and record["step"] <= step and (record.get("kind"), record["step"]) != owed
        ]
        if len(kept) < len(lines):
            with naming_disk_errors(self._path):
                self._replace(b"".join(kept))
        return last_steps

    def _replace(self, content: bytes) -> None:
        """Put `content` in the file's place at once, so that a crash leaves the old file or the new one."""
        self._file.close()
        aside = self._aside
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        faults.at("metrics.cut")
        aside.replace(self._path)
        flush(self._path.parent)
        self._file = self._path.open("a", encoding="utf-8")

    def close(self) -> None:
        # All that was written was flushed; what is left failed in `write`, and was said there.
        with contextlib.suppress(OSError):
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a `metrics.jsonl`, in order, without torn lines."""
    records = (_parse_record(line) for line in path.read_bytes().splitlines(keepends=True))
    return [record for record in records if record is not None]


def _parse_record(line: bytes) -> dict[str, Any] | None:
    """Return a record, or None for a torn line: one without its end, or that is no record."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _spell_non_finite(value: Any) -> Any:  # noqa: ANN401 (JSON has no narrower type)
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: _spell_non_finite(item) for key, item in value.items()}
    return [_spell_non_finite(item) for item in value] if isinstance(value, list | tuple) else value
