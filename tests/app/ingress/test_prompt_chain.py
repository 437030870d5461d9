from __future__ import annotations

import pytest

from app.ingress.prompt_chain import prompt_chain
from engine.config import CacheConfig
from engine.memory import KVCacheManager, root_hash
from engine.request import EngineRequest
from engine.sampling_params import SamplingParams
from engine.sequence import Sequence


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 8, 9, 23])
def test_the_chain_is_what_the_engine_looks_up(num_tokens: int) -> None:
    tokens = list(range(num_tokens))
    manager = KVCacheManager(CacheConfig(block_size=4, num_blocks=64, enable_prefix_caching=True))
    seq = Sequence(tokens)
    manager.allocate(seq, root_hash("model", "sql", "tenant"), num_tokens)
    request = EngineRequest("r", tokens, SamplingParams(), cache_salt="tenant", adapter="sql")
    assert list(prompt_chain(request, "model", 4)) == seq.block_hashes
    assert len(seq.block_hashes) == (num_tokens - 1) // 4


def test_tenants_models_and_adapters_share_nothing() -> None:
    adapted = EngineRequest("r", list(range(9)), SamplingParams(), adapter="tenant")
    request = EngineRequest("r", list(range(9)), SamplingParams())
    other = EngineRequest("r", list(range(9)), SamplingParams(), cache_salt="tenant")
    chains = [prompt_chain(request, "model", 4), prompt_chain(other, "model", 4), prompt_chain(request, "other", 4)]
    chains.append(prompt_chain(adapted, "model", 4))
    assert len({block for chain in chains for block in chain}) == 8
