"""What routes came to is counted once a request, and told to who asks."""

from __future__ import annotations

import contextvars

import pytest

from app.balancer import Placement, RequestTerms, RouteReceipt
from app.balancer.terms import Refusal
from app.ingress.attempt import Attempt
from app.ingress.demand import Demand
from app.ingress.receipt import Receipt
from app.ingress.request_journal import RequestJournal
from app.ingress.route_accounts import RouteAccounts
from engine.outputs import SequenceOutput
from engine.request import EngineRequest
from engine.sampling_params import SamplingParams


class Learned(Demand):
    def __init__(self) -> None:
        self.prompts: list[tuple[int, int]] = []
        self.answers: list[tuple[int, int]] = []

    def computed(self, prompt_tokens: int, cached_tokens: int) -> None:
        self.prompts.append((prompt_tokens, cached_tokens))

    def ended(self, output_tokens: int, num_sequences: int) -> None:
        self.answers.append((output_tokens, num_sequences))


def make_attempt(num_attempts: int = 1, receipt: Receipt | None = None) -> Attempt:
    request = EngineRequest("r", list(range(64)), SamplingParams(n=2))
    journal = RequestJournal(request, 100, receipt, terms=RequestTerms("batch"))
    journal.num_attempts = num_attempts
    attempt = Attempt(1, journal, request, contextvars.copy_context(), 0, frozenset())
    attempt.waited_s = 0.5
    return attempt


def first(num_cached_tokens: int) -> SequenceOutput:
    return SequenceOutput("r", 0, [5], num_cached_tokens=num_cached_tokens, waited_s=0.75)


def test_each_decision_is_counted() -> None:
    routes = RouteAccounts(Learned())
    decisions = [
        Placement("x", 0),
        Placement(None, 0),
        Placement(None, 0, held=True),
        Placement(None, 0, refusal=Refusal("full", "full", 1)),
    ]
    assert [routes.decided(each) for each in decisions] == ["placed", "unplaced", "held", "refused"]
    counts = routes.counts
    assert (counts.placed, counts.unplaced, counts.held) == (1, 1, 1)


@pytest.mark.parametrize(("cached_tokens", "wrong"), [(32, 0), (17, 0), (16, 1), (0, 1)])
def test_a_route_is_wrong_if_a_block_less_was_cached(cached_tokens: int, wrong: int) -> None:
    routes = RouteAccounts(demand := Learned())
    routes.began(make_attempt(), first(cached_tokens), RouteReceipt("x", 32, 0.0, 0.0), 16)
    assert routes.counts.wrong == wrong
    assert routes.counts.expected_cached_tokens == 32
    assert demand.prompts == [(64, cached_tokens)]


def test_only_the_first_attempt_says_what_prompts_cost() -> None:
    routes = RouteAccounts(demand := Learned())
    routes.began(make_attempt(num_attempts=2), first(0), RouteReceipt("x", 32, 0.0, 0.0), 16)
    routes.began(make_attempt(), first(8), None, None)
    assert routes.counts.expected_cached_tokens == routes.counts.wrong == 0
    assert demand.prompts == [(64, 8)]


def test_a_receipt_tells_the_last_attempt() -> None:
    receipt = Receipt("r")
    routes = RouteAccounts(Learned())
    routes.began(make_attempt(2, receipt), first(16), RouteReceipt("x", 32, 0.125, 0.0), 16)
    assert (receipt.replica, receipt.num_attempts) == ("x", 2)
    assert (receipt.expected_cached_tokens, receipt.cached_tokens) == (32, 16)
    assert (receipt.request_class, receipt.queued_s, receipt.wait_s) == ("batch", 0.5, 0.25)


def test_answers_are_learned_from() -> None:
    routes = RouteAccounts(demand := Learned())
    attempt = make_attempt()
    attempt.journal.add(first(0))
    routes.ended(attempt)
    assert demand.answers == [(1, 2)]
