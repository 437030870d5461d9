"""Types of command-line arguments that the CPU benchmarks share."""

from __future__ import annotations

import argparse
from typing import Any

import yaml


def engine_option(text: str) -> tuple[str, Any]:
    """KEY=VALUE, the value as YAML: a number, true, false, null or a word."""
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, yaml.safe_load(value)


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number above 0")
    return int(text)
