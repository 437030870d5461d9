"""What `python -m app size` takes from a config: the room of one replica."""

from __future__ import annotations

from app.autoscaling.capacity import ReplicaLimits
from app.cli.config_file import LoadedConfig
from engine.errors import ConfigError


def replica_limits(config: LoadedConfig, model_id: str | None, num_blocks: int | None) -> ReplicaLimits:
    """The room that a replica of one of the config's models has.

    Args:
        model_id: None is the only one.
        num_blocks: if the config does not say it: what the engine logs ("KV cache: N blocks").

    Raises:
        ConfigError: no such model, several to choose from, or the number of blocks is not known.
    """
    models = [model for model in config.models if model_id in (None, model.id)]
    if len(models) != 1:
        raise ConfigError(f"{config.path}: --model: which of {', '.join(config.model_ids)}?")
    engine = models[0].engine_config
    blocks = engine.num_blocks if num_blocks is None else num_blocks
    if blocks is None:
        raise ConfigError(
            f"{config.path}: --num-blocks: the config leaves it to the engine, which logs it: KV cache: N blocks"
        )
    return ReplicaLimits(engine.max_num_seqs, blocks, engine.block_size, engine.max_num_batched_tokens)
