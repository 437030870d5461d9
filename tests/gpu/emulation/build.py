"""Compiles csrc/cuda for the CPU, against this folder's stand-ins for CUDA's headers.

Machines without a GPU, CI's among them, so run the very source of the CUDA kernels: indices, masks, barriers,
asynchronous copies and reductions. What only a GPU shows (speed, real races, rounding of its special functions) is
left to the same tests marked `gpu`.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

_HERE = Path(__file__).parent
_ROOT = _HERE.parents[2]
_SOURCES = _ROOT / "csrc"
_BUILDS = _ROOT / "build" / "emulation"
_FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-w"]

# kernel<<<grid, block, shared, stream>>>(arguments);
_LAUNCH = re.compile(r"([\w:]+(?:<[\w\s,]+>)?)\s*<<<(.*?)>>>\s*\((.*?)\);", re.DOTALL)
_DYNAMIC_SHARED = re.compile(r"extern __shared__ \S+ unsigned char (\w+)\[\];")


def build_library() -> Path:
    """The path of libquire_cuda.so for the CPU, compiled unless a build of the same sources is there.

    Raises:
        RuntimeError: the emulation does not compile; the message has the compiler's words.
    """
    digest = hashlib.sha256()
    for path in sorted([*(_SOURCES / "cuda").iterdir(), *(_SOURCES / "include").iterdir(), *_HERE.iterdir()]):
        if path.is_file():
            digest.update(path.name.encode() + path.read_bytes())
    library = _BUILDS / digest.hexdigest()[:16] / "libquire_cuda.so"
    if not library.is_file():
        shutil.rmtree(_BUILDS, ignore_errors=True)
        library.parent.mkdir(parents=True)
        with tempfile.TemporaryDirectory() as folder:
            built = _compile(Path(folder))
            shutil.copy(built, library.with_suffix(".new"))
        library.with_suffix(".new").replace(library)
    return library


def translate(source: str) -> str:
    """CUDA C++ to C++: kernel launches and dynamic shared memory."""

    def launch(match: re.Match[str]) -> str:
        kernel, configuration, arguments = match.groups()
        grid, block, shared, _stream = _split(configuration)
        return f"emulation::launch({grid}, {block}, {shared}, [=] {{ {kernel}({arguments}); }});"

    source = _LAUNCH.sub(launch, source)
    return _DYNAMIC_SHARED.sub(r"unsigned char* \1 = emulation::aligned_shared();", source)


def _compile(folder: Path) -> Path:
    units = [_HERE / "emulation.cpp"]
    for path in sorted((_SOURCES / "cuda").iterdir()):
        if (_HERE / path.name).exists():  # assembly, for which this folder has another file
            shutil.copy(_HERE / path.name, folder)
        elif path.suffix in (".cu", ".cuh", ".h"):
            target = folder / (f"{path.name}.cpp" if path.suffix == ".cu" else path.name)
            target.write_text(translate(path.read_text()))
            if path.suffix == ".cu":
                units.append(target)
    includes = [f"-I{folder}", f"-I{_HERE}", f"-I{_SOURCES / 'include'}"]
    objects = [folder / f"{unit.stem}.o" for unit in units]
    running = [
        subprocess.Popen(
            ["g++", *_FLAGS, *includes, "-c", unit, "-o", target], stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
        )
        for unit, target in zip(units, objects, strict=True)
    ]
    errors = [process.communicate()[1] for process in running]
    for unit, process, error in zip(units, running, errors, strict=True):
        if process.returncode != 0:
            raise RuntimeError(f"{unit.name} does not compile for the emulation:\n{error.decode()}")
    library = folder / "libquire_cuda.so"
    subprocess.run(["g++", "-shared", *objects, "-o", library], check=True)
    return library


def _split(configuration: str) -> list[str]:
    """The four comma-separated parts of a launch configuration; commas inside parentheses do not count."""
    parts, depth = [""], 0
    for character in configuration:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]
