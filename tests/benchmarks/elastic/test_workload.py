from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.elastic.workload import SHAPE, Lengths, Prices, replicas_at, shaped_load, traced_load

PRICES, LENGTHS = Prices(), Lengths()


def test_the_load_follows_its_line() -> None:
    requests = [request for seed in range(20) for request in shaped_load(SHAPE, PRICES, LENGTHS, seed)]
    for begin, end in ((9.0, 20.0), (35.0, 50.0), (50.0, 66.0), (72.0, 80.0)):
        tokens = sum(request.num_prompt for request in requests if begin <= request.due_s < end)
        replicas = tokens / PRICES.prefill_tokens_per_s / 20 / (end - begin)
        assert replicas == pytest.approx(replicas_at(SHAPE, (begin + end) / 2), rel=0.08)
    assert max(request.due_s for request in requests) < SHAPE[-1][0]


def test_a_load_begins_at_its_first_point_and_is_the_same_for_a_seed() -> None:
    first = shaped_load(SHAPE, PRICES, LENGTHS, 3)
    assert first[0].due_s == SHAPE[0][0]
    assert first == shaped_load(SHAPE, PRICES, LENGTHS, 3) != shaped_load(SHAPE, PRICES, LENGTHS, 4)
    assert shaped_load(((0.0, 0.0), (9.0, 0.0)), PRICES, LENGTHS, 0) == []


@pytest.mark.parametrize("shape", [((2.0, 1.0), (1.0, 1.0)), ((0.0, 1.0), (1.0, -1.0)), ()])
def test_a_line_that_is_none(shape: tuple[tuple[float, float], ...]) -> None:
    with pytest.raises(ValueError, match="a load"):
        shaped_load(shape, PRICES, LENGTHS, 0)


def test_a_trace_in_mooncakes_format(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    rows = ((0, 1600, 160), (3000, 3200, 32), (6000, 160, 16))
    path.write_text(
        "".join(
            f'{{"timestamp": {at}, "input_length": {prompt}, "output_length": {output}, "hash_ids": [1]}}\n'
            for at, prompt, output in rows
        )
    )
    requests = traced_load(path, 2, speed=3.0, scale=1 / 16, seed=0)
    assert [(request.num_prompt, request.num_output) for request in requests] == [(100, 10), (200, 2)]
    assert 0.0 <= requests[0].due_s < 1.0 <= requests[1].due_s < 2.0
