"""Requests for different adapters and for the base in one batch: their tokens are those of each alone, and of weights
into which PEFT's merge has put the adapter."""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import EngineConfig, LLMEngine, SamplingParams
from engine.adapters import AdapterLoader, LoraAdapter
from engine.errors import AdapterUnavailableError, ConfigError, ModelLoadError, ModelNotFoundError
from engine.outputs import SequenceOutput
from engine.request import EngineRequest
from tests.engine.adapters.peft import GPT2, merge, write_adapter, write_adapters, write_base

EXACT: dict[str, Any] = {"dtype": "float32", "kv_cache_dtype": "float32", "block_size": 4, "num_blocks": 128}
NAMES = ("", "a0", "a1", "a2", "a3")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def adapters(base: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_adapters(tmp_path_factory.mktemp("adapters"), base)


def make(base: str, adapters: dict[str, str], **options: Any) -> LLMEngine:
    return LLMEngine.from_options(
        base, EngineConfig.from_dict({**EXACT, "enable_lora": True, "adapters": adapters, "num_threads": 2, **options})
    )


_ids = itertools.count()


def request(adapter: str, content: int, max_tokens: int = 16, **params: Any) -> EngineRequest:
    prompt = np.random.default_rng(content).integers(0, 512, 9 + content % 7).tolist()
    sampling = SamplingParams(**{"temperature": 0.0, "ignore_eos": True, "max_tokens": max_tokens, **params})
    return EngineRequest(f"{adapter}-{next(_ids)}", prompt, sampling, adapter=adapter)


def run(
    engine: LLMEngine, requests: list[EngineRequest], others: Callable[[SequenceOutput], None] = lambda _: None
) -> list[dict[int, list[int]]]:
    """Each request's tokens by sample. `others` gets what is of no request of these."""
    found: dict[str, dict[int, list[int]]] = {item.request_id: {} for item in requests}
    for item in requests:
        engine.add_request(item)
    left = set(found)
    while left:
        for output in engine.step():
            if output.request_id in found:
                found[output.request_id].setdefault(output.index, []).extend(output.token_ids)
                if output.request_finished:
                    left.remove(output.request_id)
            else:
                others(output)
        engine.check_invariants()
    return [found[item.request_id] for item in requests]


RUNNERS = ("native", "reference")


@pytest.mark.parametrize("kernels", RUNNERS)
def test_a_mixed_batch_gives_each_request_the_tokens_that_it_gets_alone_and_from_merged_weights(
    kernels: str, base: str, adapters: dict[str, str], tmp_path: Path
) -> None:
    engine = make(base, adapters, kernels=kernels)
    wanted = [request(name, seed) for seed, name in enumerate(NAMES * 2)]
    mixed = run(engine, wanted)
    assert len({tuple(tokens[0]) for tokens in mixed}) == len(mixed)
    alone = [run(engine, [request(name, seed)])[0] for seed, name in enumerate(NAMES * 2)]
    assert mixed == alone
    for i, name in enumerate(NAMES):
        source = merge(tmp_path / name, base, adapters[name]) if name else base
        merged = LLMEngine.from_options(source, EngineConfig.from_dict({**EXACT, "kernels": kernels}))
        expected = run(merged, [request("", i), request("", i + len(NAMES))])
        assert [mixed[i], mixed[i + len(NAMES)]] == expected, f"adapter {name!r}"
        of_base = run(engine, [request("", i)])
        assert not name or mixed[i] != of_base[0], "the adapter is too small for this test to tell"


@pytest.mark.parametrize("kernels", RUNNERS)
def test_an_adapter_of_fused_and_transposed_weights_equals_its_merge(kernels: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "gpt2", GPT2)
    targets = ("c_attn", "c_proj", "c_fc")
    adapter = write_adapter(tmp_path / "a", base, 1, targets, 6, fan_in_fan_out=True)
    engine = make(base, {"a": adapter}, kernels=kernels)
    found = run(engine, [request("a", 1), request("", 2), request("a", 3)])
    merged = LLMEngine.from_options(merge(tmp_path / "m", base, adapter), EngineConfig(**EXACT, kernels=kernels))
    assert [found[0], found[2]] == run(merged, [request("", 1), request("", 3)])
    assert found[1] != run(merged, [request("", 2)])[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_native_engine_computes_the_same_logits_whatever_the_batch(
    dtype: str, base: str, adapters: dict[str, str]
) -> None:
    """Log-probabilities to the bit: with other adapters beside it, in other chunks, and on other numbers of threads."""
    options = {"kernels": "native", "dtype": dtype, "enable_prefix_caching": False}

    def logprobs(engine: LLMEngine, beside: list[str]) -> list[float]:
        wanted = request("a3", 5, 6, logprobs=0)
        for item in [*(request(name, 20 + i, 8) for i, name in enumerate(beside)), wanted]:
            engine.add_request(item)
        values = []
        while engine.has_unfinished_requests:
            for output in engine.step():
                if output.request_id == wanted.request_id:
                    values += [item.logprob for item in output.logprobs or ()]
        return values

    alone = logprobs(make(base, adapters, **options, num_threads=1), [])
    mixed = make(base, adapters, **options, num_threads=2)
    assert logprobs(mixed, ["a0", "a3", "", "a1", "a3", "a2", *["a3"] * 30]) == alone
    assert logprobs(make(base, adapters, **options, max_num_batched_tokens=5), ["a3"]) == alone
    assert len(alone) == 6


@pytest.mark.parametrize("preemption", ["swap", "recompute"])
def test_tokens_survive_preemption_with_their_adapters(preemption: str, base: str, adapters: dict[str, str]) -> None:
    methods: list[dict[str, Any]] = [
        {},
        {"n": 3, "temperature": 1.0, "seed": 7},
        {"n": 2, "use_beam_search": True},
    ]

    def requests() -> list[EngineRequest]:
        pairs = itertools.product(methods, NAMES[1:])
        return [request(name, seed, 24, **method) for seed, (method, name) in enumerate(pairs)]

    roomy = run(make(base, adapters, num_blocks=512), requests())
    tight = make(base, adapters, num_blocks=44, max_model_len=48, num_swap_blocks=64, preemption=preemption)
    assert run(tight, requests()) == roomy
    stats = tight.stats()
    assert stats.num_preemptions > 5
    assert (stats.num_swaps > 0) == (preemption == "swap")


def test_more_adapters_than_slots_wait_their_turn_and_the_least_recently_used_goes(
    base: str, adapters: dict[str, str]
) -> None:
    roomy = run(make(base, adapters), [request(name, seed) for seed, name in enumerate(NAMES * 2)])
    engine = make(base, adapters, max_loras=1)
    assert run(engine, [request(name, seed) for seed, name in enumerate(NAMES * 2)]) == roomy
    stats = engine.adapter_stats()
    assert (stats.num_loads, stats.num_evictions, stats.resident) == (8, 7, ("a3",))
    two = make(base, adapters, max_loras=2)
    for name in ("a0", "a1", "a0", "a2", "a0", "a1"):
        run(two, [request(name, 1, 2)])
    assert two.adapter_stats().resident == ("a0", "a1")
    assert two.adapter_stats().num_loads == 4, "a0 stayed, as its last use was always the more recent one"


def test_who_waits_for_a_slot_holds_up_nobody_who_needs_none(base: str, adapters: dict[str, str]) -> None:
    engine = make(base, adapters, max_loras=1)
    names = ("a1", "")
    wanted = {name: request(name, seed) for seed, name in enumerate(names)}
    alone = {name: run(make(base, adapters), [request(name, seed)])[0][0] for seed, name in enumerate(names)}
    engine.add_request(request("a0", 7, 40))
    for item in wanted.values():
        engine.add_request(item)
    tokens: dict[str, list[int]] = {item.request_id: [] for item in wanted.values()}
    ended: list[str] = []
    while wanted["a1"].request_id not in ended:
        # Requests for the resident adapter without end: a1 must not wait for the last of them.
        if engine.stats().num_running < 3:
            engine.add_request(request("a0", len(ended), 8))
        for output in engine.step():
            if output.request_id in tokens:
                tokens[output.request_id] += output.token_ids
            ended += [output.request_id] * output.request_finished
        engine.check_invariants()
        assert len(ended) < 40, "a1 starves"
    assert ended[0] == wanted[""].request_id, "the base needs nothing"
    assert {name: tokens[item.request_id] for name, item in wanted.items()} == alone


def test_steps_go_on_while_an_adapter_is_loaded(base: str, adapters: dict[str, str]) -> None:
    engine = make(base, adapters)
    go, prepare = threading.Event(), engine._executor.prepare_adapter

    def prepare_when_told(adapter: LoraAdapter) -> object:
        assert go.wait(60)
        return prepare(adapter)

    engine._adapters._loader = AdapterLoader(prepare_when_told)
    wanted = request("a1", 1)
    engine.add_request(wanted)
    assert engine.step() == []
    assert engine.has_unfinished_requests
    assert len(run(engine, [request("", 3, 6)])[0][0]) == 6
    assert engine.stats().num_waiting == 1
    assert engine.stats().adapters.resident == ("a1",)
    go.set()
    tokens: list[int] = []
    while engine.has_unfinished_requests:
        tokens += [token for output in engine.step() for token in output.token_ids]
    assert tokens == run(make(base, adapters), [request("a1", 1)])[0][0]
    assert engine.adapter_stats().load_s > 0


@pytest.mark.parametrize("options", [{}, {"async_scheduling": True}])
def test_an_adapter_that_cannot_be_read_any_more_fails_its_requests_and_nothing_else(
    options: dict[str, Any], base: str, adapters: dict[str, str], tmp_path: Path
) -> None:
    broken = write_adapter(tmp_path / "broken", base, 3)
    engine = make(base, {"a0": adapters["a0"], "broken": broken}, **options)
    (tmp_path / "broken" / "adapter_model.safetensors").write_bytes(b"")
    well = [request("a0", 1), request("", 2)]
    doomed = [request("broken", 3), request("broken", 4, n=2)]
    for item in (*well, *doomed):
        engine.add_request(item)
    tokens: dict[str, list[int]] = {item.request_id: [] for item in well}
    failed: dict[str, list[int]] = {}
    while engine.has_unfinished_requests:
        for output in engine.step():
            if output.error is None:
                tokens[output.request_id] += output.token_ids
                continue
            assert isinstance(output.error, AdapterUnavailableError)
            assert re.match(r"adapter broken cannot be loaded: .* has changed since", str(output.error))
            assert output.finish_reason == "error"
            failed.setdefault(output.request_id, []).append(output.index)
        engine.check_invariants()
    assert failed == {doomed[0].request_id: [0], doomed[1].request_id: [0, 1]}
    expected = run(make(base, adapters), [request("a0", 1), request("", 2)])
    assert list(tokens.values()) == [item[0] for item in expected]
    stats = engine.adapter_stats()
    assert (stats.resident, stats.num_loads, stats.num_failures) == (("a0",), 1, 1)


@pytest.mark.parametrize("kernels", RUNNERS)
def test_cached_prefixes_are_an_adapters_own(kernels: str, base: str, adapters: dict[str, str]) -> None:
    engine = make(base, adapters, kernels=kernels)
    for name in ("", "a0"):
        for is_cached in (False, True):
            before = engine.stats().num_cached_tokens
            run(engine, [request(name, 6)])
            assert (engine.stats().num_cached_tokens > before) == is_cached


def test_an_adapter_can_be_added_while_the_engine_runs(base: str, adapters: dict[str, str]) -> None:
    engine = make(base, {})
    with pytest.raises(ModelNotFoundError, match="the adapter 'a1' does not exist"):
        engine.add_request(request("a1", 0))
    engine.add_request(request("", 1, 30))
    engine.step()
    engine.add_adapter("a1", adapters["a1"])
    engine.add_adapter("a1", adapters["a1"])
    assert engine.adapter_names == ["a1"]
    assert run(engine, [request("a1", 0)]) == run(make(base, adapters), [request("a1", 0)])
    with pytest.raises(ConfigError, match="adapter a1 is known already"):
        engine.add_adapter("a1", adapters["a2"])
    with pytest.raises(ConfigError, match="must begin with a letter"):
        engine.add_adapter("a:1", adapters["a2"])


def test_engines_refuse_adapters_that_they_cannot_hold(base: str, adapters: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"adapter a0 takes .* more than adapter_memory=1000"):
        make(base, adapters, adapter_memory=1000)
    with pytest.raises(ModelLoadError, match=r"rank 20 of .* is above max_lora_rank=16"):
        make(base, adapters, max_lora_rank=16)
    plain = LLMEngine.from_options(base, EngineConfig(**EXACT))
    with pytest.raises(ConfigError, match="set enable_lora=true"):
        plain.add_adapter("a0", adapters["a0"])
