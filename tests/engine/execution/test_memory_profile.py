from __future__ import annotations

import pytest
import torch

from engine.config import CacheConfig, EngineConfig
from engine.execution.cache_engine import CacheEngine
from engine.execution.memory_profile import largest_steps
from engine.execution.torch_runner import TorchModelRunner
from engine.kernels.reference import ReferenceBackend
from engine.loading import load_model, open_checkpoint


@pytest.mark.parametrize(
    ("max_tokens", "max_seqs", "max_len", "rows", "sequences"),
    [(64, 8, 512, 64, 1), (64, 8, 16, 64, 4), (64, 2, 16, 32, 2), (4, 8, 512, 4, 1)],
)
def test_the_largest_steps_run(max_tokens: int, max_seqs: int, max_len: int, rows: int, sequences: int) -> None:
    """Within what a runner of these bounds takes, and over a pool just large enough."""
    widest, drawing = largest_steps(max_tokens, max_seqs, max_len, block_size=4)
    assert (widest.num_tokens, len(widest.scheduled)) == (rows, sequences)
    assert all(len(item.token_ids) <= max_len for item in widest.scheduled)
    assert len(drawing.scheduled) == drawing.num_tokens == min(max_tokens, max_seqs)
    checkpoint = open_checkpoint("dummy:tiny")
    model_config, kernels = checkpoint.model_config(), ReferenceBackend()
    config = EngineConfig(block_size=4, max_num_batched_tokens=max_tokens, max_num_seqs=max_seqs)
    cache_config = CacheConfig(4, -(-max_tokens // 4), enable_prefix_caching=False)
    cpu = torch.device("cpu")
    cache = CacheEngine(model_config, cache_config, torch.float32, cpu, kernels)
    model = load_model(checkpoint, model_config, kernels, torch.float32, cpu)
    runner = TorchModelRunner(model, cache, model_config, config, cache_config.num_blocks)
    for step in (widest, drawing):
        assert len(runner.run(step).tokens) == len(step.scheduled)
