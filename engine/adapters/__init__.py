"""LoRA adapters: read from PEFT's folders, checked against the base, and kept in a device's slots by need. No torch."""

from engine.adapters.adapter_manager import NO_CHANGES, AdapterChanges, AdapterLoad, AdapterManager, AdapterStats
from engine.adapters.lora_adapter import LoraAdapter, LoraFactors, read_adapter

__all__ = [
    "NO_CHANGES",
    "AdapterChanges",
    "AdapterLoad",
    "AdapterManager",
    "AdapterStats",
    "LoraAdapter",
    "LoraFactors",
    "read_adapter",
]
