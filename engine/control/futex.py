"""Waiting on a word of shared memory, and waking those who do: Linux futexes, across processes.

On x86-64 only. There, stores of one core are seen by others in the order in which they were made, which is what lets
plain Python write a message and then its number; other machines pass steps through sockets.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import sys

_FUTEX_CALL = 202
_FUTEX_WAIT, _FUTEX_WAKE = 0, 1
_EVERYONE = 0x7FFFFFFF


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def futexes_work() -> bool:
    """Whether this machine has what this module needs."""
    return sys.platform == "linux" and platform.machine() == "x86_64" and sys.maxsize > 1 << 32


# The system call by its number, as libc has no function for it; it releases the GIL while it waits.
_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long
_syscall.argtypes = (
    ctypes.c_long,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_uint32,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_uint32,
)


def futex_wait(address: int, value: int, timeout_s: float) -> bool:
    """Sleep while the word at `address` is `value`, until woken; False once `timeout_s` has passed."""
    whole = int(timeout_s)
    timeout = _Timespec(whole, int((timeout_s - whole) * 1e9))
    status = _syscall(_FUTEX_CALL, address, _FUTEX_WAIT, value, ctypes.addressof(timeout), None, 0)
    if status == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EAGAIN, errno.EINTR):  # it is another value already; a signal
        return True
    if code == errno.ETIMEDOUT:
        return False
    raise OSError(code, "futex_wait")


def futex_wake(address: int) -> None:
    """Wake all who wait on the word at `address`."""
    if _syscall(_FUTEX_CALL, address, _FUTEX_WAKE, _EVERYONE, None, None, 0) < 0:
        raise OSError(ctypes.get_errno(), "futex_wake")
