"""Builds of the CPU library other than the one in engine/kernels/lib, and the tests that run on them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NATIVE = [f"tests/engine/execution/test_native_{name}.py" for name in ("decoder", "runner", "samples")]


def tool(name: str) -> str:
    """A program of this environment, or the machine's."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"needs {name}")
    return found


def build_cpu_library(folder: Path, **options: str) -> Path:
    """Build libquire_cpu.so with CMake's `options` under `folder`; returns the folder that it is in."""
    library = folder / "lib"
    options = {
        "CMAKE_CXX_COMPILER": tool("g++"),
        "CMAKE_MAKE_PROGRAM": tool("ninja"),
        "QUIRE_LIBRARY_DIR": str(library),
        "QUIRE_CUDA": "OFF",
    } | options
    configure = [tool("cmake"), "-S", "csrc", "-B", str(folder / "build"), "-G", "Ninja"]
    run([*configure, *(f"-D{name}={value}" for name, value in options.items())])
    run([tool("cmake"), "--build", str(folder / "build"), "--target", "quire_cpu", "-j", "2"])
    return library


def run_tests(library: Path, selected: Sequence[str], **environment: str) -> str:
    """Run the tests `selected` on that library, each but the slow ones; what pytest printed."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", *selected]
    return run(command, QUIRE_LIBRARY_PATH=str(library), OMP_NUM_THREADS="1", **environment)


def run_groups(library: Path, groups: Sequence[Sequence[str]], **environment: str) -> list[str]:
    """run_tests for each group, two at a time: each computes on one thread."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda selected: run_tests(library, selected, **environment), groups))


def run(command: list[str], **environment: str) -> str:
    """What it printed. It takes the processors that nobody wants: beside it, other tests wait for servers to start."""
    done = subprocess.run(
        ["nice", "-n", "10", *command],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert done.returncode == 0, f"{command[0]} failed:\n{done.stdout[-8000:]}"
    return done.stdout
