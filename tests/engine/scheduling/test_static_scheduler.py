from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings

from engine.sampling_params import SamplingParams
from tests.engine.doubles import expected_tokens, make_engine, make_request, run_to_end
from tests.engine.scheduling.test_scheduler import SchedulerMachine


def test_a_batch_runs_to_its_end_before_the_next_one_starts() -> None:
    engine, device = make_engine(num_blocks=256, max_num_seqs=3, batching="static")
    for index in range(5):
        engine.add_request(make_request(str(index), [index], max_tokens=2 + 3 * index))
    active = []
    while engine.has_unfinished_requests:
        active.append(sorted(output.request_id for output in engine.step()))
    # Longest outputs 8 and 14: the seats of those that end sooner stay empty.
    assert active == [["0", "1", "2"]] * 2 + [["1", "2"]] * 3 + [["2"]] * 3 + [["3", "4"]] * 11 + [["4"]] * 3
    assert device.largest_batch == 3


def test_who_comes_while_a_batch_runs_waits_for_the_next() -> None:
    engine, _ = make_engine(num_blocks=256, batching="static")
    engine.add_request(make_request("first", [1], max_tokens=4))
    engine.step()
    engine.add_request(make_request("second", [2], max_tokens=1))
    order = [output.request_id for _ in range(4) for output in engine.step()]
    assert order == ["first"] * 3 + ["second"]


def test_a_batch_is_one_though_its_prompts_take_several_steps() -> None:
    engine, _ = make_engine(num_blocks=256, max_num_batched_tokens=8, batching="static")
    for name in ("a", "b", "c"):
        engine.add_request(make_request(name, [ord(name)] * 12, max_tokens=3))
    engine.step()
    assert (engine.stats().num_running, engine.stats().num_waiting) == (3, 0)
    tokens = run_to_end(engine)
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    assert tokens == {(name, 0): expected_tokens([ord(name)] * 12, params) for name in "abc"}


@pytest.mark.parametrize("reservation", ["paged", "orca_max"])
def test_a_batch_is_bounded_by_memory(reservation: str) -> None:
    engine, device = make_engine(num_blocks=32, max_model_len=32, batching="static", reservation=reservation)
    for index in range(8):
        engine.add_request(make_request(str(index), [index] * 20, max_tokens=4))
    run_to_end(engine)
    assert device.largest_batch == {"paged": 6, "orca_max": 4}[reservation]


def test_a_group_that_comes_back_from_the_host_is_not_overtaken_by_the_rest_of_its_batch() -> None:
    """Once, a whole batch was admitted before any of it was scheduled, and took the blocks that it needed to go on."""
    engine, _ = make_engine(
        num_blocks=11,
        max_num_batched_tokens=15,
        max_num_seqs=4,
        batching="static",
        preemption="swap",
        num_swap_blocks=4,
    )
    requests = [
        (1, 4, 1, 1),
        (0, 1, 1, 3),
        (0, 1, 4, 1),
        (0, 14, 4, 1),
        (0, 11, 7, 2),
        (1, 16, 6, 1),
        (2, 9, 1, 1),
        (0, 1, 1, 1),
        (0, 5, 1, 1),
    ]
    for index, (seed, length, max_tokens, n) in enumerate(requests):
        engine.add_request(make_request(str(index), [seed] * length, max_tokens=max_tokens, n=n))
    order = list(run_to_end(engine))
    assert engine.stats().num_swaps > 0, "the pool was meant to be too small"
    assert order == sorted(order)


class StaticMachine(SchedulerMachine):
    """The scheduler's state machine with static batching: the same promises, over paged memory with preemption."""

    def options(self, caching: bool, preemption: str, num_swap_blocks: int) -> dict[str, Any]:
        rest = super().options(caching, preemption, num_swap_blocks)
        return {"batching": "static", **rest}


TestStaticMachine = StaticMachine.TestCase
TestStaticMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
