"""Puts an engine together: checkpoint, worker, KV pool."""

from __future__ import annotations

import dataclasses
import logging

from engine.config import CacheConfig, EngineConfig
from engine.control import RankSetup, WorkerLauncher, WorkerProcesses
from engine.engine import LLMEngine
from engine.errors import ConfigError
from engine.execution.executor import UniprocExecutor
from engine.execution.host import may_have_gpu
from engine.execution.parallel_executor import ParallelExecutor
from engine.execution.worker import Worker, create_worker
from engine.loading import Checkpoint, open_checkpoint
from engine.model_config import ModelConfig
from engine.parallel import Cancellation, split_decoder
from engine.progress import Progress

logger = logging.getLogger(__name__)


def build_engine(
    model: str, config: EngineConfig, progress: Progress | None = None, launcher: WorkerLauncher | None = None
) -> LLMEngine:
    """Load a checkpoint and build the engine for it, on the device that `config` names.

    Args:
        launcher: starts the other ranks if there are any; by default as processes of this machine.

    Raises:
        ModelLoadError: the checkpoint is missing, corrupt or not supported.
        ConfigError: the options contradict the checkpoint or the machine.
        CommunicatorError: another rank did not come, or died.
    """
    checkpoint = open_checkpoint(model, progress)
    model_config = checkpoint.model_config()
    wanted_len = min(config.max_model_len or model_config.max_position_embeddings, model_config.max_position_embeddings)
    executor = _start_executor(model, checkpoint, config, wanted_len, progress, launcher)
    try:
        cache_config = CacheConfig.of(config, executor.choose_num_blocks(wanted_len))
        engine = LLMEngine(
            executor,
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
        executor.build_cache(cache_config, engine.max_model_len)
        engine.pin_shared_prefixes()
    except BaseException:
        executor.close()
        raise
    return engine


def load_worker(setup: RankSetup, cancellation: Cancellation, progress: Progress | None = None) -> Worker:
    """One rank's worker, on whichever machine it is: each opens the checkpoint and reads its own part.

    Raises:
        CommunicatorError: cancelled, or as create_worker.
    """

    def checked(what: str, done: int, total: int) -> None:
        cancellation.check()
        if progress is not None:
            progress(what, done, total)

    checkpoint = open_checkpoint(setup.model, checked)
    model_config = _bounded(checkpoint.model_config(), setup.max_model_len)
    return create_worker(
        checkpoint, model_config, setup.config, checked, parallel=setup.group, cancellation=cancellation
    )


def _start_executor(
    model: str,
    checkpoint: Checkpoint,
    config: EngineConfig,
    max_model_len: int,
    progress: Progress | None,
    launcher: WorkerLauncher | None,
) -> UniprocExecutor | ParallelExecutor:
    model_config = checkpoint.model_config()
    if config.tensor_parallel_size == 1:
        return UniprocExecutor(create_worker(checkpoint, _bounded(model_config, max_model_len), config, progress))
    split_decoder(model_config, config.tensor_parallel_size)  # an error before anything is started
    if launcher is None:
        _check_gpus(config)
    return ParallelExecutor.start(
        model,
        config,
        max_model_len,
        lambda setup, cancellation: load_worker(setup, cancellation, progress),
        launcher or WorkerProcesses(),
    )


def _check_gpus(config: EngineConfig) -> None:
    """Ranks that are processes of this machine take a GPU each, where they take any."""
    if config.device == "cpu" or not may_have_gpu():
        return
    from engine.execution.platform import num_gpus

    found = num_gpus()
    if found < config.tensor_parallel_size and (found or config.device == "cuda"):
        raise ConfigError(
            f"tensor_parallel_size={config.tensor_parallel_size} is more than the GPUs of this machine, {found}; "
            "use fewer ranks, or device='cpu'"
        )


def _bounded(model_config: ModelConfig, max_model_len: int) -> ModelConfig:
    """Positions beyond the longest sequence need no rotary table, which for 128k of them is 64 MB."""
    if model_config.position_embedding != "rotary":
        return model_config
    return dataclasses.replace(model_config, max_position_embeddings=max_model_len)
