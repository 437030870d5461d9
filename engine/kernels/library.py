"""Finds Quire's kernel libraries and calls them through ctypes.

A library is looked for in the folder that the environment variable QUIRE_LIBRARY_PATH names, or, without it, in
`engine/kernels/lib`, where the build installs it.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import NamedTuple, NoReturn

from engine.errors import ConfigError, QuireError
from engine.kernels import abi, cuda_abi
from engine.kernels.communicator_abi import declare_communicator

LIBRARY_PATH_VARIABLE = "QUIRE_LIBRARY_PATH"
_INSTALLED = Path(__file__).parent / "lib"


class KernelError(QuireError):
    """A kernel was given tensors that do not fit, or failed; the message says which and how."""


class KernelsUnavailableError(ConfigError):
    """The kernels that were asked for cannot run here: no library, or no device for it."""


class KernelLibrary:
    """One loaded library. The functions in `operations` take a filled struct and raise KernelError when they fail.

    Attributes:
        path: the file it was loaded from.
        symbols: the ctypes handle, for what only one library exports.
    """

    def __init__(self, path: Path, symbols: ctypes.CDLL) -> None:
        self.path = path
        self.symbols = symbols
        symbols.quire_last_error.restype = ctypes.c_char_p
        symbols.quire_backend_name.restype = ctypes.c_char_p
        self._functions = {}
        own = cuda_abi.OPERATIONS if symbols.quire_backend_name() == b"cuda" else {}
        for name, params in (abi.OPERATIONS | own).items():
            function = getattr(symbols, f"quire_{name}")
            function.argtypes = [ctypes.POINTER(params)]
            function.restype = ctypes.c_int
            self._functions[name] = function
        symbols.quire_paged_attention_workspace.argtypes = [
            ctypes.POINTER(abi.PagedAttentionParams),
            ctypes.POINTER(ctypes.c_int64),
        ]
        symbols.quire_paged_attention_workspace.restype = ctypes.c_int

        self._declare_decoder()

    def call(self, operation: str, params: abi.Params) -> None:
        """Run an operation of `abi.OPERATIONS`, or on CUDA of `cuda_abi.OPERATIONS`; a status other than OK becomes a
        KernelError."""
        if self._functions[operation](params):
            self.raise_last_error(operation)

    def _declare_decoder(self) -> None:
        """The functions of quire_decoder.h and quire_communicator.h, which only the CPU library has. ctypes' defaults
        fit the decoder's arguments, but for the handle."""
        if self.symbols.quire_backend_name() == b"cpu":
            self.symbols.quire_decoder_step.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
            self.symbols.quire_decoder_set_adapter.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
            self.symbols.quire_decoder_destroy.argtypes = [ctypes.c_void_p]
            self.symbols.quire_decoder_destroy.restype = None
            declare_communicator(self.symbols)

    def attention_workspace(self, params: abi.PagedAttentionParams) -> int:
        """Bytes of scratch that paged_attention needs for these shapes."""
        needed = ctypes.c_int64()
        if self.symbols.quire_paged_attention_workspace(params, ctypes.byref(needed)):
            self.raise_last_error("paged_attention_workspace")
        return needed.value

    def last_error(self) -> str:
        """What was wrong with this thread's last call that failed."""
        message: bytes = self.symbols.quire_last_error()
        return message.decode()

    def raise_last_error(self, operation: str) -> NoReturn:
        raise KernelError(f"{operation} ({self.path.name}): {self.last_error()}")


class Loaded(NamedTuple):
    """A library, or the reason why there is none."""

    library: KernelLibrary | None
    reason: str


def load_library(name: str) -> Loaded:
    """Load `libquire_<name>.so` once for this process.

    Returns:
        The library, or None and a one-line reason: no file, or one that does not load (a missing driver).

    Raises:
        ConfigError: QUIRE_LIBRARY_PATH names no folder, or the library's ABI is not this package's.
    """
    override = os.environ.get(LIBRARY_PATH_VARIABLE)
    if override is not None and not Path(override).is_dir():
        raise ConfigError(f"{LIBRARY_PATH_VARIABLE}={override!r} is not a folder")
    return _load(Path(override) if override is not None else _INSTALLED, name)


@cache
def _load(folder: Path, name: str) -> Loaded:
    path = folder / f"libquire_{name}.so"
    if not path.is_file():
        return Loaded(None, f"{path} does not exist; build it with `cmake` from csrc")
    try:
        symbols = ctypes.CDLL(str(path))
        version, backend = symbols.quire_abi_version, symbols.quire_backend_name
    except (OSError, AttributeError) as error:
        return Loaded(None, f"{path} does not load: {error}")
    if version() != abi.ABI_VERSION:
        raise ConfigError(f"{path} has ABI version {version()}, this package needs {abi.ABI_VERSION}: build it again")
    backend.restype = ctypes.c_char_p
    if backend().decode() != name:
        raise ConfigError(f"{path} calls itself {backend().decode()!r}, not {name!r}")
    try:
        return Loaded(KernelLibrary(path, symbols), "")
    except AttributeError as error:
        raise ConfigError(f"{path} is older than this package: build it again ({error})") from error
