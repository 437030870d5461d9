"""Runs one step: SchedulerOutput in, drawn tokens out."""

from __future__ import annotations

from typing import Protocol

from engine.int32_buffer import Int32Array
from engine.loading.stored_tensor import FloatArray
from engine.scheduling import SamplerOutput, SchedulerOutput


class ModelRunner(Protocol):
    """Computes a step's rows over the KV pool and draws the tokens it asks for."""

    def run(self, output: SchedulerOutput) -> SamplerOutput: ...

    def logits(self, token_ids: Int32Array) -> FloatArray:
        """All rows' logits, `[num_tokens, vocab_size]`, of one sequence from its start: what perplexity is made of. On
        ranks that draw no tokens their values mean nothing.

        It takes the pool's first blocks, whatever they hold: call it only while no request is live and none will
        look for a cached prefix.

        Raises:
            ConfigError: the pool or `max_model_len` is too small.
        """
        ...
