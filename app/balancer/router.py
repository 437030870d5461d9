"""The request router of the engine deployment: obeys the balancer's booking. The one file here that knows Ray.

It overrides `RequestRouter._choose_replica_for_request`, which is private: Ray is pinned, and
tests/app/balancer/test_router.py fails when its shape changes. The public `choose_replicas` will not do: it runs again
on every back-off, never at zero replicas, and loses calls that share a request id.
"""

from __future__ import annotations

import asyncio

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

# With no replica to wait for, look again after this: the balancer may know of one before Serve's long poll does.
_IDLE_WAIT_S = 1.0


class BookedRequestRouter(RequestRouter):
    """Sends each call to the replica that its client has booked.

    The call's `ingress_id` and `attempt` arguments name the booking. After a refusal (full, dead, vanished) it asks
    the balancer again, which moves the booking. Calls that carry no booking fall back to the shortest queue.
    """

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        # By name, not from this module's globals: those are copies, the class having been pickled by value.
        from app.balancer.registry import registry

        client = registry.find(pending_request.kwargs.get("ingress_id"))
        if client is None:
            return await super()._choose_replica_for_request(pending_request, is_retry=is_retry)
        attempt = pending_request.kwargs["attempt"]
        refused = is_retry
        num_waits = 0
        while True:
            # Whatever place() raises fails this call, and with it the attempt: nothing is left hanging.
            placement = client.place(attempt, refused=refused)
            if refused:
                await self._backoff(min(placement.num_moves, 16))
            replica = self._booked(placement.replica_id)
            if replica is not None:
                return replica
            # Booked, yet Serve does not list it: it has just vanished, or is known to the client's router alone.
            refused = placement.replica_id is not None
            if not refused:
                # Waiting for a first replica to start is no failure, after which to look less often.
                num_waits = num_waits + 1 if self._replicas else 0
                await self._wait_for_replicas(num_waits)

    def _booked(self, replica_id: str | None) -> RunningReplica | None:
        if replica_id is None:
            return None
        return self._replicas.get(ReplicaID(unique_id=replica_id, deployment_id=self._deployment_id))

    async def _wait_for_replicas(self, num_waits: int) -> None:
        if self._replicas:
            # Serve lists replicas, but no client is connected to one that may take this request.
            await self._backoff(min(num_waits, 16))
            return
        self._replicas_updated_event.clear()
        try:
            async with asyncio.timeout(_IDLE_WAIT_S):
                await self._replicas_updated_event.wait()
        except TimeoutError:
            pass

    def initialize_state(self, *, scales_to_zero: bool = False) -> None:  # type: ignore[override]  # our own kwargs
        """What the deployment's own config says of it, which Serve's controller tells whether or not a replica runs,
        also to handles of other applications. Later changes come with the replicas' metadata."""
        from app.balancer.registry import deployment_key, registry

        key = deployment_key(self._deployment_id.app_name, self._deployment_id.name)
        registry.describe(key, scales_to_zero=scales_to_zero)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Serve's list has changed: adopt it, then tell the clients, so that a booking never precedes the replica."""
        super().update_replicas(replicas)
        from app.balancer.registry import ReplicaInfo, deployment_key, registry

        key = deployment_key(self._deployment_id.app_name, self._deployment_id.name)
        infos = tuple(ReplicaInfo(item.replica_id.unique_id, item.replica_metadata) for item in replicas)
        registry.publish(key, infos)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """For calls without a booking: one rank of all replicas, of which Serve takes the shortest queue."""
        if pending_request is not None:
            # Without it Serve would ask again at once, for ever, while all are full.
            pending_request.routing_context.should_backoff = True
        return [candidate_replicas]
