"""Checkpoints: from what a user names to a configuration, weights and a tokenizer.

Importing this needs no torch; reading weights does.
"""

from __future__ import annotations

from engine.loading.checkpoint import Checkpoint
from engine.loading.model_loader import load_model
from engine.loading.sources import open_checkpoint

__all__ = ["Checkpoint", "load_model", "open_checkpoint"]
