"""The engine deployment: one replica is one engine, its sockets, and the calls that Serve counts."""

from __future__ import annotations

import logging
import os
import time
import uuid
from typing import Any

import ray
from ray import serve

from app.autoscaling.start_failures import note_failed_start, note_start
from app.replica.counters import replica_counters
from app.replica.rank_actors import RankActors
from app.replica.service import ReplicaService
from app.replica.stream_server import StreamServer
from app.telemetry.logs import join_logs, logged_as, origin_of_replica
from app.telemetry.model_samples import counter_samples
from app.telemetry.node_agent import NodeAgentExport
from app.telemetry.tracing import trace_id_of, tracing_from_environment
from app.transport.cluster_secret import cluster_secret
from app.transport.handshake import MAX_VERSION, MIN_VERSION
from engine.async_engine import AsyncLLMEngine
from engine.config import EngineConfig
from engine.request import EngineRequest

logger = logging.getLogger("ray.serve")

# Seconds between two lines of progress of one phase.
_PROGRESS_INTERVAL_S = 3.0


class EngineReplica:
    """Serve's face of a replica. Ready, in Serve's eyes, once a warm-up step has run.

    Args:
        model_id: what users call the model.
        source: where its weights are.
        engine_options: of EngineConfig.
        agent_metrics_s: how often Ray's agent is told what it counts; None for never.
    """

    def __init__(
        self,
        model_id: str,
        source: str,
        engine_options: dict[str, Any] | None = None,
        agent_metrics_s: float | None = None,
    ) -> None:
        # Serve runs this on the user-code thread, so that loading holds up neither its health checks nor its RPCs.
        context = serve.get_replica_context()
        try:
            self._load(model_id, source, engine_options, agent_metrics_s)
        except Exception as error:
            # For those who wait for a replica; the log has it from Serve.
            note_failed_start(context.app_name, context.deployment, error)
            raise
        note_start(context.app_name, context.deployment)

    def _load(
        self, model_id: str, source: str, engine_options: dict[str, Any] | None, agent_metrics_s: float | None
    ) -> None:
        began = time.monotonic()
        origin = origin_of_replica()
        join_logs(origin.logging_config)
        self.model_id = model_id
        logger.info("Model %s: loading %s", model_id, source)
        config = EngineConfig.from_dict(engine_options or {})
        context = serve.get_replica_context()
        self._tracing = tracing_from_environment(
            "engine", context.replica_id.unique_id, {"quire.model": model_id, "quire.deployment": context.deployment}
        )
        launcher = None
        if config.tensor_parallel_size > 1:
            launcher = RankActors(
                _node_ip(), ray.util.get_current_placement_group(), config.tensor_parallel_size, origin
            )
        self._engine = AsyncLLMEngine.from_options(source, config, ProgressLog(model_id), launcher)
        self._engine.warm_up()
        self._epoch = uuid.uuid4().hex
        self._server = StreamServer(_node_ip(), self._epoch, cluster_secret())
        self._service = ReplicaService(self._engine, self._server, model_id, self._tracing)
        self._service.start()
        self._agent_export: NodeAgentExport | None = None
        if agent_metrics_s is not None:
            engine, replica_id = self._engine, context.replica_id.unique_id
            self._agent_export = NodeAgentExport(
                lambda: counter_samples(model_id, replica_id, replica_counters(engine.accounts())), agent_metrics_s
            )
            self._agent_export.start()
        cache = self._engine.cache_config
        simulated = config.simulated_device
        logger.info(
            "Model %s: ready after %.1f s, %d tokens at most, %d KV blocks of %d%s",
            model_id,
            time.monotonic() - began,
            self._engine.max_model_len,
            cache.num_blocks,
            cache.block_size,
            f", on a SIMULATED device ({simulated}): its tokens mean nothing" if simulated else "",
        )

    def record_replica_metadata(self) -> dict[str, Any]:
        """What each ingress learns of this replica: where to dial, and what its model can do."""
        config = serve.get_replica_context()._deployment_config
        return {
            "host": self._server.host,
            "port": self._server.port,
            "epoch": self._epoch,
            "pid": os.getpid(),
            "protocol": [MIN_VERSION, MAX_VERSION],
            "model_id": self.model_id,
            "max_model_len": self._engine.max_model_len,
            "fingerprint": self._engine.model_config.fingerprint,
            "simulated": self._engine.config.simulated_device,
            "block_size": self._engine.cache_config.block_size,
            "max_num_seqs": self._engine.config.max_num_seqs,
            "num_blocks": self._engine.cache_config.num_blocks,
            "graceful_shutdown_timeout_s": config.graceful_shutdown_timeout_s,
            "wants_demand": config.autoscaling_config is not None,
            "scales_to_zero": config.autoscaling_config is not None and config.autoscaling_config.min_replicas == 0,
        }

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve collects for app.autoscaling's policy, where the deployment has one."""
        config = self._engine.config
        return self._service.scaling_report(config.max_num_seqs, config.max_num_batched_tokens)._asdict()

    async def generate(
        self,
        request: EngineRequest,
        ingress_id: str,
        attempt: int,
        waited_s: float = 0.0,
        trace: dict[str, str] | None = None,
    ) -> dict[str, Any]:
        """Run a request to its end; see ReplicaService.generate. The call stays open so that Serve counts it."""
        with logged_as(trace_id_of(trace)):
            return await self._service.generate(
                request, ingress_id=ingress_id, attempt=attempt, waited_s=waited_s, trace=trace
            )

    def check_health(self) -> None:
        """Serve's health check: raises EngineDeadError if the engine has failed or hangs in a step."""
        self._service.check_health()

    def __del__(self) -> None:
        # Serve calls this at the end of a graceful shutdown; a constructor that failed has nothing to close.
        export = getattr(self, "_agent_export", None)
        if export is not None:
            export.close()
        service = getattr(self, "_service", None)
        if service is not None:
            service.close()
        tracing = getattr(self, "_tracing", None)
        if tracing is not None:
            tracing.close()


def _node_ip() -> str:
    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return address


class ProgressLog:
    """Progress in a few lines for people: the beginning and end of each phase, and a line every few seconds."""

    def __init__(self, model_id: str) -> None:
        self._model_id = model_id
        self._what = ""
        self._last_s = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        now_s = time.monotonic()
        finished = total > 0 and done >= total
        if what == self._what and not finished and now_s - self._last_s < _PROGRESS_INTERVAL_S:
            return
        self._what, self._last_s = what, now_s
        share = f" {100 * done // total} %" if total > 0 else ""
        logger.info("Model %s: %s%s", self._model_id, what, share)
