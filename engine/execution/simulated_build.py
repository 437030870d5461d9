"""An engine for a checkpoint over a simulated device, in real time: what `device: simulated:...` builds.

Of the checkpoint only the shape and the tokenizer are read. No weights, no torch.
"""

from __future__ import annotations

import logging
import math

from engine.config import EngineConfig
from engine.engine import LLMEngine
from engine.errors import ConfigError
from engine.execution.hardware import Hardware
from engine.execution.simulated import RealClock, build_simulated_engine
from engine.execution.simulated_device import FixedPrices, parse_simulated
from engine.execution.simulated_step_time import StepTimeModel, StepWork
from engine.loading import Checkpoint
from engine.model_config import ModelConfig

logger = logging.getLogger(__name__)

# Moving a block to the host and back, where the device's name says nothing of it: PCIe 4.0 x16.
_HOST_BANDWIDTH = 0.8 * 32e9


def build_on_simulated_device(checkpoint: Checkpoint, config: EngineConfig) -> LLMEngine:
    """The engine that `config`, whose device is a simulated one, asks for.

    Raises:
        ConfigError: the options contradict the model or the device.
        ModelLoadError: the checkpoint is missing or not supported.
    """
    model = checkpoint.model_config()
    device = parse_simulated(config.device)
    if isinstance(device, FixedPrices):
        if config.num_blocks is None:
            raise ConfigError(f"device={config.device} has no memory of its own to fill: give num_blocks")
        device = fixed_price_hardware(model, device)
    logger.warning(
        "%s is served by a SIMULATED device, %s: its tokens mean nothing. Its times: %s",
        checkpoint.name,
        device.name,
        device.source,
    )
    engine, _ = build_simulated_engine(
        model, device, config, RealClock(), model_id=checkpoint.name, tokenizer=checkpoint.tokenizer()
    )
    return engine


def fixed_price_hardware(model: ModelConfig, prices: FixedPrices) -> Hardware:
    """Hardware on which steps of this model last `step_s`, or longer if their prompt tokens take longer.

    The weights are read in just `step_s`, products reach just the prefill rate; attention costs nothing.
    """
    work = StepTimeModel(model, _hardware(prices, 1.0, 1.0), block_size=16)
    prompt_token = StepWork(num_seqs=1, num_tokens=1, num_samples=0, num_kv_tokens=0, num_pairs=0)
    return _hardware(
        prices,
        memory_bandwidth=work.weight_bytes / prices.step_s,
        matrix_flops=work.matrix_flops(prompt_token) * prices.prefill_tokens_per_s,
    )


def _hardware(prices: FixedPrices, memory_bandwidth: float, matrix_flops: float) -> Hardware:
    return Hardware(
        name=prices.name,
        source="prices given in the configuration",
        num_devices=1,
        memory_bytes=math.inf,
        memory_bandwidth=memory_bandwidth,
        kv_bandwidth=math.inf,
        matrix_flops=matrix_flops,
        attention_flops=math.inf,
        host_bandwidth=_HOST_BANDWIDTH,
    )
