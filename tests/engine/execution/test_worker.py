from __future__ import annotations

import pytest

from engine.config import EngineConfig
from engine.engine import LLMEngine
from engine.errors import ConfigError


@pytest.mark.parametrize(("reservation", "blocks_a_sequence"), [("paged", 3), ("orca_max", 4), ("orca_pow2", 4)])
def test_the_pool_is_as_large_as_all_seats_can_use_and_no_larger(reservation: str, blocks_a_sequence: int) -> None:
    options = {"block_size": 16, "max_model_len": 48, "max_num_seqs": 3, "reservation": reservation}
    engine = LLMEngine.from_options("dummy:tiny", EngineConfig.from_dict(options))
    assert engine.cache_config.num_blocks == 3 * blocks_a_sequence, "a run of 3 blocks takes 4"


@pytest.mark.usefixtures("cpu")
def test_the_native_engine_is_batch_invariant_and_torch_on_a_cpu_is_not() -> None:
    options = {"max_model_len": 48, "num_blocks": 4, "device": "cpu", "batch_invariant": True}
    LLMEngine.from_options("dummy:tiny", EngineConfig.from_dict(options))
    with pytest.raises(ConfigError, match="batch_invariant=True on a CPU needs the native engine"):
        LLMEngine.from_options("dummy:tiny", EngineConfig.from_dict({**options, "kernels": "cpu"}))
