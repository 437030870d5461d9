"""Fitting recovers the hardware that timed the steps, and learns from a real engine."""

from __future__ import annotations

import dataclasses

import pytest

from engine.config import EngineConfig
from engine.engine import LLMEngine
from engine.errors import ConfigError
from engine.execution import simulated_fit
from engine.execution.hardware import Hardware
from engine.execution.simulated import VirtualClock, build_simulated_engine
from engine.execution.simulated_step_time import StepTimeModel
from engine.loading import open_checkpoint

SMOLLM2 = open_checkpoint("dummy:smollm2-135m").model_config()
CPU = Hardware("cpu", "test", 1, 8e9, 9e9, 3e9, 70e9, 20e9, 10e9, sequence_s=1e-3, element_bytes=4)
OPTIONS = {"enable_prefix_caching": False, "num_blocks": 256, "max_model_len": 1024}


def test_a_simulated_device_is_recovered(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = VirtualClock()
    engine, _ = build_simulated_engine(SMOLLM2, CPU, EngineConfig.from_dict(OPTIONS), clock)
    monkeypatch.setattr("time.perf_counter", clock.now)
    monkeypatch.setattr(simulated_fit, "copy_bandwidth", lambda: 10e9)
    fitted = simulated_fit.fit_hardware(engine, "again", element_bytes=4)
    for step in simulated_fit.time_steps(engine):
        assert StepTimeModel(SMOLLM2, fitted, 16).seconds(step.work) == pytest.approx(step.seconds, rel=0.02)
    assert fitted.matrix_flops == pytest.approx(CPU.matrix_flops, rel=0.05)
    assert fitted.memory_bandwidth == pytest.approx(CPU.memory_bandwidth, rel=0.05)


def test_a_real_engine_is_fitted() -> None:
    engine = LLMEngine.from_options("dummy:tiny", EngineConfig.from_dict({**OPTIONS, "max_model_len": 512}))
    hardware = simulated_fit.fit_hardware(engine, "this-cpu", element_bytes=4)
    assert "on this machine" in hardware.source
    assert hardware.memory_bytes > 1e9
    engine.check_invariants()


def test_an_engine_that_would_cheat_is_refused() -> None:
    engine, _ = build_simulated_engine(
        SMOLLM2, CPU, EngineConfig.from_dict({**OPTIONS, "enable_prefix_caching": True}), VirtualClock()
    )
    with pytest.raises(ConfigError, match="enable_prefix_caching"):
        simulated_fit.fit_hardware(engine, "x", 4)


def test_an_engine_too_small_for_any_batch_is_refused() -> None:
    options = {**OPTIONS, "num_blocks": 1, "max_model_len": 16}
    engine, _ = build_simulated_engine(
        SMOLLM2, dataclasses.replace(CPU), EngineConfig.from_dict(options), VirtualClock()
    )
    with pytest.raises(ConfigError, match="max_model_len=16"):
        simulated_fit.fit_hardware(engine, "x", 4)
