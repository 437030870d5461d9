"""csrc/cpu under AddressSanitizer and UndefinedBehaviorSanitizer, through the tests that call it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NATIVE = [f"tests/engine/execution/test_native_{name}.py" for name in ("decoder", "runner", "samples")]
# Unoptimised and checked, all of the decoder's tests take many minutes: each block size, cache type and batch once.
CHOSEN = "block_sizes or (every_instruction and Gemma3) or (do_not_depend and (int8-16 or float32-1)) or beams"
PARALLEL = [f"tests/engine/parallel/test_{name}.py" for name in ("shared_memory", "architectures")]
CHOSEN_PARALLEL = "shared_memory or (native and (odd-heads or opt-350m or gemma3-untied)) or batch"


def tool(name: str) -> str:
    """A program of this environment, or the machine's."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"needs {name}")
    return found


def runtime(compiler: str, name: str) -> str:
    """The shared library of a sanitizer, which must come before Python's own."""
    said = subprocess.run([compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True)
    path = Path(said.stdout.strip())
    if not path.is_absolute():
        pytest.skip(f"{compiler} has no {name}")
    return str(path.resolve())


def build(folder: Path, compiler: str) -> Path:
    """Unoptimised: the checks of inlined templates take an optimiser minutes a file."""
    library = folder / "lib"
    options = {
        "CMAKE_CXX_COMPILER": compiler,
        "CMAKE_MAKE_PROGRAM": tool("ninja"),
        "CMAKE_BUILD_TYPE": "Debug",
        "QUIRE_LIBRARY_DIR": str(library),
        "QUIRE_SANITIZE": "ON",
        "QUIRE_CUDA": "OFF",
    }
    configure = [tool("cmake"), "-S", "csrc", "-B", str(folder / "build"), "-G", "Ninja"]
    run([*configure, *(f"-D{name}={value}" for name, value in options.items())])
    run([tool("cmake"), "--build", str(folder / "build"), "--target", "quire_cpu", "-j", "2"])
    return library


def run(command: list[str], **environment: str) -> None:
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert done.returncode == 0, f"{command[0]} failed:\n{done.stdout[-8000:]}"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_kernels_and_decoder_run_clean(tmp_path: Path) -> None:
    compiler = tool("g++")
    library = build(tmp_path, compiler)
    # The last so that the sanitizers find the function that throws.
    preloaded = [runtime(compiler, name) for name in ("libasan.so", "libubsan.so", "libstdc++.so")]
    for selected in (["tests/engine/kernels"], ["-k", CHOSEN, *NATIVE], ["-k", CHOSEN_PARALLEL, *PARALLEL]):
        run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", *selected],
            LD_PRELOAD=":".join(preloaded),
            ASAN_OPTIONS="detect_leaks=0",  # Python's are many
            UBSAN_OPTIONS="print_stacktrace=1",
            QUIRE_LIBRARY_PATH=str(library),
            OMP_NUM_THREADS="1",
        )
