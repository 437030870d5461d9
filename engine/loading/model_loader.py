"""Fill a model with a checkpoint's weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from engine.loading.checkpoint import Checkpoint
from engine.loading.matching import match_tensors, model_name
from engine.loading.tensor_part import TensorPart
from engine.model_config import ModelConfig

if TYPE_CHECKING:
    import torch

    from engine.kernels.backend import KernelBackend
    from engine.layers import WeightFormat
    from engine.models import CausalLM
    from engine.parallel.rank import Rank


def load_model(
    checkpoint: Checkpoint,
    config: ModelConfig,
    kernels: KernelBackend,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
    rank: Rank | None = None,
    weight_format: WeightFormat | None = None,
) -> CausalLM:
    """Build the model that `config` describes and fill each weight exactly once.

    Args:
        config: `checkpoint.model_config()`, perhaps with a smaller `max_position_embeddings`.
        dtype: type of all weights; stored ones are converted.
        progress: called with (bytes read so far, bytes in all) after each tensor.
        rank: whose part is built and read; None is all.
        weight_format: of matrices that are quantised as they are read; None holds all in `dtype`.

    Raises:
        ModelLoadError: a tensor is missing, doubled, unknown or of another shape than the configuration says.
    """
    from engine.models import build_model  # here, so that reading a configuration does not import torch

    checkpoint.device = str(device)
    model = build_model(config, kernels, dtype, device, rank, weight_format)
    targets = model.weight_targets()
    shapes = {name: target.shape for name, target in targets.items()}
    num_bytes, total = 0.0, checkpoint.num_weight_bytes

    def part_of(stored_name: str) -> TensorPart | None:
        target = targets.get(model_name(stored_name, shapes, model.unused_weights, model.base_model_prefix))
        return TensorPart(0, ()) if target is None else target.part

    checkpoint.prefetch(part_of)
    matched = match_tensors(
        checkpoint.source,
        config.architecture,
        checkpoint.tensors(),
        shapes,
        model.unused_weights,
        model.base_model_prefix,
    )
    for name, tensor in matched:
        if tensor is not None:
            target = targets[name]
            values = tensor.read(target.part)
            # Of a part, as much as of the whole that it stands for.
            num_bytes += values.nbytes / (target.part.share(target.shape) if target.part else 1.0)
            target.load(values)
        if progress is not None:
            progress(round(num_bytes), total)
    return model
