from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

from tests.engine.kernels.triton.interpreter import InterpretedBackend, Interpreter


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    interpreter = Interpreter()
    yield interpreter
    interpreter.stop()


@pytest.fixture
def triton(interpreter: Interpreter) -> InterpretedBackend:
    return InterpretedBackend(interpreter, batch_invariant=False)


@pytest.fixture
def invariant(interpreter: Interpreter) -> InterpretedBackend:
    return InterpretedBackend(interpreter, batch_invariant=True)


@pytest.fixture(params=[False, True], ids=["fast", "invariant"])
def backend(request: pytest.FixtureRequest, interpreter: Interpreter) -> InterpretedBackend:
    """Both ways to compute."""
    return InterpretedBackend(interpreter, request.param)
