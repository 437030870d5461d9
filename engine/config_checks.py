"""Checks that both configurations share. A failure names the field, its value and what is allowed."""

from __future__ import annotations

from engine.errors import ConfigError


def check_one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise ConfigError unless the value is one of those allowed."""
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} must be one of {', '.join(allowed)}")


def check_integer(name: str, value: object, low: int, high: int, *, optional: bool = False) -> None:
    """Raise ConfigError unless the value is an integer in the range, or None where that is allowed."""
    if optional and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ConfigError(f"{name}={value!r} must be an integer from {low} to {high}")
