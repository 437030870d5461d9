"""Adapters over two ranks give the tokens that one gives, in float32: B split where the base's outputs are, A where its
inputs are."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from engine import LLMEngine
from engine.errors import ConfigError, ModelLoadError
from engine.outputs import SequenceOutput
from engine.request import EngineRequest
from tests.engine.adapters.peft import GPT2, write_adapter, write_adapters, write_base
from tests.engine.parallel.test_tokens import engine_of
from tests.engine.test_adapters import NAMES, request, run

KERNELS = ["native", "reference"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def adapters(base: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_adapters(tmp_path_factory.mktemp("adapters"), base)


def mixed() -> list[EngineRequest]:
    return [request(name, seed) for seed, name in enumerate(NAMES * 2)]


def options(adapters: dict[str, str], **others: object) -> dict[str, object]:
    return {"num_blocks": 200, "enable_lora": True, "adapters": adapters, **others}


@pytest.mark.parametrize("kernels", KERNELS)
def test_two_ranks_give_the_tokens_of_one(kernels: str, base: str, adapters: dict[str, str]) -> None:
    with engine_of(base, kernels=kernels, **options(adapters)) as engine:
        expected = run(engine, mixed())
    with engine_of(base, kernels=kernels, tensor_parallel_size=2, **options(adapters, max_loras=2)) as engine:
        assert run(engine, mixed()) == expected
        stats = engine.adapter_stats()
        assert stats.num_evictions >= 2, "slots were emptied and filled on both ranks"
        assert_added_while_it_runs(engine, adapters, expected[2])


def assert_added_while_it_runs(engine: LLMEngine, adapters: dict[str, str], expected: object) -> None:
    engine.add_adapter("later", adapters["a1"])
    item = request("later", 2)
    assert run(engine, [item]) == [expected]
    with pytest.raises(ConfigError, match="adapter later is known already"):
        engine.add_adapter("later", adapters["a2"])


def test_a_rank_that_cannot_read_an_adapter_fails_its_requests_and_nothing_else(
    base: str, adapters: dict[str, str], tmp_path: Path
) -> None:
    later = write_adapter(tmp_path / "later", base, 5)
    with engine_of(base, tensor_parallel_size=2, **options(adapters)) as engine:
        expected = run(engine, [request("a0", 1), request("", 2)])
        engine.add_adapter("later", later)  # rank 0 has read it now, the other rank will when it is asked for
        shutil.rmtree(tmp_path / "later")
        doomed = request("later", 3)
        engine.add_request(doomed)
        failed: list[SequenceOutput] = []
        assert run(engine, [request("a0", 1), request("", 2)], failed.append) == expected
        while engine.has_unfinished_requests:
            failed += engine.step()
        (output,) = failed
        assert output.request_id == doomed.request_id
        assert re.search(r"adapter later cannot be loaded: rank 1: .*later: no such folder", str(output.error))
        assert run(engine, [request("a1", 1)]), "and the next adapter is prepared as ever"
        engine.check_health()


@pytest.mark.parametrize("kernels", KERNELS)
def test_fused_and_transposed_weights(kernels: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "gpt2", GPT2)
    folder = write_adapter(tmp_path / "a", base, 5, ("c_attn", "c_proj", "c_fc"), fan_in_fan_out=True)
    requests = [request("a", 1), request("", 2), request("a", 3)]
    with engine_of(base, kernels=kernels, **options({"a": folder})) as engine:
        expected = run(engine, requests)
    with engine_of(base, kernels=kernels, tensor_parallel_size=2, **options({"a": folder})) as engine:
        assert run(engine, [request("a", 1), request("", 2), request("a", 3)]) == expected


def test_an_adapter_that_cannot_be_read_is_said_at_the_start(base: str, tmp_path: Path) -> None:
    with (
        pytest.raises(ModelLoadError, match=r"adapter a: .*gone: no such folder"),
        engine_of(base, tensor_parallel_size=2, **options({"a": str(tmp_path / "gone")})),
    ):
        pass
