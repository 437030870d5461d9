"""What an engine is told (EngineConfig), and the KV pool that came of it (CacheConfig).

Both are frozen and checked where they are made; no torch.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.config_checks import check_integer, check_one_of
from engine.errors import ConfigError
from engine.execution.simulated_device import PREFIX as SIMULATED
from engine.execution.simulated_device import parse_simulated

DType = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["auto", "none", "int8", "fp8", "native"]
KVCacheDType = Literal["auto", "float32", "bfloat16", "float16", "int8"]
Preemption = Literal["auto", "swap", "recompute"]
Reservation = Literal["paged", "orca_max", "orca_pow2", "orca_oracle"]
Batching = Literal["continuous", "static"]
AsyncScheduling = Literal["auto"] | bool
CudaGraphs = Literal["auto"] | bool

DTYPES: tuple[str, ...] = ("auto", "float32", "bfloat16", "float16")
# What a device that computes nothing has no use for.
_COMPUTING_OPTIONS = (
    *("dtype", "quantization", "kv_cache_dtype", "num_threads", "cuda_graphs", "kernels", "tensor_parallel_size"),
    *("batch_invariant", "enable_lora"),
)
_ADAPTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")

QUANTIZATIONS: tuple[str, ...] = ("auto", "none", "int8", "fp8", "native")


def check_adapter_name(name: str) -> None:
    """Raise ConfigError unless requests can name an adapter so, after its base and a colon."""
    if not _ADAPTER_NAME.fullmatch(name):
        raise ConfigError(
            f"adapters: {name!r} must begin with a letter or digit and hold only letters, digits and . _ / - "
            "(128 at most)"
        )


@dataclass(frozen=True)
class EngineConfig:
    """Options of one engine. Unknown keys are refused by `from_dict`.

    Attributes:
        dtype: type of weights and activations; "auto" takes bfloat16 where the hardware multiplies it natively,
            float32 elsewhere. The native CPU engine keeps activations in float32 and sums in it; "bfloat16" is the type
            of its matrices, and of the rows that meet them on a machine with AVX512-BF16, which multiplies pairs of
            bfloat16 (others widen the matrices). With "float32" neither is rounded, whatever type the checkpoint has.
        quantization: how the matrices are held. "none" in `dtype`; "int8" in 8 bits, "fp8" in float8 e4m3, "native" as
            a GGUF file has quantised them, the others in `dtype`. Rows that meet 8 bits or fewer are quantised to 8
            bits as they come. The native CPU engine has "int8", with a scale for 32 values, and "native"; "auto" is
            "native" there if the file is quantised and `dtype` is "auto", else "none". Torch has "int8" and "fp8", with
            a scale for an output channel, or for a row, and keeps embeddings and head in `dtype`; "fp8" needs a GPU of
            compute capability 8.9 and bfloat16, and is not batch-invariant.
        kv_cache_dtype: type of the KV cache; "auto" is `dtype`, or bfloat16 beside quantised weights. "int8", with a
            scale for each token and head, is the native CPU engine's.
        device: "cpu", "cuda", "auto" for a GPU if there is one, or "simulated:NAME" for a device that computes nothing:
            steps last what a model of that hardware says (`engine/execution/hardware.py` lists the names), or what
            "simulated:prefill=TOKENS_PER_S,step_ms=MS" says; tokens are made up. For rehearsing fleets without GPUs.
        block_size: tokens in a KV block, a power of two from 1 to 256.
        num_blocks: KV blocks in the pool; None sizes the pool from `gpu_memory_utilization`.
        gpu_memory_utilization: fraction of the device's memory that weights and KV pool may fill together; on a CPU,
            the fraction of the memory available after loading that the KV pool may fill. None is 0.9 on a GPU and
            0.25 on a CPU.
        max_model_len: longest sequence in tokens, prompt and output; None takes the checkpoint's.
        max_num_seqs: sequences that run at once.
        max_num_batched_tokens: token budget of one step, shared by decodes and prompt chunks.
        num_threads: threads of a step on a CPU. None takes all cores this process may use, but for one where torch
            computes: its threads wait for the slowest, so a core shared with other work slows a step many times over.
        enable_prefix_caching: reuse KV blocks of equal prefixes. None is yes, except under a reservation other than
            "paged", where nothing can be shared.
        num_swap_blocks: blocks of host memory that preempted groups are swapped out to; 0 for no swapping. None is a
            quarter of the pool.
        preemption: what happens to the newest group when blocks run out: "swap" to host memory, "recompute" later, or
            "auto" for the cheaper of the two. A full swap pool falls back to recomputation.
        reservation: "paged" gives blocks on demand. The others are the paper's baselines: every sequence reserves one
            contiguous run at admission, for as many tokens as `max_model_len` ("orca_max"), its prompt and the next
            power of two of its output ("orca_pow2"), or its prompt and output ("orca_oracle"), where the output's
            length is taken to be `max_tokens`.
        batching: "continuous" admits requests at every step; "static" admits a batch together, as many as seats and
            memory allow, and the next one when all of it has ended.
        async_scheduling: prepare a step while the one before it runs, so that the device does not wait for the host.
            "auto" is yes on a GPU; the native CPU engine, whose steps run on the host, has no use for it, and the ranks
            of a tensor-parallel model cannot: one of them draws, and tells the others of its tokens with the next step.
        cuda_graphs: on a GPU, replay decoding steps from CUDA graphs, captured at the start for a list of batch sizes.
            "auto" is yes for a model on one rank; several also capture what they exchange by NCCL if it is true.
        shared_prefixes: name → a text, or token ids, that many prompts begin with, such as a system prompt: its full
            blocks are computed at the start and pinned. Requests share them by their content; nothing names them.
        kernels: "auto", or for tests and comparisons "native", the native CPU engine, or the kernels of a torch model
            ("reference", "cpu", "cuda", "triton").
        tensor_parallel_size: ranks, each a process with a device of its own, that hold the model together.
        batch_invariant: a sequence's tokens do not depend on what else runs, on its chunks or on preemptions: on a GPU
            by attention in fixed splits and Triton products that sum in one order whatever the batch, at a cost. The
            native CPU engine always is so.
        enable_lora: take LoRA adapters, and requests that name one.
        max_loras: adapters that may be resident at once, and so be in use by the requests that run.
        max_lora_rank: the largest rank that an adapter may have.
        adapter_memory: bytes that resident adapters may take together; None is no bound but `max_loras`. Adapters that
            no admitted request uses make room for others, the one whose last use is longest ago first.
        adapters: name → PEFT folder, of this node, `s3://BUCKET/PREFIX` or `hf:ORG/NAME`; all are fetched and checked
            at the start, and further ones can be added while the engine runs. A name is a letter or digit, then
            letters, digits and . _ / - (128 at most).
        seed: base seed of requests that bring none.
    """

    dtype: DType = "auto"
    quantization: Quantization = "auto"
    kv_cache_dtype: KVCacheDType = "auto"
    device: str = "auto"
    block_size: int = 16
    num_blocks: int | None = None
    gpu_memory_utilization: float | None = None
    num_swap_blocks: int | None = None
    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    num_threads: int | None = None
    enable_prefix_caching: bool | None = None
    preemption: Preemption = "auto"
    reservation: Reservation = "paged"
    batching: Batching = "continuous"
    async_scheduling: AsyncScheduling = "auto"
    cuda_graphs: CudaGraphs = "auto"
    shared_prefixes: Mapping[str, str | Sequence[int]] = field(default_factory=dict)
    kernels: str = "auto"
    tensor_parallel_size: int = 1
    batch_invariant: bool = False
    enable_lora: bool = False
    max_loras: int = 8
    max_lora_rank: int = 64
    adapter_memory: int | None = None
    adapters: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        check_one_of("dtype", self.dtype, DTYPES)
        check_one_of("kv_cache_dtype", self.kv_cache_dtype, (*DTYPES, "int8"))
        check_one_of("quantization", self.quantization, QUANTIZATIONS)
        check_one_of("preemption", self.preemption, ("auto", "swap", "recompute"))
        check_one_of("reservation", self.reservation, ("paged", "orca_max", "orca_pow2", "orca_oracle"))
        check_one_of("batching", self.batching, ("continuous", "static"))
        check_one_of("kernels", self.kernels, ("auto", "native", "reference", "cpu", "cuda", "triton"))
        check_integer("block_size", self.block_size, 1, 256)
        if self.block_size & (self.block_size - 1):
            raise ConfigError(f"block_size={self.block_size} must be a power of two from 1 to 256")
        check_integer("num_blocks", self.num_blocks, 1, 1 << 30, optional=True)
        check_integer("num_swap_blocks", self.num_swap_blocks, 0, 1 << 30, optional=True)
        if self.preemption == "swap" and self.num_swap_blocks == 0:
            raise ConfigError("preemption='swap' needs num_swap_blocks above 0")
        check_integer("max_model_len", self.max_model_len, 2, 1 << 30, optional=True)
        check_integer("max_num_seqs", self.max_num_seqs, 1, 1 << 16)
        check_integer("max_num_batched_tokens", self.max_num_batched_tokens, 1, 1 << 24)
        check_integer("num_threads", self.num_threads, 1, 1024, optional=True)
        check_integer("tensor_parallel_size", self.tensor_parallel_size, 1, 1024)
        check_integer("seed", self.seed, 0, (1 << 64) - 1)
        if self.async_scheduling != "auto" and not isinstance(self.async_scheduling, bool):
            raise ConfigError(f"async_scheduling={self.async_scheduling!r} must be auto, true or false")
        if self.async_scheduling is True and self.tensor_parallel_size > 1:
            raise ConfigError(
                f"async_scheduling=True needs tensor_parallel_size=1, not {self.tensor_parallel_size}: one rank draws, "
                "and tells the others of its tokens with the next step"
            )
        if self.cuda_graphs != "auto" and not isinstance(self.cuda_graphs, bool):
            raise ConfigError(f"cuda_graphs={self.cuda_graphs!r} must be auto, true or false")
        if self.enable_prefix_caching is not None and not isinstance(self.enable_prefix_caching, bool):
            raise ConfigError(f"enable_prefix_caching={self.enable_prefix_caching!r} must be true or false")
        if not isinstance(self.batch_invariant, bool):
            raise ConfigError(f"batch_invariant={self.batch_invariant!r} must be true or false")
        fraction = self.gpu_memory_utilization
        if fraction is not None and not (isinstance(fraction, (int, float)) and 0.0 < fraction <= 1.0):
            raise ConfigError(f"gpu_memory_utilization={fraction!r} must be above 0 and at most 1")
        if not isinstance(self.shared_prefixes, Mapping):
            raise ConfigError("shared_prefixes must map names to texts or lists of token ids")
        if self.shared_prefixes and not self.prefix_caching:
            raise ConfigError("shared_prefixes need enable_prefix_caching=true and reservation=paged")
        if self.reservation != "paged":
            self._check_reservation()
        self._check_adapters()
        self._check_device()

    def _check_adapters(self) -> None:
        if not isinstance(self.enable_lora, bool):
            raise ConfigError(f"enable_lora={self.enable_lora!r} must be true or false")
        check_integer("max_loras", self.max_loras, 1, 4096)
        check_integer("max_lora_rank", self.max_lora_rank, 1, 1024)
        check_integer("adapter_memory", self.adapter_memory, 1, 1 << 50, optional=True)
        if not isinstance(self.adapters, Mapping) or not all(
            isinstance(item, str) for pair in self.adapters.items() for item in pair
        ):
            raise ConfigError("adapters must map names to folders, s3:// or hf: sources")
        for name in self.adapters:
            check_adapter_name(name)
        if self.adapters and not self.enable_lora:
            raise ConfigError("adapters need enable_lora=true")

    def _check_device(self) -> None:
        if not (isinstance(self.device, str) and self.device.startswith(SIMULATED)):
            check_one_of("device", self.device, ("auto", "cpu", "cuda", f"{SIMULATED}NAME"))
            return
        parse_simulated(self.device)
        for option in dataclasses.fields(self):
            if option.name in _COMPUTING_OPTIONS and getattr(self, option.name) != option.default:
                raise ConfigError(
                    f"{option.name}={getattr(self, option.name)!r} means nothing on device={self.device}, which "
                    "computes nothing"
                )

    def _check_reservation(self) -> None:
        """What reserved runs rule out: sharing, and so prefix caching; and running short, and so preemption."""
        if self.enable_prefix_caching:
            raise ConfigError(
                f"enable_prefix_caching=True needs reservation=paged: sequences of reservation={self.reservation} "
                "share no blocks"
            )
        if self.num_swap_blocks:
            raise ConfigError(
                f"num_swap_blocks={self.num_swap_blocks} needs reservation=paged: nothing is preempted under "
                f"reservation={self.reservation}"
            )
        if self.preemption != "auto":
            raise ConfigError(
                f"preemption={self.preemption} needs reservation=paged: under reservation={self.reservation} every "
                "admitted sequence has all its memory, and none is preempted"
            )

    @property
    def simulated_device(self) -> str | None:
        """What the device is a simulation of; None for a real one."""
        return self.device.removeprefix(SIMULATED) if self.device.startswith(SIMULATED) else None

    @property
    def prefix_caching(self) -> bool:
        """`enable_prefix_caching`, resolved."""
        return self.reservation == "paged" if self.enable_prefix_caching is None else self.enable_prefix_caching

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> EngineConfig:
        """Build from plain options; an unknown key is a ConfigError that lists the known ones."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(options) - known)
        if unknown:
            raise ConfigError(f"unknown engine option {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        return cls(**options)


@dataclass(frozen=True)
class CacheConfig:
    """The KV pool as it was built: measured values that EngineConfig leaves open."""

    block_size: int
    num_blocks: int
    enable_prefix_caching: bool
    num_swap_blocks: int = 0

    @classmethod
    def of(cls, config: EngineConfig, num_blocks: int) -> CacheConfig:
        """For a pool of `num_blocks`. The host's swap pool is as configured, else a quarter of the device's; there is
        none where nothing is swapped."""
        num_swap_blocks = max(1, num_blocks // 4) if config.num_swap_blocks is None else config.num_swap_blocks
        if config.preemption == "recompute" or config.reservation != "paged":
            num_swap_blocks = 0
        return cls(config.block_size, num_blocks, config.prefix_caching, num_swap_blocks)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)
