"""What `device: simulated:...` may say."""

from __future__ import annotations

import pytest

from engine.errors import ConfigError
from engine.execution.hardware import find_hardware
from engine.execution.simulated_device import FixedPrices, parse_simulated


def test_hardware_by_its_name() -> None:
    assert parse_simulated("simulated:h200") is find_hardware("h200")


def test_two_prices() -> None:
    device = parse_simulated("simulated:prefill=6000,step_ms=20")
    assert device == FixedPrices(6000.0, 0.02)
    assert isinstance(device, FixedPrices)
    assert parse_simulated(f"simulated:{device.name}") == device


@pytest.mark.parametrize(
    "name", ["", "h900", "prefill=6000", "prefill=0,step_ms=1", "prefill=x,step_ms=1", "prefill=1,step_ms=1,a=1"]
)
def test_what_is_neither_is_refused_with_what_is_known(name: str) -> None:
    with pytest.raises(ConfigError, match=r"one of a100-40gb.* or simulated:prefill=TOKENS_PER_S,step_ms=MS"):
        parse_simulated(f"simulated:{name}")
