"""The other ranks of a tensor-parallel replica as Ray actors, one in each further bundle of its placement group."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from app.telemetry.logs import LogOrigin, configure_rank_logs
from engine.control import Invitation, serve_rank
from engine.errors import ConfigError

logger = logging.getLogger("ray.serve")

_STOP_S = 10.0


class RankActor:
    """The process of one rank. It ends with the replica that made it, which owns it."""

    def serve(self, invitation: tuple[str, int, str, int], origin: LogOrigin | None) -> None:
        """Run until rank 0 says so, or has gone. Its failures reach rank 0 by the control channel."""
        if origin is not None:
            configure_rank_logs(LogOrigin(*origin), invitation[3])
        from engine.build import load_worker

        serve_rank(Invitation(*invitation), load_worker)

    def pid(self) -> int:
        """Of this process."""
        return os.getpid()


class RankActors:
    """A WorkerLauncher over a placement group: rank r goes into bundle r, with all that the bundle has.

    Args:
        origin: where the replica logs; its ranks then log beside it.
    """

    def __init__(self, host: str, group: PlacementGroup | None, size: int, origin: LogOrigin | None = None) -> None:
        if group is None or group.bundle_count < size:
            have = 0 if group is None else group.bundle_count
            raise ConfigError(f"tensor_parallel_size={size} needs a placement group of as many bundles, not of {have}")
        self.host = host
        self._group = group
        self._origin = origin
        self._actors: dict[int, Any] = {}
        self._calls: dict[int, Any] = {}

    def launch(self, invitations: Sequence[Invitation]) -> None:
        """See WorkerLauncher."""
        for invitation in invitations:
            actor = self._make_actor(invitation.rank)
            self._actors[invitation.rank] = actor
            self._calls[invitation.rank] = actor.serve.remote(tuple(invitation), self._origin)

    def ended(self, rank: int) -> str | None:
        """See WorkerLauncher."""
        ready, _ = ray.wait([self._calls[rank]], timeout=0)
        if not ready:
            return None
        try:
            ray.get(ready[0])
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "it returned"

    def close(self) -> None:
        """See WorkerLauncher. Serve removes the placement group once the replica has stopped."""
        if self._calls:
            ray.wait(list(self._calls.values()), num_returns=len(self._calls), timeout=_STOP_S)
        for rank, actor in self._actors.items():
            with contextlib.suppress(Exception):  # it may have died long ago
                ray.kill(actor)
            logger.info("rank %d has ended", rank)
        self._actors.clear()
        self._calls.clear()

    def _make_actor(self, rank: int) -> Any:
        bundle = dict(self._group.bundle_specs[rank])
        return (
            ray.remote(RankActor)
            .options(
                num_cpus=bundle.pop("CPU", 0),
                num_gpus=bundle.pop("GPU", 0),
                memory=bundle.pop("memory", None),
                resources=bundle,
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._group, placement_group_bundle_index=rank, placement_group_capture_child_tasks=True
                ),
            )
            .remote()
        )
