"""LoRA adapters: read from PEFT's folders, checked against the base, and kept in a device's slots by need. No torch."""

from engine.adapters.adapter_loader import AdapterLoader
from engine.adapters.adapter_manager import (
    NO_ADAPTERS,
    NO_CHANGES,
    AdapterChanges,
    AdapterLoad,
    AdapterManager,
    AdapterStats,
)
from engine.adapters.lora_adapter import LoraAdapter, LoraFactors, read_adapter

__all__ = [
    "NO_ADAPTERS",
    "NO_CHANGES",
    "AdapterChanges",
    "AdapterLoad",
    "AdapterLoader",
    "AdapterManager",
    "AdapterStats",
    "LoraAdapter",
    "LoraFactors",
    "read_adapter",
]
