"""One rank's part of a torch model, and its line to the others: what the layers are built with."""

from __future__ import annotations

from typing import NamedTuple

from engine.model_config import ModelConfig
from engine.parallel.plan import DecoderShard, split_decoder
from engine.parallel.torch_communicator import TorchCommunicator


class Rank(NamedTuple):
    """`communicator` is None for a rank alone, which holds the whole model."""

    shard: DecoderShard
    communicator: TorchCommunicator | None = None

    @classmethod
    def alone(cls, config: ModelConfig) -> Rank:
        return cls(split_decoder(config, 1)[0])
