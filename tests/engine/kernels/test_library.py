from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import pytest

from engine.errors import ConfigError
from engine.kernels import abi
from engine.kernels.cpu import CpuBackend
from engine.kernels.library import LIBRARY_PATH_VARIABLE, KernelsUnavailableError, load_library

HEADER = Path(__file__).parents[3] / "csrc" / "include" / "quire.h"


def test_an_absent_library_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIBRARY_PATH_VARIABLE, str(tmp_path))
    library, reason = load_library("cpu")
    assert library is None
    assert f"{tmp_path}/libquire_cpu.so does not exist" in reason
    with pytest.raises(KernelsUnavailableError, match="does not exist"):
        CpuBackend(1)


def test_a_file_that_is_no_library_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "libquire_cpu.so").write_bytes(b"not a library")
    monkeypatch.setenv(LIBRARY_PATH_VARIABLE, str(tmp_path))
    library, reason = load_library("cpu")
    assert library is None
    assert "does not load" in reason


def test_a_folder_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIBRARY_PATH_VARIABLE, str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match="is not a folder"):
        load_library("cpu")


@pytest.mark.parametrize(
    ("version", "name", "message"),
    [(abi.ABI_VERSION + 1, "cpu", "has ABI version"), (abi.ABI_VERSION, "gpu", "calls itself 'gpu'")],
)
def test_a_library_of_another_kind_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int, name: str, message: str
) -> None:
    source = tmp_path / "other.c"
    source.write_text(
        f"int quire_abi_version(void) {{ return {version}; }}\n"
        f'const char* quire_backend_name(void) {{ return "{name}"; }}\n'
    )
    compile_c(["-shared", "-fPIC", str(source), "-o", str(tmp_path / "libquire_cpu.so")])
    monkeypatch.setenv(LIBRARY_PATH_VARIABLE, str(tmp_path))
    with pytest.raises(ConfigError, match=message):
        load_library("cpu")


def test_the_structs_are_those_of_the_header(tmp_path: Path) -> None:
    """A C compiler's sizes and offsets of every field equal ctypes'."""
    structs = {"QuireCacheView": abi.CacheView} | {f"Quire{s.__name__}": s for s in abi.OPERATIONS.values()}
    expected = [f"QUIRE_ABI_VERSION {abi.ABI_VERSION}"]
    lines = ['printf("QUIRE_ABI_VERSION %d\\n", QUIRE_ABI_VERSION);']
    for name, struct in structs.items():
        expected.append(f"{name} {ctypes.sizeof(struct)}")
        lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
        for field in struct._fields_:
            expected.append(f"{name}.{field[0]} {getattr(struct, field[0]).offset}")
            lines.append(f'printf("{name}.{field[0]} %zu\\n", offsetof({name}, {field[0]}));')
    source = tmp_path / "offsets.c"
    source.write_text(
        f'#include <stddef.h>\n#include <stdio.h>\n#include "{HEADER}"\nint main(void) {{\n' + "\n".join(lines) + "}\n"
    )
    compile_c(["-std=c99", "-Wall", "-Werror", "-Wpadded", str(source), "-o", str(tmp_path / "offsets")])
    printed = subprocess.run([tmp_path / "offsets"], check=True, capture_output=True, text=True).stdout.split("\n")
    assert printed[:-1] == expected
    declared = set(
        re.findall(r"^QUIRE_API int quire_(\w+)\(const Quire\w+Params\* params\);", HEADER.read_text(), re.M)
    )
    assert declared == set(abi.OPERATIONS)


def compile_c(arguments: list[str]) -> None:
    try:
        subprocess.run(["cc", *arguments], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no C compiler")
