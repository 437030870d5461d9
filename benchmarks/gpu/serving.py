"""The engine end to end with random weights, against transformers' continuous batching on the same prompts."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.gpu.results import Missing, Rates
from engine import LLM, SamplingParams
from engine.loading import open_checkpoint
from engine.request import EngineRequest


class ServingResult(NamedTuple):
    """One model on one engine.

    Attributes:
        tokens_per_s: generated, with `batch` requests at once.
        single_step_s: of a decode step of one sequence; `weights_s`, of reading the weights once; 0 where not measured.
        device_share: of a decoding step of the batch, what the device computes; the rest it waits for the host.
    """

    model: str
    by: str
    batch: int
    load_s: float
    tokens_per_s: float
    single_step_s: float = 0.0
    weights_s: float = 0.0
    device_share: float = 0.0


def prompts_of(vocab_size: int, count: int, num_tokens: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(10, vocab_size, num_tokens).tolist() for _ in range(count)]


def measure_quire(
    model: str, rates: Rates, batch: int, num_prompt: int, num_output: int, **options: Any
) -> ServingResult:
    began = time.perf_counter()
    fixed: dict[str, Any] = {"max_num_seqs": batch, "max_model_len": 2048, "num_swap_blocks": 64}
    llm = LLM(f"dummy:{model}", device="cuda", **{**fixed, **options})
    load_s = time.perf_counter() - began
    try:
        config = llm.engine.model_config
        params = SamplingParams(max_tokens=num_output, ignore_eos=True, temperature=0.0)
        llm.generate([{"prompt_token_ids": prompts_of(config.vocab_size, 1, 32)[0]}], params, use_tqdm=False)
        prompts = [{"prompt_token_ids": prompt} for prompt in prompts_of(config.vocab_size, batch, num_prompt)]
        began = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        tokens_per_s = batch * num_output / (time.perf_counter() - began)
        return ServingResult(
            model, "quire", batch, load_s, tokens_per_s,
            single_step_s=_step_seconds(llm, 1, num_prompt)[0],
            weights_s=2 * config.num_parameters / rates.copy_bytes_per_s,
            device_share=_step_seconds(llm, batch, num_prompt)[1],
        )  # fmt: skip
    finally:
        llm.engine.close()
        del llm
        torch.cuda.empty_cache()


def _step_seconds(llm: LLM, num_seqs: int, num_prompt: int, num_steps: int = 50) -> tuple[float, float]:
    """Seconds of a decoding step, and the share of it in which the device computes."""
    engine = llm.engine
    params = SamplingParams(max_tokens=num_steps + 60, ignore_eos=True, temperature=0.0)
    for index, prompt in enumerate(prompts_of(engine.model_config.vocab_size, num_seqs, num_prompt)):
        engine.add_request(EngineRequest(f"steps-{index}", prompt, params))
    while engine.stats().num_waiting or engine.stats().num_running_tokens < num_seqs * num_prompt:
        engine.step()
    for _ in range(5):
        engine.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(5):
            engine.step()
        torch.cuda.synchronize()
    device_s = sum(event.self_device_time_total for event in profiler.key_averages()) / 1e6 / 5
    began = time.perf_counter()
    for _ in range(num_steps - 10):
        engine.step()
    seconds = (time.perf_counter() - began) / (num_steps - 10)
    engine.abort_all("abort")
    while engine.has_unfinished_requests:
        engine.step()
    return seconds, min(1.0, device_s / seconds)


def measure_transformers(model: str, batch: int, num_prompt: int, num_output: int) -> ServingResult | Missing:
    """transformers' generate_batch with random weights of the same shape."""
    try:
        return _run_transformers(model, batch, num_prompt, num_output)
    except Exception as error:  # a peer's failure is a line of the table
        return Missing(model, "transformers", f"fails: {type(error).__name__}: {error}".splitlines()[0][:160])
    finally:
        torch.cuda.empty_cache()


def _run_transformers(model: str, batch: int, num_prompt: int, num_output: int) -> ServingResult:
    from transformers import GenerationConfig

    began = time.perf_counter()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            network = _transformers_model(model).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    load_s = time.perf_counter() - began
    options: dict[str, Any] = {"max_new_tokens": num_output, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    generation = GenerationConfig(**options)  # type: ignore[no-untyped-call]
    vocab_size = network.config.vocab_size
    network.generate_batch(inputs=prompts_of(vocab_size, 2, 32), generation_config=generation)
    prompts = prompts_of(vocab_size, batch, num_prompt)
    began = time.perf_counter()
    outputs = network.generate_batch(inputs=prompts, generation_config=generation)
    seconds = time.perf_counter() - began
    num_tokens = sum(len(output.generated_tokens) for output in outputs.values())
    return ServingResult(model, "transformers", batch, load_s, num_tokens / seconds)


def _transformers_model(model: str) -> Any:
    """A network of the shape that `dummy:` has under the same name."""
    from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

    shape = open_checkpoint(f"dummy:{model}").model_config()
    common: dict[str, Any] = {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "max_position_embeddings": shape.max_position_embeddings,
        "tie_word_embeddings": shape.tie_word_embeddings,
    }
    if shape.architecture == "LlamaForCausalLM":
        return LlamaForCausalLM(  # type: ignore[no-untyped-call]
            LlamaConfig(**common, intermediate_size=shape.intermediate_size, num_key_value_heads=shape.num_kv_heads)
        )
    if shape.architecture == "OPTForCausalLM":
        return OPTForCausalLM(  # type: ignore[no-untyped-call]
            OPTConfig(**common, ffn_dim=shape.intermediate_size, word_embed_proj_dim=shape.embedding_size)
        )
    raise ValueError(f"{model}: no transformers network for {shape.architecture}")
