"""What `device: simulated:...` may say: a machine of the hardware table, or one of two fixed prices."""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import ConfigError
from engine.execution.hardware import HARDWARE, Hardware, find_hardware

PREFIX = "simulated:"


@dataclass(frozen=True)
class FixedPrices:
    """A device by what it does rather than what it is.

    Attributes:
        prefill_tokens_per_s: prompt tokens a second while prompts are computed.
        step_s: seconds of a step that only decodes, however many sequences are in it.
    """

    prefill_tokens_per_s: float
    step_s: float

    @property
    def name(self) -> str:
        """As users spell it."""
        return f"prefill={self.prefill_tokens_per_s:g},step_ms={self.step_s * 1e3:g}"


def parse_simulated(device: str) -> Hardware | FixedPrices:
    """The device that an option `device` beginning with PREFIX names.

    Raises:
        ConfigError: no such hardware, or prices that are no positive numbers.
    """
    name = device.removeprefix(PREFIX)
    if "=" not in name:
        try:
            return find_hardware(name)
        except ConfigError:
            raise _unknown(device) from None
    prices: dict[str, float] = {}
    for part in name.split(","):
        key, _, value = part.partition("=")
        try:
            prices[key.strip()] = float(value)
        except ValueError:
            raise _unknown(device) from None
    if prices.keys() != {"prefill", "step_ms"} or not all(0.0 < price < float("inf") for price in prices.values()):
        raise _unknown(device)
    return FixedPrices(prices["prefill"], prices["step_ms"] / 1e3)


def _unknown(device: str) -> ConfigError:
    return ConfigError(
        f"device={device!r} must be {PREFIX} and one of {', '.join(HARDWARE)}, "
        f"or {PREFIX}prefill=TOKENS_PER_S,step_ms=MS with numbers above 0"
    )
