"""The CPU kernels of csrc/cpu (libquire_cpu.so)."""

from __future__ import annotations

import ctypes

from engine.errors import ConfigError
from engine.kernels.library import KernelsUnavailableError, load_library
from engine.kernels.native import NativeBackend


class CpuBackend(NativeBackend):
    """Kernels for scalar, AVX2 and AVX-512 machines; float32 and bfloat16.

    A row's result is bitwise the same whatever its batch, chunk and `num_threads`.

    Args:
        num_threads: threads of one call, the caller's included.

    Raises:
        KernelsUnavailableError: the library is not there, with the reason.
        ConfigError: num_threads is below 1, the library belongs to another version, or QUIRE_CPU_ISA names what the
            machine does not have.
    """

    name = "cpu"

    def __init__(self, num_threads: int) -> None:
        if num_threads < 1:
            raise ConfigError(f"num_threads={num_threads} must be at least 1")
        library, reason = load_library("cpu")
        if library is None:
            raise KernelsUnavailableError(f"the cpu kernels are not available: {reason}")
        super().__init__(library, "cpu", num_threads)
        library.symbols.quire_cpu_isa.restype = ctypes.c_char_p
        if not self.isa:
            raise ConfigError(f"QUIRE_CPU_ISA: {library.last_error()}")

    @property
    def isa(self) -> str:
        """The instruction set in use: "scalar", "avx2", "avx512" or "avx512_bf16"; QUIRE_CPU_ISA forces one."""
        name: bytes = self.library.symbols.quire_cpu_isa()
        return name.decode()

    def set_isa(self, isa: str) -> None:
        """Use another instruction set in this whole process, for tests; KernelError if the machine lacks it."""
        if self.library.symbols.quire_cpu_set_isa(isa.encode()):
            self.library.raise_last_error("set_isa")
