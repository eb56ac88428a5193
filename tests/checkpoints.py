"""What is on the disk of a run's checkpoints."""

import contextlib
import ctypes
import os
import re
import struct
import sys
from collections import Counter
from contextlib import contextmanager
from functools import partial
from typing import ClassVar

from tlscale.training.checkpoint.files import checkpoint_folder, list_checkpoints, load_checkpoint, load_newest


def newest_valid(root, run_id=None):
    """The folder of the newest checkpoint that can be used, and what is wrong with newer ones."""
    checkpoint, wrong = load_newest(list_checkpoints(root), partial(load_checkpoint, run_id=run_id))
    return None if checkpoint is None else checkpoint_folder(root, checkpoint.step), wrong


# -- who opens their files --------------------------------------------------------------------------------------------

# Of inotify(7), which tells equal events in a row once: what is read or closed in between keeps two openings apart.
_IN_OPEN, _IN_ACCESS, _IN_CLOSE_NOWRITE, _IN_ISDIR = 0x20, 0x1, 0x10, 0x40000000
_MASK = _IN_OPEN | _IN_ACCESS | _IN_CLOSE_NOWRITE


class Reads:
    """Within: files of checkpoints that this process opens to read, however Python does it, as (step, name)."""

    _all: ClassVar[list["Reads"]] = []

    def __enter__(self):
        if not Reads._all:
            sys.addaudithook(Reads._note)  # there is no way to remove one
        Reads._all.append(self)
        self.counts, self._is_on = Counter(), True
        return self

    def __exit__(self, *_):
        self._is_on = False

    @staticmethod
    def _note(event, args):
        if event != "open" or not any(reads._is_on for reads in Reads._all):
            return
        path, _, flags = args
        name = "" if isinstance(path, int) else os.fsdecode(path)
        found = re.search(r"checkpoints/\.?(step_\d+)(?:\.\d+)?/(.+\.(?:safetensors|json))$", name)
        if found and flags & os.O_ACCMODE == os.O_RDONLY:
            for reads in Reads._all:
                if reads._is_on:
                    reads.counts[found[1], found[2]] += 1


@contextmanager
def opens(folder):
    """Within: how often any process opens each file below `folder`, in whatever language: {name: count}."""
    libc, counts = ctypes.CDLL(None, use_errno=True), Counter()
    queue = libc.inotify_init1(os.O_NONBLOCK)
    places = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    watches = {libc.inotify_add_watch(queue, os.fsencode(place), _MASK): place for place in places}
    assert min(watches) > 0, os.strerror(ctypes.get_errno())
    try:
        yield counts
        with contextlib.suppress(BlockingIOError):
            while events := os.read(queue, 2**16):
                _count(events, watches, folder, counts)
    finally:
        os.close(queue)


def _count(events, watches, folder, counts):
    at = 0
    while at < len(events):
        watch, mask, _, length = struct.unpack_from("iIII", events, at)
        name = events[at + 16 : at + 16 + length].rstrip(b"\0").decode()
        at += 16 + length
        if name and mask & _IN_OPEN and not mask & _IN_ISDIR:
            counts[(watches[watch] / name).relative_to(folder).as_posix()] += 1
