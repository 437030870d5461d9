"""The adapter for Serve's router, and the contract with the pinned Ray's private methods."""

from __future__ import annotations

import asyncio
import inspect
import warnings
from typing import Any

import pytest

from app.balancer import Balancer, BookingGoneError, CheapestPolicy, Choice, Placement, RequestCost
from app.balancer.fleet import Fleet
from app.balancer.registry import ReplicaInfo, registry
from app.transport.messages import LoadReport

with warnings.catch_warnings():
    # Ray's modules warn of their own use of pydantic when they are imported.
    warnings.simplefilter("ignore")
    import ray
    from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
    from ray.serve.request_router import PendingRequest, RequestRouter

    from app.balancer.router import BookedRequestRouter

pytestmark = pytest.mark.anyio

DEPLOYMENT = DeploymentID(name="engine", app_name="app")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Replica:
    """As much of a RunningReplica as routing looks at."""

    def __init__(self, name: str, queue_len: int = 0) -> None:
        self.replica_id = ReplicaID(unique_id=name, deployment_id=DEPLOYMENT)
        self.replica_metadata = {"host": name}
        self.node_id = "node"
        self.max_ongoing_requests = 10
        self.queue_len = queue_len

    async def get_queue_len(self, *, deadline_s: float) -> int:
        assert deadline_s > 0
        return self.queue_len


class Client:
    """Scripted placements; the last one repeats."""

    def __init__(self, *script: str | Exception | None) -> None:
        self.script = list(script)
        self.asked: list[tuple[int, bool]] = []
        self.lists: list[tuple[ReplicaInfo, ...]] = []
        self.scales_to_zero: bool | None = None

    def described(self, *, scales_to_zero: bool) -> None:
        self.scales_to_zero = scales_to_zero

    def replicas_changed(self, replicas: tuple[ReplicaInfo, ...]) -> None:
        self.lists.append(replicas)

    def place(self, attempt: int, *, refused: bool) -> Placement:
        self.asked.append((attempt, refused))
        answer = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if isinstance(answer, Exception):
            raise answer
        return Placement(answer, len(self.asked))


@pytest.fixture
async def router() -> Any:
    booked = BookedRequestRouter(
        deployment_id=DEPLOYMENT,
        handle_source=DeploymentHandleSource.REPLICA,
        self_actor_id="actor",
        use_replica_queue_len_cache=False,
        initial_backoff_s=0.001,
        max_backoff_s=0.005,
    )
    booked.initialize_state(scales_to_zero=True)
    yield booked
    booked.update_replicas([])
    booked.initialize_state()
    registry.unregister("client")


def pending(attempt: int = 1, **kwargs: Any) -> PendingRequest:
    metadata = RequestMetadata(request_id="r", internal_request_id="the same for all calls of one HTTP request")
    return PendingRequest(args=[], kwargs={"ingress_id": "client", "attempt": attempt, **kwargs}, metadata=metadata)


async def choose(router: BookedRequestRouter, request: PendingRequest, *, is_retry: bool = False) -> str:
    async with asyncio.timeout(3):
        replica = await router._choose_replica_for_request(request, is_retry=is_retry)
    name: str = replica.replica_id.unique_id
    return name


def test_the_contract_with_the_pinned_ray() -> None:
    """If this fails after an upgrade of Ray: read router.py against the new source before mending it."""
    assert ray.__version__ == "2.60.0"
    signature = inspect.signature(RequestRouter._choose_replica_for_request)
    assert list(signature.parameters) == ["self", "pending_request", "is_retry"]
    assert signature.parameters["is_retry"].kind is inspect.Parameter.KEYWORD_ONLY
    assert inspect.iscoroutinefunction(RequestRouter._choose_replica_for_request)
    assert inspect.signature(BookedRequestRouter._choose_replica_for_request).parameters.keys() == (
        signature.parameters.keys()
    )
    assert list(inspect.signature(RequestRouter._backoff).parameters) == ["self", "attempt"]
    assert list(inspect.signature(RequestRouter.update_replicas).parameters) == ["self", "replicas"]
    assert isinstance(RequestRouter._replicas_updated_event, property)
    caller = inspect.getsource(ray.serve._private.router.AsyncioRouter._route_and_send_request_once)
    assert "_choose_replica_for_request(\n                    pr, is_retry=is_retry" in caller


async def test_a_booking_is_obeyed_whatever_the_queues(router: Any) -> None:
    registry.register("client", "app#engine", Client("b"))
    router.update_replicas([Replica("a"), Replica("b", queue_len=10)])
    assert await choose(router, pending()) == "b"


async def test_calls_of_one_http_request_are_told_apart(router: Any) -> None:
    client = Client("a")
    registry.register("client", "app#engine", client)
    router.update_replicas([Replica("a")])
    names = await asyncio.gather(*(choose(router, pending(attempt)) for attempt in range(16)))
    assert names == ["a"] * 16
    assert sorted(client.asked) == [(attempt, False) for attempt in range(16)]


async def test_a_refused_call_asks_again(router: Any) -> None:
    client = Client("b")
    registry.register("client", "app#engine", client)
    router.update_replicas([Replica("a"), Replica("b")])
    assert await choose(router, pending(), is_retry=True) == "b"
    assert client.asked == [(1, True)]


async def test_a_replica_that_vanished_is_refused(router: Any) -> None:
    client = Client("gone", "a")
    registry.register("client", "app#engine", client)
    router.update_replicas([Replica("a")])
    assert await choose(router, pending()) == "a"
    assert client.asked == [(1, False), (1, True)]


async def test_at_zero_replicas_a_call_waits(router: Any) -> None:
    client = Client(None, "a")
    registry.register("client", "app#engine", client)
    waiting = asyncio.get_running_loop().create_task(choose(router, pending()))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    assert client.asked == [(1, False)]
    router.update_replicas([Replica("a")])
    assert await waiting == "a"


async def test_waiting_for_a_connection_backs_off(router: Any) -> None:
    client = Client(None)
    registry.register("client", "app#engine", client)
    router.update_replicas([Replica("a")])
    waiting = asyncio.get_running_loop().create_task(choose(router, pending()))
    await asyncio.sleep(0.1)
    assert 5 <= len(client.asked) <= 100
    client.script = ["a"]
    assert await waiting == "a"


@pytest.mark.parametrize("error", [BookingGoneError(1), ZeroDivisionError("cost")])
async def test_an_error_fails_the_call_and_hangs_nothing(router: Any, error: Exception) -> None:
    registry.register("client", "app#engine", Client(error))
    router.update_replicas([Replica("a")])
    with pytest.raises(type(error)):
        await choose(router, pending())


async def test_a_call_without_a_booking_goes_to_the_shortest_queue(router: Any) -> None:
    router.update_replicas([Replica("a", queue_len=3), Replica("b", queue_len=1)])
    assert await choose(router, pending(ingress_id="somebody else")) == "b"


async def test_clients_learn_of_replicas_early_and_late(router: Any) -> None:
    early, late = Client("a"), Client("a")
    registry.register("client", "app#engine", early)
    router.update_replicas([Replica("a"), Replica("b")])
    registry.register("late", "app#engine", late)
    registry.register("other", "app#other", other := Client("a"))
    expected = (ReplicaInfo("a", {"host": "a"}), ReplicaInfo("b", {"host": "b"}))
    assert early.lists[-1] == late.lists[-1] == expected
    assert other.lists == []
    assert (early.scales_to_zero, late.scales_to_zero, other.scales_to_zero) == (True, True, None)
    registry.unregister("late")
    registry.unregister("other")


class BalancedClient(Client):
    """Placements by a balancer that knows the replicas, all of them idle; "b" holds the prompt of every request."""

    CHAIN = tuple(f"block {number}".encode() for number in range(20))

    def __init__(self, balancer: Balancer) -> None:
        super().__init__(None)
        self.balancer = balancer
        load = LoadReport(num_blocks=100, num_free_blocks=100, prefill_tokens_per_s=1000.0)
        for name in ("a", "b", "c"):
            balancer.add_replica(name, 16, load)
        balancer.blocks_changed("b", self.CHAIN, ())

    def book(self, attempt: int) -> str | None:
        return self.balancer.book(attempt, RequestCost(16 * 20 + 1, 20, 1, self.CHAIN)).replica_id

    def place(self, attempt: int, *, refused: bool) -> Placement:
        self.asked.append((attempt, refused))
        return self.balancer.place(attempt, refused=refused)


async def test_a_full_favourite_is_left_and_nothing_hangs(router: Any) -> None:
    client = BalancedClient(Balancer())
    registry.register("client", "app#engine", client)
    router.update_replicas([Replica(name) for name in ("a", "b", "c")])
    assert client.book(1) == "b"
    assert await choose(router, pending(1)) == "b"
    assert await choose(router, pending(1), is_retry=True) in ("a", "c")
    assert client.balancer.bookings_at("b") == []


async def test_a_replica_that_dies_at_the_moment_of_choice(router: Any) -> None:
    client = BalancedClient(Balancer())
    registry.register("client", "app#engine", client)
    router.update_replicas([Replica(name) for name in ("a", "b", "c")])
    assert client.book(1) == "b"
    # Serve knows first ...
    router.update_replicas([Replica("a"), Replica("c")])
    assert await choose(router, pending(1)) in ("a", "c")
    # ... or the ingress, whose line broke.
    assert client.book(2) == "b"
    assert client.balancer.remove_replica("b") == [2]
    assert await choose(router, pending(2)) in ("a", "c")


async def test_an_exception_in_the_cost_costs_no_request(router: Any) -> None:
    class Broken(CheapestPolicy):
        def choose(self, request: RequestCost, fleet: Fleet, among: int) -> Choice:
            raise ZeroDivisionError(f"{request.prompt_tokens} tokens, {len(fleet)} replicas, {among}")

    client = BalancedClient(Balancer(Broken()))
    registry.register("client", "app#engine", client)
    router.update_replicas([Replica(name) for name in ("a", "b", "c")])
    names = [client.book(attempt) for attempt in range(6)]
    assert sorted(map(str, names)) == ["a", "a", "b", "b", "c", "c"]
    assert [await choose(router, pending(attempt)) for attempt in range(6)] == names


async def test_sixteen_calls_of_one_http_request_with_their_own_bookings(router: Any) -> None:
    client = BalancedClient(Balancer())
    registry.register("client", "app#engine", client)
    router.update_replicas([Replica(name) for name in ("a", "b", "c")])
    booked = [client.book(attempt) for attempt in range(16)]
    assert await asyncio.gather(*(choose(router, pending(attempt)) for attempt in range(16))) == booked
