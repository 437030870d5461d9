"""The AVX-512 kernels on whatever machine this is: built over SIMDe's emulation of the intrinsics, and put to the tests
that compare instruction sets with each other, with torch and with themselves in other batches."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.csrc.build import NATIVE, build_cpu_library, run_tests, tool

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
def test_kernels_and_decoder_on_every_instruction_set(library: Path) -> None:
    """Those tests that have the instruction set as a parameter."""
    output = run_tests(library, ["-k", "avx512", *KERNELS, *NATIVE])
    assert " skipped" not in output.splitlines()[-1], output[-2000:]
    assert num_passed(output) > 100


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("isa", ["avx512", "avx512_bf16"])
def test_decoder_on(isa: str, library: Path) -> None:
    """The decoder's other tests, on the instruction set that the environment names."""
    output = run_tests(library, ["-k", "not (scalar or avx2 or avx512)", *NATIVE], QUIRE_CPU_ISA=isa)
    assert num_passed(output) > 50
