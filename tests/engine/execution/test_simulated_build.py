"""An engine on a simulated device, as `device: simulated:...` builds it: real scheduler, steps of a given length."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from engine import LLM, SamplingParams
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.execution.simulated_build import build_on_simulated_device, fixed_price_hardware
from engine.execution.simulated_device import FixedPrices
from engine.execution.simulated_step_time import StepTimeModel, StepWork
from engine.loading import open_checkpoint
from engine.request import EngineRequest

CHECKPOINT = open_checkpoint("dummy:tiny")


def test_prompts_and_decodes_last_what_their_prices_say() -> None:
    prices = StepTimeModel(
        CHECKPOINT.model_config(), fixed_price_hardware(CHECKPOINT.model_config(), FixedPrices(1e4, 0.02)), 16
    )
    decode = StepWork(num_seqs=8, num_tokens=8, num_samples=8, num_kv_tokens=800, num_pairs=800)
    assert prices.seconds(decode) == pytest.approx(0.02)
    prompt = StepWork(num_seqs=1, num_tokens=2000, num_samples=0, num_kv_tokens=2000, num_pairs=2_001_000)
    assert prices.seconds(prompt) == pytest.approx(0.2)


def test_steps_take_that_time_on_the_wall_and_prefixes_are_cached() -> None:
    config = EngineConfig(device="simulated:prefill=4000,step_ms=10", num_blocks=256, max_num_batched_tokens=400)
    engine = build_on_simulated_device(CHECKPOINT, config)
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    prompt = [7] * 401

    def timed(request_id: str) -> tuple[float, int]:
        engine.add_request(EngineRequest(request_id, prompt, params))
        began, cached = time.monotonic(), 0
        while engine.has_unfinished_requests:
            cached = max([cached, *(output.num_cached_tokens for output in engine.step())])
        return time.monotonic() - began, cached

    # 401 tokens at 4,000 a second in two steps, then five decodes of 10 ms.
    seconds, cached = timed("first")
    assert seconds >= 0.15
    assert cached == 0
    again, cached = timed("second")
    assert cached == 400
    assert 0.05 <= again < seconds
    engine.check_invariants()


def test_tokens_are_a_function_of_the_sequence() -> None:
    options = {"device": "simulated:prefill=1e6,step_ms=0.1", "num_blocks": 64}
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    prompts = [{"prompt_token_ids": [1, 2, 3]}, {"prompt_token_ids": [4, 5]}]
    together = LLM("dummy:tiny", **options).generate(prompts, params, use_tqdm=False)
    alone = LLM("dummy:tiny", **options).generate(prompts[1:], params, use_tqdm=False)
    assert together[1].outputs[0].token_ids == alone[0].outputs[0].token_ids


def test_a_device_of_prices_alone_needs_a_pool_size() -> None:
    with pytest.raises(ConfigError, match="give num_blocks"):
        build_on_simulated_device(CHECKPOINT, EngineConfig(device="simulated:prefill=1,step_ms=1"))


@pytest.mark.parametrize("option", [{"dtype": "float32"}, {"num_threads": 2}, {"tensor_parallel_size": 2}])
def test_options_of_a_computing_device_are_refused(option: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(option))}=.* means nothing on device=simulated:h200"):
        EngineConfig.from_dict({"device": "simulated:h200", **option})


def test_it_says_that_it_is_simulated(caplog: pytest.LogCaptureFixture) -> None:
    config = EngineConfig(device="simulated:h200", num_blocks=16)
    build_on_simulated_device(CHECKPOINT, config)
    assert "SIMULATED device, h200" in caplog.text
    assert "NVIDIA H200 data sheet" in caplog.text
    assert config.simulated_device == "h200"
    assert EngineConfig().simulated_device is None


def test_no_torch_is_loaded() -> None:
    code = (
        "import sys; from engine.config import EngineConfig; from engine.engine import LLMEngine;"
        "LLMEngine.from_options('dummy:tiny', EngineConfig(device='simulated:h200', num_blocks=16));"
        "print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "False", result.stderr
