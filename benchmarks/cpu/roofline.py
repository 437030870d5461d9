"""The least time that a step can take on this machine: for each phase, the larger of its bytes over the memory's
bandwidth and its operations over the dot-product rate, added up.

Counted are the layers' matrix products ("gemm"), the head, and attention; norms, rotations and activations move no
memory that the caches do not hold. Weights are read once a step, keys and values once a step and sequence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from benchmarks.cpu.machine import MachineRates, RateKind
from engine.model_config import ModelConfig
from engine.scheduling import SchedulerOutput


class Work(NamedTuple):
    """What one phase of one step does, and the type in which it multiplies."""

    num_bytes: float
    operations: float
    kind: RateKind

    def seconds(self, machine: MachineRates) -> float:
        return max(self.num_bytes / machine.bytes_per_s, self.operations / machine.fastest(self.kind))


class Sizes(NamedTuple):
    """What a runner holds, in bytes: `weights` has "gemm" and "head"."""

    weights: dict[str, int]
    kv_bytes_per_token: float


def gemm_weights(model: ModelConfig) -> int:
    """Elements of all matrices that every token is multiplied with."""
    query, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    attention = model.hidden_size * (query + 2 * kv) + query * model.hidden_size
    mlp = (3 if model.gated_mlp else 2) * model.hidden_size * model.intermediate_size
    projections = 2 * model.hidden_size * model.embedding_size if model.embedding_size != model.hidden_size else 0
    return model.num_layers * (attention + mlp) + projections


def head_weights(model: ModelConfig) -> int:
    return model.vocab_size * model.embedding_size


def step_work(model: ModelConfig, sizes: Sizes, output: SchedulerOutput) -> dict[str, Work]:
    """What the phases of one step do."""
    num_sampled = sum(bool(item.samples) for item in output.scheduled)
    gemm, head = gemm_weights(model), head_weights(model)
    kv_values = 2 * model.num_layers * model.num_kv_heads * model.head_dim
    read, pairs = _attention(model, output)
    work = {
        "gemm": Work(
            sizes.weights["gemm"], 2.0 * gemm * output.num_tokens, multiplied_in(sizes.weights["gemm"] / gemm)
        ),
        "attention": Work(
            sizes.kv_bytes_per_token / model.num_layers * read,
            4.0 * model.num_heads * model.head_dim * pairs,
            multiplied_in(sizes.kv_bytes_per_token / kv_values),
        ),
    }
    if num_sampled:
        num_bytes = sizes.weights["head"]
        work["head"] = Work(num_bytes, 2.0 * head * num_sampled, multiplied_in(num_bytes / head))
    return work


def floor_seconds(
    model: ModelConfig, sizes: Sizes, outputs: Iterable[SchedulerOutput], machine: MachineRates
) -> dict[str, float]:
    """Seconds by phase that these steps take at least, together."""
    total: dict[str, float] = {}
    for output in outputs:
        for name, work in step_work(model, sizes, output).items():
            total[name] = total.get(name, 0.0) + work.seconds(machine)
    return total


def multiplied_in(bytes_per_value: float) -> RateKind:
    """Weights, keys and values of 8 bits or fewer are multiplied as int8; scales make a value a bit larger."""
    if bytes_per_value >= 4.0:
        return "float32"
    return "bfloat16" if bytes_per_value >= 2.0 else "int8"


def _attention(model: ModelConfig, output: SchedulerOutput) -> tuple[int, int]:
    """Tokens whose keys and values are read, and visible pairs of row and token, both summed over layers."""
    read = pairs = 0
    for window, num_layers in Counter(model.window(layer) for layer in range(model.num_layers)).items():
        for item in output.scheduled:
            end = item.start + len(item.token_ids)
            reach = end if window is None else window
            read += num_layers * min(end, len(item.token_ids) + reach - 1)
            # Rows up to the window see all before them and themselves, later ones the window.
            growing = max(0, min(end, reach) - item.start)
            pairs += num_layers * (growing * item.start + growing * (growing + 1) // 2)
            pairs += num_layers * (len(item.token_ids) - growing) * reach
    return read, pairs
