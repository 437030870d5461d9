"""Tensor parallelism after Megatron-LM: how a decoder is split over ranks, and how they speak (§4.6)."""

from __future__ import annotations

from engine.parallel.cancellation import Cancellation
from engine.parallel.group import ALONE, TensorParallelGroup
from engine.parallel.plan import DecoderShard, split_decoder

__all__ = ["ALONE", "Cancellation", "DecoderShard", "TensorParallelGroup", "split_decoder"]
