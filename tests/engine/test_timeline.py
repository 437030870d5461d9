from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable

import pytest

from engine.engine import LLMEngine
from engine.timeline import Phase, RequestTimeline
from tests.engine.doubles import make_async_engine, make_engine, make_request, run_to_end


def add_traced(engine: LLMEngine, request_id: str, prompt: list[int], **params: object) -> RequestTimeline:
    timeline = RequestTimeline(time.monotonic())
    engine.add_request(dataclasses.replace(make_request(request_id, prompt, **params), timeline=timeline))
    return timeline


def kinds(timeline: RequestTimeline) -> list[str]:
    return [kind for kind, _ in itertools.groupby(timeline.phases, key=lambda phase: phase.kind)]


def check_order(timeline: RequestTimeline) -> None:
    """Phases follow one another, up to the end."""
    assert timeline.ended_at is not None
    assert all(phase.began <= phase.ended for phase in timeline.phases)
    assert all(before.ended <= after.began for before, after in itertools.pairwise(timeline.phases))
    assert timeline.phases[-1].ended <= timeline.ended_at


@pytest.mark.parametrize("make", [make_engine, make_async_engine])
def test_a_prompt_in_chunks_then_its_tokens(make: Callable[..., tuple[LLMEngine, object]]) -> None:
    engine, _ = make(max_num_batched_tokens=8)
    timeline = add_traced(engine, "a", list(range(20)), max_tokens=5)
    run_to_end(engine)
    assert [phase.kind for phase in timeline.phases] == ["queue", "prefill", "prefill", "prefill", "decode"]
    assert [phase.num_tokens for phase in timeline.phases] == [0, 8, 8, 4, 0]
    assert timeline.first_token_at == timeline.phases[-1].began
    check_order(timeline)


@pytest.mark.parametrize("make", [make_engine, make_async_engine])
@pytest.mark.parametrize(("preemption", "kind"), [("swap", "swapped"), ("recompute", "recompute")])
@pytest.mark.parametrize("n", [1, 3])
def test_preemptions_are_phases(
    make: Callable[..., tuple[LLMEngine, object]], preemption: str, kind: str, n: int
) -> None:
    engine, _ = make(num_blocks=6 + 8 * n, num_swap_blocks=64, preemption=preemption, enable_prefix_caching=False)
    timelines = [add_traced(engine, f"r{i}", [i] * 9, max_tokens=24, n=n) for i in range(4)]
    run_to_end(engine)
    seen = [name for timeline in timelines for name in kinds(timeline)]
    assert seen.count(kind) == engine.stats().num_preemptions > 0
    for timeline in timelines:
        check_order(timeline)
        names = kinds(timeline)
        assert names[:3] == ["queue", "prefill", "decode"]
        # What is swapped in goes on with its tokens; what is recomputed has its tokens so far computed again first.
        after = {"swapped": "decode", "recompute": "prefill"}[kind]
        assert {after} >= {later for earlier, later in itertools.pairwise(names) if earlier == kind}


def test_an_abort_ends_it_wherever_it_is() -> None:
    engine, _ = make_engine(max_num_seqs=1)
    running, waiting = (add_traced(engine, name, [1] * 9) for name in "ab")
    engine.step()
    engine.abort("a")
    engine.abort("b")
    assert kinds(running) == ["queue", "prefill", "decode"]
    assert kinds(waiting) == ["queue"]
    check_order(running)
    check_order(waiting)


def test_what_is_in_flight_when_it_ends_is_not_recorded() -> None:
    engine, _ = make_async_engine(max_num_batched_tokens=4)
    timeline = add_traced(engine, "a", [1] * 16)
    engine.step()
    engine.abort("a")
    run_to_end(engine)
    assert kinds(timeline) == ["queue", "prefill"]
    check_order(timeline)


def test_requests_that_do_not_ask_cost_nothing() -> None:
    engine, _ = make_engine()
    engine.add_request(make_request("a", [1, 2, 3]))
    engine.step()
    assert not engine._timed_chunks


def test_its_size_is_bounded() -> None:
    timeline = RequestTimeline(0.0)
    timeline.started(1.0)
    for step in range(1, 101):
        timeline.computed(float(step), step + 1.0, 10, draws=False)
    assert len(timeline.phases) == 1 + RequestTimeline.MAX_CHUNKS
    assert timeline.phases[-1] == Phase("prefill", 64.0, 101.0, 370)
    for step in range(200, 800):
        timeline.preempted(step, swapped=True)
        timeline.started(step + 0.5)
    timeline.end(900.0)
    assert len(timeline.phases) == RequestTimeline.MAX_PHASES
    assert timeline.num_dropped == 600 - RequestTimeline.MAX_PHASES + 65
