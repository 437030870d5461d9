"""The engine end to end with random weights, against transformers' continuous batching on the same prompts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.gpu.figures import Figure
from benchmarks.gpu.results import Missing, Rates
from benchmarks.gpu.timeline import profile
from engine import LLM, SamplingParams
from engine.loading import open_checkpoint
from engine.model_config import ModelConfig
from engine.request import EngineRequest


class ServingResult(NamedTuple):
    """One model on one engine.

    Attributes:
        tokens_per_s: generated, with `batch` requests at once.
    """

    model: str
    by: str
    batch: int
    load_s: float
    tokens_per_s: float

    def line(self) -> str:
        return (
            f"{self.model} {self.by}: {self.tokens_per_s:.0f} tokens/s at batch {self.batch}; "
            f"loaded in {self.load_s:.0f} s"
        )


class StepResult(NamedTuple):
    """Decoding steps of `batch` sequences: how long one takes, and what the device does meanwhile."""

    model: str
    by: str
    batch: int
    step_s: float
    busy: float
    idle_between: float
    idle_within: float

    def line(self) -> str:
        return (
            f"{self.model} {self.by}: {self.step_s * 1e3:.2f} ms a decoding step of {self.batch}; under the profiler "
            f"the device computes {self.busy:.1%} of the time and waits {self.idle_between:.1%} between launches and "
            f"{self.idle_within:.1%} within graphs"
        )


Result = ServingResult | StepResult | Missing | Figure


def serve_model(model: str, rates: Rates, batch: int, num_prompt: int, num_output: int) -> Iterator[Result]:
    """One model on Quire, batch-invariantly too, and on transformers; each as soon as it is known."""
    sizes = (batch, num_prompt, num_output)
    ours = invariant = None
    for item in _quire(model, rates, *sizes):
        ours = item if isinstance(item, ServingResult) else ours
        yield item
    for item in _quire(model, rates, *sizes, batch_invariant=True):
        invariant = item if isinstance(item, ServingResult) else invariant
        yield item
    if ours is not None and invariant is not None:
        name = f"cost of batch_invariant: its throughput over the usual ({model}, batch {batch})"
        yield Figure(name, invariant.tokens_per_s / ours.tokens_per_s)
    theirs = measure_transformers(model, *sizes)  # last: a peer that hangs is cut off with nothing behind it
    yield theirs
    if ours is not None and isinstance(theirs, ServingResult):
        name = f"throughput over transformers' continuous batching ({model}, batch {batch})"
        yield Figure(name, ours.tokens_per_s / theirs.tokens_per_s, least=3.0)


def serve_quantized(model: str, rates: Rates, batch: int, num_prompt: int, num_output: int) -> Iterator[Result]:
    """One model on Quire with 16-bit weights, then with int8 and fp8 ones."""
    throughput: float | None = None
    step_s: dict[int, float] = {}
    for quantization in ("none", "int8", "fp8"):
        for item in _quire(model, rates, batch, num_prompt, num_output, quantization=quantization):
            yield item
            if isinstance(item, ServingResult):
                if quantization == "none":
                    throughput = item.tokens_per_s
                elif throughput is not None:
                    name = f"throughput with {quantization} weights over 16-bit ones ({model}, batch {batch})"
                    yield Figure(name, item.tokens_per_s / throughput)
            elif isinstance(item, StepResult):
                if quantization == "none":
                    step_s[item.batch] = item.step_s
                elif item.batch in step_s:
                    name = f"time of a step of {item.batch} with {quantization} weights over 16-bit ones ({model})"
                    yield Figure(name, item.step_s / step_s[item.batch])


def prompts_of(vocab_size: int, count: int, num_tokens: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(10, vocab_size, num_tokens).tolist() for _ in range(count)]


def _quire(model: str, rates: Rates, batch: int, num_prompt: int, num_output: int, **options: Any) -> Iterator[Result]:
    quantization = options.get("quantization", "none")
    kind = "batch-invariant" if options.get("batch_invariant") else quantization
    name = "quire" if kind == "none" else f"quire, {kind}"
    try:
        yield from measure_quire(model, name, rates, batch, num_prompt, num_output, **options)
    except Exception as error:  # what was measured before stands
        yield Missing(model, name, f"fails: {type(error).__name__}: {error}".splitlines()[0][:200])
    finally:
        torch.cuda.empty_cache()


def measure_quire(
    model: str, name: str, rates: Rates, batch: int, num_prompt: int, num_output: int, **options: Any
) -> Iterator[Result]:
    """Throughput of a batch, then single steps of one sequence and of the batch."""
    began = time.perf_counter()
    fixed: dict[str, Any] = {"max_num_seqs": batch, "max_model_len": 2048, "num_swap_blocks": 64, "device": "cuda"}
    llm = LLM(f"dummy:{model}", **{**fixed, **options})
    load_s = time.perf_counter() - began
    try:
        config = llm.engine.model_config
        params = SamplingParams(max_tokens=num_output, ignore_eos=True, temperature=0.0)
        llm.generate([{"prompt_token_ids": prompts_of(config.vocab_size, 1, 32)[0]}], params, use_tqdm=False)
        prompts = [{"prompt_token_ids": prompt} for prompt in prompts_of(config.vocab_size, batch, num_prompt)]
        began = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        yield ServingResult(model, name, batch, load_s, batch * num_output / (time.perf_counter() - began))
        if options.get("batch_invariant"):
            return
        single = _steps(llm, model, name, 1, num_prompt)
        yield single
        if (quantization := options.get("quantization", "none")) != "none":
            least_s = quantized_bytes(config) / rates.copy_bytes_per_s
            figure = f"batch-1 decoding step over reading the {quantization} weights ({model})"
            yield Figure(figure, single.step_s / least_s)
            return
        least_s = weight_bytes(config) / rates.copy_bytes_per_s
        yield Figure(f"batch-1 decoding step over reading the weights ({model})", single.step_s / least_s, most=1.3)
        full = _steps(llm, model, name, batch, num_prompt)
        yield full
        yield Figure(
            f"the device's idle share between graph replays ({model}, batch {batch})", full.idle_between, most=0.05
        )
    finally:
        llm.engine.close()
        del llm


def weight_bytes(config: ModelConfig) -> int:
    """Of 16-bit weights that every decoding step reads: all, but for an embedding that is not the head's matrix too."""
    embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.embedding_size
    return 2 * (config.num_parameters - embedding)


def quantized_bytes(config: ModelConfig) -> int:
    """Of the weights that a step reads where the layers' are of 8 bits and the head's of 16. Norms and biases, a
    thousandth, count as matrices."""
    return (weight_bytes(config) + 2 * config.vocab_size * config.embedding_size) // 2


def _steps(llm: LLM, model: str, name: str, num_seqs: int, num_prompt: int, num_steps: int = 40) -> StepResult:
    """Decoding steps of sequences that all decode."""
    engine = llm.engine
    # They outlast the prompts' steps, whatever those take.
    params = SamplingParams(max_tokens=engine.max_model_len - num_prompt, ignore_eos=True, temperature=0.0)
    for index, prompt in enumerate(prompts_of(engine.model_config.vocab_size, num_seqs, num_prompt)):
        engine.add_request(EngineRequest(f"steps-{index}", prompt, params))
    while engine.stats().num_waiting or engine.stats().num_running_tokens < num_seqs * num_prompt:
        engine.step()
    for _ in range(5):
        engine.step()
    began = time.perf_counter()
    for _ in range(num_steps):
        engine.step()
    seconds = (time.perf_counter() - began) / num_steps

    def run() -> None:
        for _ in range(20):
            engine.step()

    timeline = profile(run)
    engine.abort_all("abort")
    while engine.has_unfinished_requests:
        engine.step()
    return StepResult(model, name, num_seqs, seconds, *timeline)


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
