"""How long a step takes on given hardware: a roofline model over what the step computes, reads and moves."""

from __future__ import annotations

from typing import NamedTuple

from engine.execution.hardware import Hardware
from engine.model_config import ModelConfig
from engine.scheduling import SchedulerOutput


class StepWork(NamedTuple):
    """What one step does, in the units that cost time.

    Attributes:
        num_seqs: scheduled sequences.
        num_tokens: rows of the batch.
        num_samples: rows that go through the language-model head.
        num_kv_tokens: cached tokens that attention reads, summed over sequences; shared ones once a reader.
        num_pairs: (row, visible token) pairs.
        num_moved_blocks: blocks swapped in or out.
        num_copied_blocks: blocks copied within the device's pool.
    """

    num_seqs: int
    num_tokens: int
    num_samples: int
    num_kv_tokens: int
    num_pairs: int
    num_moved_blocks: int = 0
    num_copied_blocks: int = 0

    @classmethod
    def of(cls, output: SchedulerOutput) -> StepWork:
        num_tokens = num_samples = num_kv_tokens = num_pairs = 0
        for item in output.scheduled:
            num_new, start = len(item.token_ids), item.start
            num_tokens += num_new
            num_kv_tokens += start + num_new
            num_pairs += num_new * start + num_new * (num_new + 1) // 2
            num_samples += bool(item.samples)
        return cls(
            len(output.scheduled),
            num_tokens,
            num_samples,
            num_kv_tokens,
            num_pairs,
            len(output.blocks_to_swap_out) + len(output.blocks_to_swap_in),
            len(output.blocks_to_copy),
        )


class StepTimeModel:
    """Seconds of a step: fixed costs + max(weights, matrix products) + max(KV reads, attention) + transfers.

    Within a matrix product, and within attention, memory and arithmetic overlap, so the slower of the two counts; one
    after the other they do not overlap. The model's numbers come from its ModelConfig alone.
    """

    def __init__(self, model: ModelConfig, hardware: Hardware, block_size: int) -> None:
        self.model = model
        self.hardware = hardware
        head = model.vocab_size * model.embedding_size
        # Embeddings are tables that are looked up, not multiplied by; one that is tied to the head is counted once.
        layers = model.num_parameters - head * (1 if model.tie_word_embeddings else 2)
        if model.position_embedding == "learned":
            layers -= (model.max_position_embeddings + model.position_offset) * model.hidden_size
        ranks, element = hardware.num_devices, hardware.element_bytes
        self._flops_per_token = 2 * layers
        self._flops_per_sample = 2 * head
        self._flops_per_pair = 4 * model.num_layers * model.num_heads * model.head_dim
        self.kv_bytes_per_token = 2 * model.num_layers * model.num_kv_heads * model.head_dim * element
        self.block_bytes = self.kv_bytes_per_token * block_size
        self.weight_bytes = (layers + head) * element
        self.moved_block_s = hardware.block_copy_s + self.block_bytes / ranks / hardware.host_bandwidth
        self._copied_block_s = 2 * self.block_bytes / ranks / hardware.memory_bandwidth
        # Megatron's layers end attention and MLP with one all-reduce each of [num_tokens, hidden_size]; a ring moves
        # 2 (ranks - 1) / ranks of the data over each link.
        num_all_reduces = 2 * model.num_layers if ranks > 1 else 0
        ring_bytes = 2 * (ranks - 1) / ranks * model.hidden_size * element
        self._sent_token_bytes = num_all_reduces * ring_bytes
        self._all_reduces_s = num_all_reduces * hardware.all_reduce_s

    def matrix_flops(self, work: StepWork) -> int:
        return work.num_tokens * self._flops_per_token + work.num_samples * self._flops_per_sample

    def attention_flops(self, work: StepWork) -> int:
        return work.num_pairs * self._flops_per_pair

    def kv_bytes(self, work: StepWork) -> int:
        """What attention reads of the cache."""
        return work.num_kv_tokens * self.kv_bytes_per_token

    def host_seconds(self, work: StepWork) -> float:
        """What of `seconds` passes on the host before the device can begin: scheduling and preparing the step."""
        if work.num_tokens == 0:
            return 0.0
        return self.hardware.step_s + work.num_seqs * self.hardware.sequence_s

    def sent_bytes(self, work: StepWork) -> float:
        """What each device sends to the others."""
        return work.num_tokens * self._sent_token_bytes

    def communication_seconds(self, work: StepWork) -> float:
        """What of `seconds` passes in all-reduces."""
        if work.num_tokens == 0:
            return 0.0
        return self._all_reduces_s + self.sent_bytes(work) / self.hardware.link_bandwidth

    def seconds(self, work: StepWork) -> float:
        """How long the step lasts. A step without rows only moves blocks."""
        transfers = work.num_moved_blocks * self.moved_block_s + work.num_copied_blocks * self._copied_block_s
        if work.num_tokens == 0:
            return transfers
        hardware = self.hardware
        matrix = max(
            self.weight_bytes / hardware.memory_bandwidth,
            self.matrix_flops(work) / hardware.matrix_flops,
        )
        attention = max(
            self.kv_bytes(work) / hardware.kv_bandwidth,
            self.attention_flops(work) / hardware.attention_flops,
        )
        communication = self.communication_seconds(work)
        return self.host_seconds(work) + (matrix + attention) / hardware.num_devices + communication + transfers

    def num_affordable_blocks(self, utilization: float = 0.9) -> int:
        """KV blocks that fit beside the weights in this share of all devices' memory; 0 if not even the weights do."""
        memory = utilization * self.hardware.memory_bytes * self.hardware.num_devices
        return max(0, int((memory - self.weight_bytes) // self.block_bytes))
