"""csrc/cpu under AddressSanitizer and UndefinedBehaviorSanitizer, through the tests that call it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.csrc.build import NATIVE, build_cpu_library, run_groups, tool

# Unoptimised and checked, all of the decoder's tests take many minutes: each block size, cache type and batch once.
CHOSEN = "block_sizes or (every_instruction and Gemma3) or (do_not_depend and (int8-16 or float32-1)) or beams"
# The Triton kernels call nothing of the library.
KERNELS = ["--ignore=tests/engine/kernels/triton", "tests/engine/kernels"]
PARALLEL = [f"tests/engine/parallel/test_{name}.py" for name in ("shared_memory", "architectures")]
CHOSEN_PARALLEL = "shared_memory or (native and (odd-heads or opt-350m or gemma3-untied)) or batch"


def runtime(compiler: str, name: str) -> str:
    """The shared library of a sanitizer, which must come before Python's own."""
    said = subprocess.run([compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True)
    path = Path(said.stdout.strip())
    if not path.is_absolute():
        pytest.skip(f"{compiler} has no {name}")
    return str(path.resolve())


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_kernels_and_decoder_run_clean(tmp_path: Path) -> None:
    # The last so that the sanitizers find the function that throws.
    preloaded = [runtime(tool("g++"), name) for name in ("libasan.so", "libubsan.so", "libstdc++.so")]
    # Unoptimised: the checks of inlined templates take an optimiser minutes a file. What cannot run here is left out.
    avx512 = "ON" if "avx512f" in Path("/proc/cpuinfo").read_text().split() else "OFF"
    library = build_cpu_library(tmp_path, CMAKE_BUILD_TYPE="Debug", QUIRE_SANITIZE="ON", QUIRE_AVX512=avx512)
    run_groups(
        library,
        [KERNELS, ["-k", CHOSEN, *NATIVE], ["-k", CHOSEN_PARALLEL, *PARALLEL]],
        LD_PRELOAD=":".join(preloaded),
        ASAN_OPTIONS="detect_leaks=0",  # Python's are many
        UBSAN_OPTIONS="print_stacktrace=1",
    )
