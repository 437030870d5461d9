"""The ingress as Serve runs it: builds the ASGI application over the engine deployments' handles."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from app.balancer import Balancer, make_policy
from app.balancer.admission_settings import AdmissionSettings
from app.config import (
    AdmissionArgs,
    BalancerArgs,
    IngressArgs,
    IngressUserConfig,
    ModelArgs,
    RemoteModel,
    engine_deployment_name,
)
from app.ingress import server_tick
from app.ingress.app import build_asgi_app
from app.ingress.auth import ApiKeys
from app.ingress.greeting import greeting
from app.ingress.model_table import ModelTable, context_length, load_tokenizer
from app.ingress.models import ModelRegistry, ServedModel
from app.ingress.promise_exchange import NewsByModel, PromiseExchange
from app.ingress.proxy_check import check_proxy, controller_has_haproxy, replica_has_haproxy
from app.ingress.replica_client import ReplicaSetClient
from app.ingress.scaling_state import DeploymentName, ScalingState
from app.ingress.settings import HttpSettings
from app.telemetry.application import ApplicationMetrics, IngressSamples
from app.telemetry.logs import join_logs, origin_of_replica
from app.telemetry.node_agent import NodeAgentExport
from app.telemetry.samples import MetricSample, with_label
from app.telemetry.tracing import tracing_from_environment
from app.usage import UsageLedger
from engine.errors import ConfigError

logger = logging.getLogger("ray.serve")

API_KEYS_VARIABLE = "QUIRE_API_KEYS"
_READY_POLL_S = 60.0
# Prometheus gives a scrape ten seconds; an ingress that takes longer than this to answer is left out.
_GATHER_TIMEOUT_S = 3.0


@serve.ingress()
class Ingress:
    """One replica of the HTTP side. Serve asks for the application by `__serve_build_asgi_app__`, on the user's loop.

    Args:
        models: those of this application; `engines` has the handle of each by its id.
        settings: limits of the HTTP layer.
    """

    def __init__(
        self, models: Sequence[ModelArgs], settings: IngressArgs, engines: Mapping[str, DeploymentHandle[Any]]
    ) -> None:
        join_logs(origin_of_replica().logging_config)
        self._settings = settings
        self._api_keys = ApiKeys(keys_of_environment())
        self._admission = {model.id: model.admission for model in models}
        own = _own_models(models, engines)
        self._registry = ModelRegistry(own)
        self._table = ModelTable(self._registry, own, _connect)
        context = serve.get_replica_context()
        self._peers = serve.get_deployment_handle(
            context.deployment, context.app_name, _check_exists=False, _record_telemetry=False
        )
        self._ledger = None
        if settings.usage is not None:
            self._ledger = UsageLedger(settings.usage.settings, context.replica_id.unique_id)
        stats = None if self._ledger is None else self._ledger.stats
        scaling = ScalingState(self._engine_deployments)
        self._metrics = ApplicationMetrics(
            context.replica_id.unique_id, lambda: self._registry, self._gather, scaling.read, stats
        )
        self._tracing = tracing_from_environment("ingress", context.replica_id.unique_id)
        self._promises = PromiseExchange(context.replica_id.unique_id, self._clients, self._tell_promises)
        self._connecting: asyncio.Task[None] | None = None
        self._greeted = False
        self._agent_export: NodeAgentExport | None = None

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        controller = await asyncio.to_thread(controller_has_haproxy)
        check_proxy(self._settings.proxy, controller, replica_has_haproxy())
        # Serve's proxy and its direct ingress both echo x-request-id already.
        http = HttpSettings(
            max_body_bytes=self._settings.max_body_bytes,
            echo_request_id=False,
            keep_alive_s=self._settings.keep_alive_s,
            access_log=self._settings.access_log,
        )
        server_tick.slow_down()
        self._promises.start()
        if self._settings.agent_metrics_s is not None:
            self._agent_export = self._export_to_agent(self._settings.agent_metrics_s)
        return build_asgi_app(self._registry, http, self._api_keys, self._metrics, self._tracing, self._ledger)

    async def own_samples(self) -> IngressSamples:
        """What this replica has counted itself, for whichever ingress is asked for `/metrics`."""
        return self._metrics.own_samples()

    def _export_to_agent(self, interval_s: float) -> NodeAgentExport:
        """Tell Ray's agent what this replica counts itself."""
        loop = asyncio.get_running_loop()

        def read() -> list[MetricSample]:
            # What is counted changes on this loop, so it is read there.
            told = asyncio.run_coroutine_threadsafe(self.own_samples(), loop).result(_GATHER_TIMEOUT_S)
            return [item for name, samples in told.items() for item in with_label(samples, "ingress", name)]

        export = NodeAgentExport(read, interval_s)
        export.start()
        return export

    async def hear_promises(self, ingress_id: str, news: NewsByModel) -> None:
        """What an ingress replica has told refused requests."""
        self._promises.hear(ingress_id, news)

    async def _tell_promises(self, ingress_id: str, news: NewsByModel) -> None:
        await self._peers.broadcast("hear_promises", ingress_id, news).results_async(return_exceptions=True)

    def _clients(self) -> dict[str, ReplicaSetClient]:
        return {model.id: model.client for model in self._registry if isinstance(model.client, ReplicaSetClient)}

    def _engine_deployments(self) -> dict[str, DeploymentName]:
        return {model_id: client.deployment for model_id, client in self._clients().items()}

    async def _gather(self) -> list[IngressSamples]:
        answers = await self._peers.broadcast("own_samples").results_async(
            timeout_s=_GATHER_TIMEOUT_S, return_exceptions=True
        )
        return [answer for answer in answers if not isinstance(answer, BaseException)]

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve's hook: take over models, aliases, splits and API keys while serving.

        Raises:
            ConfigError, ModelLoadError: what was in place stays.
        """
        config = IngressUserConfig.from_dict(user_config, "user_config")
        admission = own_admission(self._admission, config.admission)
        await self._table.adopt(config)
        clients = self._clients()
        for model_id, settings in admission.items():
            clients[model_id].set_admission(settings)
        self._api_keys.replace([*config.api_keys, *keys_of_environment()])
        if self._connecting is not None:
            self._connecting.cancel()
        self._connecting = asyncio.create_task(self._connect_models())

    def __del__(self) -> None:
        # Serve calls this at the end of a graceful shutdown; a constructor that failed has nothing to close.
        tracing = getattr(self, "_tracing", None)
        if tracing is not None:
            tracing.close()
        export = getattr(self, "_agent_export", None)
        if export is not None:
            export.close()
        ledger = getattr(self, "_ledger", None)
        if ledger is not None:
            ledger.close()

    async def _connect_models(self) -> None:
        """Connect to each model before a request asks for it. The first time, greet in the console of `serve run`."""
        began = time.monotonic()
        models = list(self._registry)
        await asyncio.gather(*(_wait_ready(model) for model in models))
        logger.info("%d models are ready after %.1f s", len(models), time.monotonic() - began)
        if models and not self._greeted:
            self._greeted = True
            url = await asyncio.to_thread(_root_url)
            print(greeting(url, [model.id for model in models]), flush=True)


async def _wait_ready(model: ServedModel) -> None:
    while not await model.client.wait_ready(_READY_POLL_S):
        logger.info("still waiting for %s: %s", model.id, model.client.state().detail)


def keys_of_environment() -> list[str]:
    """API keys from QUIRE_API_KEYS, comma separated."""
    return [key for item in os.environ.get(API_KEYS_VARIABLE, "").split(",") if (key := item.strip())]


def _own_models(models: Sequence[ModelArgs], engines: Mapping[str, DeploymentHandle[Any]]) -> list[ServedModel]:
    """Those of this application, their tokenizers loaded all at once; ModelLoadError names the file."""
    if not models:
        return []
    with ThreadPoolExecutor(max_workers=min(8, len(models)), thread_name_prefix="tokenizer") as pool:
        loaded = pool.map(lambda model: load_tokenizer(model.source, model.chat_template), models)
        return [
            ServedModel(
                id=model.id,
                client=ReplicaSetClient(
                    model.id,
                    engines[model.id],
                    balancer=_balancer(model.balancer, model.admission),
                ),
                tokenizer=tokenizer,
                context_length=context_length(model, max_position_embeddings),
                adapters=tuple(model.engine_config.adapters),
            )
            for model, (tokenizer, max_position_embeddings) in zip(models, loaded, strict=True)
        ]


def _connect(entry: RemoteModel) -> ReplicaSetClient:
    # Not checked for existence: the application may come up later.
    handle = serve.get_deployment_handle(
        engine_deployment_name(entry.id), entry.application, _check_exists=False, _record_telemetry=False
    )
    return ReplicaSetClient(entry.id, handle, balancer=_balancer(entry.balancer, entry.admission))


def _balancer(args: BalancerArgs, admission: AdmissionArgs | None) -> Balancer:
    return Balancer(
        make_policy(args.policy),
        hold_s=None if args.hold_ms is None else args.hold_ms / 1000.0,
        admission=None if admission is None else admission.settings,
    )


def own_admission(
    arguments: Mapping[str, AdmissionArgs | None], given: Mapping[str, AdmissionArgs]
) -> dict[str, AdmissionSettings]:
    """By model id the settings of the ingress's own models: as its arguments say, unless `user_config` says otherwise.

    Raises:
        ConfigError: of a model that is none of its own, or that was made without admission.
    """
    for model_id in given:
        if arguments.get(model_id) is None:
            why = "has admission: null in its arguments" if model_id in arguments else "is no model of this application"
            raise ConfigError(f"user_config.admission: {model_id!r} {why}")
    return {model_id: given.get(model_id, args).settings for model_id, args in arguments.items() if args is not None}


def _root_url() -> str:
    """Where Serve's proxies listen. Private to Serve, so a start must not hang on it."""
    try:
        from ray.serve.context import _get_global_client

        client: Any = _get_global_client()
        return str(client.root_url)
    except Exception as error:
        logger.warning("cannot tell the URL: %s", error)
        return "http://127.0.0.1:8000"
