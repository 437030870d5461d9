"""Ray's routers as the benchmark uses them: bookings follow their choice, texts share what prompts share."""

from __future__ import annotations

import warnings

import pytest

from app.balancer import Balancer, RequestCost
from app.transport.messages import LoadReport
from engine.request import EngineRequest
from engine.sampling_params import SamplingParams

with warnings.catch_warnings():
    # Ray's modules warn of their own use of pydantic when they are imported.
    warnings.simplefilter("ignore")
    from benchmarks.fleet.ray_routers import RayPowerOfTwo, RayPrefixAware, move_booking, text_of


def balancer(*replicas: str) -> Balancer:
    found = Balancer()
    for replica in replicas:
        found.add_replica(replica, 16, LoadReport(num_blocks=10, num_free_blocks=10))
    return found


@pytest.mark.parametrize("chosen", ["a", "b", "c"])
def test_a_booking_follows_the_routers_choice(chosen: str) -> None:
    bookings = balancer("a", "b", "c")
    bookings.book(1, RequestCost(100, 10))
    move_booking(bookings, 1, chosen, 3)
    assert bookings.replica_of(1) == chosen
    # Asked again after a retry, by another choice.
    move_booking(bookings, 1, "b", 3)
    assert bookings.replica_of(1) == "b"


def test_a_choice_that_the_client_cannot_follow_is_an_error() -> None:
    bookings = balancer("a")
    bookings.book(1, RequestCost(100, 10))
    with pytest.raises(LookupError, match="not connected to replica b"):
        move_booking(bookings, 1, "b", 2)


def test_texts_share_the_prefixes_of_their_prompts() -> None:
    params = SamplingParams(max_tokens=1)
    first, second = (text_of(EngineRequest("r", [1, 2, last], params)) for last in (3, 49151))
    assert first[:2] == second[:2]
    assert first != second
    assert len(first) == 3
    second.encode()


def test_they_are_rays_routers_with_another_ear() -> None:
    for router in (RayPowerOfTwo, RayPrefixAware):
        # The reporting comes first, so that it sees whatever Ray's own method returns.
        assert router.__mro__[1].__name__ == "_Reporting"
        assert router.choose_replicas is router.__mro__[2].choose_replicas  # type: ignore[attr-defined]
