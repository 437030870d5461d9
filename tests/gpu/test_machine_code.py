"""What the compilers made of the hot kernels, and what NVIDIA's checker of memory and races says of them."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def cuobjdump() -> str:
    """CUDA's disassembler: the toolkit's, or the one that Triton's package carries."""
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        found = shutil.which(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    if found is None:
        pytest.skip("there is no cuobjdump")
    return found


@pytest.mark.slow  # the library has hundreds of kernels to list
@pytest.mark.timeout(600)
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_attention_uses_tensor_cores_and_wide_asynchronous_copies(architecture: str) -> None:
    """And nothing in local memory, where an array goes that is indexed at run time, which is no spill to ptxas."""
    library = ROOT / "engine" / "kernels" / "lib" / "libquire_cuda.so"
    if not library.is_file():
        pytest.skip("the CUDA library was not built")
    command = [cuobjdump(), "--dump-sass", "--gpu-architecture", architecture, str(library)]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    functions = {part.split(maxsplit=1)[0]: part for part in listing.split("Function : ")[1:]}
    hot = {name: code for name, code in functions.items() if re.search(r"(decode|prefill)_attention_kernel", name)}
    assert len(hot) == 2 * (10 + 9), "two types; ten tiles for decodes, nine for prompts"
    for name, code in hot.items():
        assert "HMMA.16816.F32" in code, name
        assert re.search(r"LDGSTS\.E\.BYPASS\.128", code), name
        assert not re.search(r"\b(LDL|STL)\b", code), name


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("there is no compute-sanitizer")
    tests = ["tests/gpu/test_matrix_attention.py", "tests/gpu/test_attention.py"]
    chosen = "cuda and (borders or no_sequence or window)"
    done = subprocess.run(
        [
            *(sanitizer, "--tool", tool, "--error-exitcode", "99", "--target-processes", "all"),
            *(sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen, *tests),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert done.returncode == 0, done.stdout[-8000:]
