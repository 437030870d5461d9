"""What the simulated replicas run on: fixed times, or the engine's step-time model of some hardware."""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.routing.replica import Model, ReplicaModel
from benchmarks.routing.stepping import SteppingModel
from engine.config import EngineConfig
from engine.engine import LLMEngine
from engine.execution.hardware import HARDWARE, Hardware, find_hardware
from engine.execution.simulated_build import fixed_price_hardware
from engine.execution.simulated_device import FixedPrices
from engine.execution.simulated_fit import fit_hardware
from engine.execution.simulated_step_time import StepTimeModel
from engine.loading import open_checkpoint
from engine.model_config import ModelConfig

MODELS = ("fixed", "fitted")
# The device that is this machine.
CPU = "cpu"
DEVICES = (CPU, *HARDWARE)

_BLOCK_SIZE = 16
_CPU_OPTIONS = {"enable_prefix_caching": False, "block_size": _BLOCK_SIZE, "num_blocks": 256}
_CPU_MODEL_LEN = 1024


class Prices(NamedTuple):
    """What a device does, where its name is not given."""

    prefill_tokens_per_s: float
    token_s: float


class Device(NamedTuple):
    """The replicas' model, and what is to be said beside the results."""

    model: Model
    source: str


def fixed_device(num_blocks: int, prices: Prices) -> Device:
    """Prompts at one rate, tokens at one pace, whatever else is computed."""
    source = f"fixed: {prices.prefill_tokens_per_s:g} prompt tokens/s, {prices.token_s * 1e3:g} ms a token"
    return Device(ReplicaModel(num_blocks, *prices), source)


def priced_device(num_blocks: int, prices: Prices, checkpoint: str) -> Device:
    """Steps of at least `token_s`, of which prompt tokens make one longer as they take longer than that."""
    shape = open_checkpoint(checkpoint).model_config()
    hardware = fixed_price_hardware(shape, FixedPrices(*prices))
    return _stepping(num_blocks, shape, hardware, f"steps of {hardware.name}")


def named_device(num_blocks: int, name: str, checkpoint: str) -> Device:
    """A machine of the hardware table, or this one, to which the step-time model is fitted now.

    Args:
        name: one of DEVICES, in small letters or capitals.
        checkpoint: whose shape it computes; on this machine it is loaded and timed.

    Raises:
        ConfigError: there is no such device.
        ModelLoadError: there is no such checkpoint.
    """
    shape = open_checkpoint(checkpoint).model_config()
    if name.lower() == CPU:
        options = {**_CPU_OPTIONS, "max_model_len": min(_CPU_MODEL_LEN, shape.max_position_embeddings)}
        engine = LLMEngine.from_options(checkpoint, EngineConfig.from_dict(options))
        hardware = fit_hardware(engine, "this-cpu", element_bytes=4)
    else:
        hardware = find_hardware(name.lower())
    return _stepping(num_blocks, shape, hardware, f"{checkpoint} on {hardware.name}, simulated: {hardware.source}")


def _stepping(num_blocks: int, shape: ModelConfig, hardware: Hardware, source: str) -> Device:
    config = EngineConfig()
    model = SteppingModel(
        num_blocks, StepTimeModel(shape, hardware, _BLOCK_SIZE), config.max_num_batched_tokens, config.max_num_seqs
    )
    return Device(model, source)
