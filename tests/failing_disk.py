"""Let one operation on files fail as a disk would make it fail: any process, native code too, without a compiler.

A seccomp filter hands each system call that changes files to a supervisor, a process of its own, which counts those on
paths below some folders and answers the chosen one with an error in the kernel's place. Linux on x86-64, 5.5 or newer.
"""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import json
import os
import platform
import select
import signal
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ERRNOS = ("EIO", "ENOSPC", "EDQUOT", "EROFS")

# Name -> (number on x86-64, how it names its file). "fd 0": argument 0 is an open file; "path 0": a path; "at 0":
# argument 0 is a folder and 1 a path below it.
_CALLS = {
    "open": (2, "path 0"),
    "openat": (257, "at 0"),
    "creat": (85, "path 0"),
    "write": (1, "fd 0"),
    "pwrite64": (18, "fd 0"),
    "writev": (20, "fd 0"),
    "pwritev": (296, "fd 0"),
    "sendfile": (40, "fd 0"),
    "copy_file_range": (326, "fd 2"),
    "mmap": (9, "fd 4"),
    "fsync": (74, "fd 0"),
    "fdatasync": (75, "fd 0"),
    "truncate": (76, "path 0"),
    "ftruncate": (77, "fd 0"),
    "fallocate": (285, "fd 0"),
    "rename": (82, "path 0"),
    "renameat": (264, "at 0"),
    "renameat2": (316, "at 0"),
    "mkdir": (83, "path 0"),
    "mkdirat": (258, "at 0"),
    "rmdir": (84, "path 0"),
    "unlink": (87, "path 0"),
    "unlinkat": (263, "at 0"),
    "link": (86, "path 1"),
    "linkat": (265, "at 2"),
    "symlink": (88, "path 1"),
    "symlinkat": (266, "at 1"),
    "chmod": (90, "path 0"),
    "fchmod": (91, "fd 0"),
    "fchmodat": (268, "at 0"),
    "utimensat": (280, "at 0"),
}
_NAMES = {number: name for name, (number, _) in _CALLS.items()}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_MAP_SHARED, _PROT_WRITE = 1, 2

_NOTIFICATION, _ANSWER = struct.Struct("=QIIiIQ6Q"), struct.Struct("=QqiI")
_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_CONTINUE = 1
_LOAD, _IF_EQUAL, _IF_ANY, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _NOTIFY = 0x7FFF0000, 0x7FC00000
_AUDIT_X86_64 = 0xC000003E


@dataclass(frozen=True)
class Failing:
    """Choose the operation that fails.

    Attributes:
        within: folders; operations on other files are not counted.
        at: which operation, from 1; 0: none, they are only counted.
        name: of the error, such as ENOSPC.
        lasting: all later ones fail too, as on a disk that is full or was mounted read-only.
    """

    within: Sequence[str]
    at: int = 0
    name: str = "EIO"
    lasting: bool = False


def fail_here(failing: Failing, trace: Path) -> None:
    """Let this process, and all that it starts, meet the failure; `read_trace` gives what was counted."""
    ours, its = socket.socketpair()
    if os.fork() == 0:
        try:
            ours.close()
            _supervise(_received_file(its), failing, trace)
        finally:
            os._exit(0)
    its.close()
    listener = _listen()
    ours.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [listener]))])
    os.close(listener)
    ours.close()


def read_trace(trace: Path) -> list[tuple[str, str, bool]]:
    """Read the operations that were counted: name of the call, path, whether it failed."""
    return [tuple(json.loads(line)) for line in trace.read_text().splitlines()]


def why_not_here() -> str | None:
    """Return why no operation can be made to fail here; None where it can."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "the failing disk needs Linux on x86-64"
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(_listen())
            code = 0
        finally:
            os._exit(code)
    return None if os.waitpid(pid, 0)[1] == 0 else "seccomp gives no listener here"


# --- In the process that is to fail -----------------------------------------------------------------------------------


def _listen() -> int:
    """Install the filter; return the file that its supervisor reads."""
    program = b"".join(struct.pack("=HBBI", *instruction) for instruction in _filter())
    content = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(content))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    listener = libc.syscall(317, 1, 8, ctypes.c_char_p(header))  # seccomp(SET_MODE_FILTER, NEW_LISTENER, ...)
    if listener < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    return int(listener)


def _filter() -> list[tuple[int, int, int, int]]:
    """Return the filter's program: code, steps to skip if true and if false, constant."""

    def argument(number: int) -> tuple[int, int, int, int]:
        return _LOAD, 0, 0, 16 + 8 * number

    program = [(_LOAD, 0, 0, 4), (_IF_EQUAL, 1, 0, _AUDIT_X86_64), (_RETURN, 0, 0, _ALLOW), (_LOAD, 0, 0, 0)]
    for name, (number, _) in _CALLS.items():
        if name in ("open", "openat"):
            body = [argument(1 if name == "open" else 2), (_IF_ANY, 0, 1, _WRITES)]
        elif name == "mmap":
            # Shared and to be written into.
            body = [argument(2), (_IF_ANY, 0, 3, _PROT_WRITE), argument(3), (_IF_ANY, 0, 1, _MAP_SHARED)]
        else:
            body = []
        body += [(_RETURN, 0, 0, _NOTIFY), (_RETURN, 0, 0, _ALLOW)]
        program += [(_IF_EQUAL, 0, len(body), number), *body]
    return [*program, (_RETURN, 0, 0, _ALLOW)]


# --- The supervisor ---------------------------------------------------------------------------------------------------


def _received_file(its: socket.socket) -> int:
    _, ancillary, _, _ = its.recvmsg(1, socket.CMSG_SPACE(4))
    return int(array.array("i", ancillary[0][2])[0])


def _supervise(listener: int, failing: Failing, trace: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    within, count = tuple(failing.within), 0
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    with trace.open("w", buffering=1) as written:
        while True:
            events = poll.poll()[0][1]
            if not events & select.POLLIN:
                return  # the last process of the filter has ended
            request = bytearray(_NOTIFICATION.size)
            try:
                fcntl.ioctl(listener, _RECEIVE, request)
            except OSError:
                continue  # it was killed meanwhile
            number, pid, _, call, _, _, *arguments = _NOTIFICATION.unpack(request)
            path = _path_of(pid, call, arguments)
            fails = False
            if path.startswith(within):
                count += 1
                fails = failing.at > 0 and (count == failing.at or (failing.lasting and count > failing.at))
                written.write(json.dumps([_NAMES[call], path, fails]) + "\n")
            error, flags = (-getattr(errno, failing.name), 0) if fails else (0, _CONTINUE)
            try:
                fcntl.ioctl(listener, _SEND, bytearray(_ANSWER.pack(number, 0, error, flags)))
            except OSError:
                continue


def _path_of(pid: int, call: int, arguments: Sequence[int]) -> str:
    """Return the absolute path of what a call changes; empty where it has none."""
    how, at = _CALLS[_NAMES[call]][1].split()
    first = arguments[int(at)]
    try:
        if how == "fd":
            return _file_of(pid, first)
        path = _text(pid, first if how == "path" else arguments[int(at) + 1])
        base = os.readlink(f"/proc/{pid}/cwd") if how == "path" or _signed(first) == -100 else _file_of(pid, first)
        return os.path.normpath(os.path.join(base, path))
    except OSError:
        return ""


def _signed(number: int) -> int:
    return ctypes.c_int(number & 0xFFFFFFFF).value


def _file_of(pid: int, descriptor: int) -> str:
    return os.readlink(f"/proc/{pid}/fd/{_signed(descriptor)}") if _signed(descriptor) >= 0 else ""


def _text(pid: int, address: int) -> str:
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        memory.seek(address)
        # Not more than there is of its page: the next one need not exist.
        content = memory.read(4096 - address % 4096)
        while b"\0" not in content:
            content += memory.read(4096)
    return os.fsdecode(content.split(b"\0", 1)[0])
