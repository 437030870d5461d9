"""Fill a model with a checkpoint's weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from engine.loading.checkpoint import Checkpoint
from engine.loading.matching import match_tensors
from engine.model_config import ModelConfig

if TYPE_CHECKING:
    import torch

    from engine.kernels.backend import KernelBackend
    from engine.models import CausalLM


def load_model(
    checkpoint: Checkpoint,
    config: ModelConfig,
    kernels: KernelBackend,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> CausalLM:
    """Build the model that `config` describes and fill each weight exactly once.

    Args:
        config: `checkpoint.model_config()`, perhaps with a smaller `max_position_embeddings`.
        dtype: type of all weights; stored ones are converted.
        progress: called with (bytes read so far, bytes in all) after each tensor.

    Raises:
        ModelLoadError: a tensor is missing, doubled, unknown or of another shape than the configuration says.
    """
    from engine.models import build_model  # here, so that reading a configuration does not import torch

    model = build_model(config, kernels, dtype, device)
    targets = model.weight_targets()
    shapes = {name: target.shape for name, target in targets.items()}
    num_bytes, total = 0, checkpoint.num_weight_bytes
    matched = match_tensors(
        checkpoint.source,
        config.architecture,
        checkpoint.weights(),
        shapes,
        model.unused_weights,
        model.base_model_prefix,
    )
    for name, tensor in matched:
        if tensor is not None:
            num_bytes += tensor.nbytes
            targets[name].load(tensor)
        if progress is not None:
            progress(num_bytes, total)
    return model
