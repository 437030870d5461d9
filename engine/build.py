"""Puts an engine together: checkpoint, worker, KV pool."""

from __future__ import annotations

import dataclasses
import logging

from engine.config import CacheConfig, EngineConfig
from engine.engine import LLMEngine
from engine.errors import ConfigError
from engine.execution.executor import UniprocExecutor
from engine.execution.worker import create_worker
from engine.loading import open_checkpoint
from engine.progress import Progress

logger = logging.getLogger(__name__)


def build_engine(model: str, config: EngineConfig, progress: Progress | None = None) -> LLMEngine:
    """Load a checkpoint and build the engine for it, on the device that `config` names.

    Raises:
        ModelLoadError: the checkpoint is missing, corrupt or not supported.
        ConfigError: the options contradict the checkpoint or the machine.
    """
    if config.tensor_parallel_size > 1:
        raise ConfigError(f"tensor_parallel_size={config.tensor_parallel_size} needs as many processes; this is one")
    checkpoint = open_checkpoint(model)
    model_config = checkpoint.model_config()
    wanted_len = min(config.max_model_len or model_config.max_position_embeddings, model_config.max_position_embeddings)
    worker_config = model_config
    if model_config.position_embedding == "rotary":
        # Positions beyond the longest sequence need no rotary table, which for 128k of them is 64 MB.
        worker_config = dataclasses.replace(model_config, max_position_embeddings=wanted_len)
    worker = create_worker(checkpoint, worker_config, config, progress)
    cache_config = CacheConfig.of(config, worker.choose_num_blocks(wanted_len))
    engine = LLMEngine(
        UniprocExecutor(worker),
        model_config,
        config,
        cache_config,
        model_id=checkpoint.name,
        tokenizer=checkpoint.tokenizer(),
    )
    if config.max_model_len is None and engine.max_model_len < model_config.max_position_embeddings:
        logger.warning(
            "max_model_len is %d, what the KV pool of %d blocks holds; the checkpoint allows %d",
            engine.max_model_len,
            cache_config.num_blocks,
            model_config.max_position_embeddings,
        )
    worker.build_cache(cache_config, engine.max_model_len)
    engine.pin_shared_prefixes()
    return engine
