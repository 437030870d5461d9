"""Imports go one way: app → engine → engine.kernels; and the engine's bookkeeping needs no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TORCH_FREE = ("engine.config", "engine.memory", "engine.scheduling", "engine.tokenization")
# Packages that know of serving: the engine is a library without them.
SERVING = ("ray", "starlette", "fastapi", "uvicorn")


def imports_of(package: str) -> Iterator[tuple[str, str]]:
    """(where, imported module) of every import statement under a folder, those inside functions too."""
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(), path)):
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield where, alias.name
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{where}: imports are absolute here"
                yield where, node.module or ""


def within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def test_the_engine_imports_nothing_of_the_application_or_of_serving() -> None:
    found = list(imports_of("engine"))
    assert any(within(module, ("engine",)) for _, module in found)
    assert [entry for entry in found if within(entry[1], ("app", "tests", "benchmarks", *SERVING))] == []


def test_kernels_import_nothing_above_them() -> None:
    allowed = ("engine.kernels", "engine.errors")
    found = [entry for entry in imports_of("engine/kernels") if within(entry[1], ("engine", "app"))]
    assert found
    assert [entry for entry in found if not within(entry[1], allowed)] == []


def test_the_application_imports_no_tests() -> None:
    found = list(imports_of("app"))
    assert any(within(module, ("engine",)) for _, module in found)
    assert [entry for entry in found if within(entry[1], ("tests", "benchmarks"))] == []


@pytest.mark.parametrize("module", TORCH_FREE)
def test_imports_without(module: str) -> None:
    """In a fresh interpreter: what a module imports is also what its imports import."""
    unwanted = ("torch", "transformers", "app", *SERVING)
    code = f"import sys, {module}; print(*(name for name in {unwanted!r} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def test_the_engine_imports_without_serving() -> None:
    code = f"import sys, engine; print(*(name for name in {('app', *SERVING)!r} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []
