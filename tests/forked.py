"""A call in a fork of this process, as another user or with less rights: what it does to itself stays there."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

GROUP = 22_222


def exit_code_of(call: Callable[[], object], *, before: Callable[[], object] = lambda: None) -> int:
    """Call it in a fork: 0, 1 where it raised, or minus the signal that ended it."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            before()
            call()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def obey_permissions() -> None:
    """Let modes of files hold for this process, if it is root's too."""
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.capget(header, sets) == 0, os.strerror(ctypes.get_errno())
    for number in range(3):  # effective, permitted, inheritable
        sets[number] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, sets) == 0, os.strerror(ctypes.get_errno())


def be(user: int) -> None:
    """Become another user, one of `GROUP`, with the umask that most have."""
    os.setgroups([GROUP])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    os.umask(0o022)


def skip_unless_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")


@contextmanager
def folder_for_all() -> Iterator[Path]:
    """A folder that every user may enter, unlike pytest's."""
    folder = Path(tempfile.mkdtemp(prefix="tlscale-users-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)
