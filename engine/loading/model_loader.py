"""Fill a model with a checkpoint's weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from engine.errors import ModelLoadError
from engine.loading.checkpoint import Checkpoint
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
    pending, unused = model.weight_targets(), model.unused_weights
    known = unused.union(pending)
    num_bytes, total = 0, checkpoint.num_weight_bytes
    for stored_name, tensor in checkpoint.weights():
        num_bytes += tensor.nbytes
        # A checkpoint of the bare decoder has names without the module that holds it.
        name = stored_name if stored_name in known else f"{model.base_model_prefix}.{stored_name}"
        if name not in unused:
            if name not in pending:
                why = "occurs twice" if name in known else f"has no place in {config.architecture}"
                raise ModelLoadError(f"{checkpoint.source}: tensor {stored_name} {why}")
            target = pending.pop(name)
            if tuple(tensor.shape) != target.shape:
                raise ModelLoadError(
                    f"{checkpoint.source}: tensor {stored_name} has shape {list(tensor.shape)}, "
                    f"the configuration says {list(target.shape)}"
                )
            target.load(tensor)
        if progress is not None:
            progress(num_bytes, total)
    if pending:
        names = sorted(pending)
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ModelLoadError(f"{checkpoint.source}: missing tensors {', '.join(names[:3])}{more}")
    return model
