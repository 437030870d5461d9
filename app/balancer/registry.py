"""Where the request router, on its own thread, and an ingress's clients, on their loop, meet in one process.

Ray pickles the router's class by value, so that its module's globals are not ours: the router imports this module by
name and finds the clients here.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from app.balancer.booking import Placement


class ReplicaInfo(NamedTuple):
    """A running replica as Serve lists it. `metadata` is what its `record_replica_metadata` returned."""

    replica_id: str
    metadata: Mapping[str, Any]


class RouterClient(Protocol):
    """What the router asks of the client that made a call. Called on the router's thread."""

    def replicas_changed(self, replicas: tuple[ReplicaInfo, ...]) -> None:
        """Serve's list of running replicas has changed; those that stop are no longer in it."""
        ...

    def described(self, *, scales_to_zero: bool) -> None:
        """What the deployment's config says of it."""
        ...

    def place(self, attempt: int, *, refused: bool) -> Placement:
        """As Balancer.place."""
        ...


class Registry:
    """Clients by id, and what is known of each deployment for clients that come later."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._clients: dict[str, tuple[str, RouterClient]] = {}
        self._replicas: dict[str, tuple[ReplicaInfo, ...]] = {}
        self._scales_to_zero: dict[str, bool] = {}

    def register(self, client_id: str, deployment: str, client: RouterClient) -> None:
        """Add a client; it is told at once of what is known so far."""
        with self._lock:
            self._clients[client_id] = (deployment, client)
            if deployment in self._scales_to_zero:
                client.described(scales_to_zero=self._scales_to_zero[deployment])
            replicas = self._replicas.get(deployment)
            if replicas is not None:
                client.replicas_changed(replicas)

    def unregister(self, client_id: str) -> None:
        """Remove a client; unknown ids are no error."""
        with self._lock:
            self._clients.pop(client_id, None)

    def find(self, client_id: object) -> RouterClient | None:
        """The client of that id in this process."""
        with self._lock:
            entry = self._clients.get(client_id) if isinstance(client_id, str) else None
            return entry[1] if entry is not None else None

    def describe(self, deployment: str, *, scales_to_zero: bool) -> None:
        """Tell the deployment's clients what its config says of it."""
        with self._lock:
            self._scales_to_zero[deployment] = scales_to_zero
            for name, client in self._clients.values():
                if name == deployment:
                    client.described(scales_to_zero=scales_to_zero)

    def publish(self, deployment: str, replicas: tuple[ReplicaInfo, ...]) -> None:
        """Tell the deployment's clients of its replicas. Under the lock, so that no older list overtakes a newer."""
        with self._lock:
            self._replicas[deployment] = replicas
            for name, client in self._clients.values():
                if name == deployment:
                    client.replicas_changed(replicas)


registry = Registry()


def deployment_key(app_name: str, deployment_name: str) -> str:
    """The name under which a deployment's router and clients meet."""
    return f"{app_name}#{deployment_name}"
