"""Ray's own request routers in front of Quire's replicas: they choose, the ingress's client is told.

The road of a request stays the same under every router, so that only the choice is compared. Selected by a config's
`request_router_config`, in place of app.balancer.router.
"""

from __future__ import annotations

from typing import Protocol

from ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router import PrefixCacheAffinityRouter
from ray.serve._private.request_router.pow_2_router import PowerOfTwoChoicesRequestRouter
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from app.balancer import Placement
from engine.request import EngineRequest

# Past the control characters; token ids end below the surrogates.
_FIRST_CHARACTER = 0x20


class BookingClient(Protocol):
    """The part of RouterClient that is asked here."""

    def place(self, attempt: int, *, refused: bool) -> Placement:
        """As Balancer.place."""
        ...


class _Reporting(RequestRouter):
    """What BookedRequestRouter does for the ingress's clients, beside a router that decides by itself."""

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        # By name: this class is pickled by value, and its module's globals with it.
        from app.balancer.registry import registry
        from benchmarks.fleet.ray_routers import move_booking

        replica: RunningReplica = await super()._choose_replica_for_request(pending_request, is_retry=is_retry)
        client = registry.find(pending_request.kwargs.get("ingress_id"))
        if client is not None:
            move_booking(client, pending_request.kwargs["attempt"], replica.replica_id.unique_id, len(self._replicas))
        return replica

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        from app.balancer.registry import ReplicaInfo, deployment_key, registry

        infos = tuple(ReplicaInfo(item.replica_id.unique_id, item.replica_metadata) for item in replicas)
        registry.publish(deployment_key(self._deployment_id.app_name, self._deployment_id.name), infos)


class RayPowerOfTwo(_Reporting, PowerOfTwoChoicesRequestRouter):
    """Serve's default: of two replicas drawn at random the one with fewer open requests."""


class RayPrefixAware(_Reporting, PrefixCacheAffinityRouter):
    """ray.serve.llm's prefix-aware router, its options as they come. It compares text, and is given some."""

    def _extract_text_from_request(self, pending_request: PendingRequest) -> str:
        from benchmarks.fleet.ray_routers import text_of

        return text_of(pending_request.args[0])


def text_of(request: EngineRequest) -> str:
    """A character for each token: texts share just the prefixes that the prompts share, and are as short as can be."""
    return "".join([chr(_FIRST_CHARACTER + token_id) for token_id in request.prompt_token_ids])


def move_booking(client: BookingClient, attempt: int, replica_id: str, num_replicas: int) -> None:
    """Let a booking follow the choice of another: its own replica is refused until it is the right one.

    Raises:
        LookupError: the client is not connected to that replica.
    """
    placement = client.place(attempt, refused=False)
    for _ in range(2 * num_replicas):
        if placement.replica_id == replica_id:
            return
        placement = client.place(attempt, refused=True)
    raise LookupError(f"the ingress is not connected to replica {replica_id}")
