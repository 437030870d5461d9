"""The AVX-512 kernels on whatever machine this is: built over SIMDe's emulation of the intrinsics, and put to the tests
that compare instruction sets with each other, with torch and with themselves in other batches."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.csrc.build import NATIVE, build_cpu_library, run_groups, tool

HEADER = "simde/x86/avx512.h"
KERNELS = [f"tests/engine/kernels/test_{name}.py" for name in ("cpu", "cpu_attention", "pack", "bfloat16_products")]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not any((Path(folder) / HEADER).is_file() for folder in ("/usr/include", "/usr/local/include")):
        pytest.skip(f"needs {HEADER} (Debian's libsimde-dev)")
    if "avx2" not in Path("/proc/cpuinfo").read_text().split():
        pytest.skip("the emulation is of AVX2 instructions, which this machine lacks")
    tool("g++")
    # -O1: the optimiser takes minutes over emulated intrinsics, and the tests not much less time for it.
    options = {"CMAKE_BUILD_TYPE": "None", "CMAKE_CXX_FLAGS": "-O1", "QUIRE_EMULATE_AVX512": "ON"}
    return build_cpu_library(tmp_path_factory.mktemp("emulated"), **options)


def num_passed(output: str) -> int:
    found = re.search(r"(\d+) passed", output)
    assert found is not None, output[-2000:]
    return int(found[1])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_kernels_and_decoder(library: Path) -> None:
    """The tests that have the instruction set as a parameter, and the decoder's others."""
    every_set = ["-k", "avx512", *KERNELS, *NATIVE]
    # On the set that the environment names: the best one that the library has, which is emulated.
    others = ["-k", "not (scalar or avx2 or avx512)", *NATIVE]
    compared, decoder = run_groups(library, [every_set, others], QUIRE_CPU_ISA="avx512_bf16")
    assert " skipped" not in compared.splitlines()[-1], compared[-2000:]
    assert num_passed(compared) > 100
    assert num_passed(decoder) > 50
