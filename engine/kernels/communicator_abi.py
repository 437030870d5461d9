"""The structs of csrc/include/quire_communicator.h, field for field, and its functions' types."""

from __future__ import annotations

import ctypes

from engine.kernels.abi import Params

_POINTER, _I64, _I32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32

COMMUNICATION_FAILED = 5  # QUIRE_COMMUNICATION_FAILED


class CommunicatorParams(Params):
    _fields_ = [  # noqa: RUF012
        ("size", ctypes.c_uint32),
        ("abi_version", ctypes.c_uint32),
        ("path", ctypes.c_char_p),
        ("timeout_ns", _I64),
        ("join_timeout_ns", _I64),
        ("cancelled", _POINTER),
        ("rank", _I32),
        ("world_size", _I32),
    ]


def declare_communicator(symbols: ctypes.CDLL) -> None:
    """Raises AttributeError if the library is too old to have it."""
    symbols.quire_communicator_join.argtypes = [ctypes.POINTER(CommunicatorParams), ctypes.POINTER(_POINTER)]
    symbols.quire_all_reduce.argtypes = [_POINTER, _POINTER, _I64]
    symbols.quire_gather.argtypes = [_POINTER, _POINTER, _I64, _POINTER]
    for function in (symbols.quire_communicator_abort, symbols.quire_communicator_leave):
        function.argtypes = [_POINTER]
        function.restype = None
