"""The ingress as Serve runs it: builds the ASGI application over the engine deployments' handles."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pydantic import ValidationError
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from app.config import IngressArgs, IngressUserConfig, ModelArgs, describe
from app.ingress.app import HttpSettings, build_asgi_app
from app.ingress.auth import ApiKeys
from app.ingress.greeting import greeting
from app.ingress.models import ModelRegistry, ServedModel
from app.ingress.replica_client import ReplicaSetClient
from engine.errors import ConfigError, ModelLoadError
from engine.loading import open_checkpoint
from engine.tokenization import Tokenizer

logger = logging.getLogger("ray.serve")

API_KEYS_VARIABLE = "QUIRE_API_KEYS"
_READY_POLL_S = 60.0


@serve.ingress()
class Ingress:
    """One replica of the HTTP side. Serve asks for the application by `__serve_build_asgi_app__`, on the user's loop.

    Args:
        models: what is served; `engines` has the handle of each by its id.
        settings: limits of the HTTP layer.
    """

    def __init__(
        self, models: Sequence[ModelArgs], settings: IngressArgs, engines: Mapping[str, DeploymentHandle[Any]]
    ) -> None:
        self._settings = settings
        self._api_keys = ApiKeys(keys_of_environment())
        checkpoints = _load_tokenizers({model.source for model in models})
        self._registry = ModelRegistry(
            ServedModel(
                id=model.id,
                client=ReplicaSetClient(model.id, engines[model.id]),
                tokenizer=checkpoints[model.source][0],
                context_length=_context_length(model, checkpoints[model.source][1]),
            )
            for model in models
        )
        self._greeting: asyncio.Task[None] | None = None

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        self._greeting = asyncio.create_task(self._greet())
        # Serve's proxy and its direct ingress both echo x-request-id already.
        http = HttpSettings(max_body_bytes=self._settings.max_body_bytes, echo_request_id=False)
        return build_asgi_app(self._registry, http, self._api_keys)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve's hook: take over aliases and API keys while serving; ConfigError leaves the old ones in place."""
        try:
            config = IngressUserConfig.model_validate(user_config)
        except ValidationError as error:
            raise ConfigError(describe(error, "user_config")) from None
        self._registry.set_aliases(config.aliases)
        self._api_keys.replace([*config.api_keys, *keys_of_environment()])

    async def _greet(self) -> None:
        """Say once, in the console of `serve run`, which URL to try."""
        began = time.monotonic()
        for model in self._registry:
            while not await model.client.wait_ready(_READY_POLL_S):
                logger.info("still waiting for %s: %s", model.id, model.client.state().detail)
        url = await asyncio.to_thread(_root_url)
        logger.info("all models are ready %.1f s after the ingress", time.monotonic() - began)
        print(greeting(url, [model.id for model in self._registry]), flush=True)


def keys_of_environment() -> list[str]:
    """API keys from QUIRE_API_KEYS, comma separated."""
    return [key for item in os.environ.get(API_KEYS_VARIABLE, "").split(",") if (key := item.strip())]


def _load_tokenizers(sources: set[str]) -> dict[str, tuple[Tokenizer, int]]:
    """Source → tokenizer and the checkpoint's context length, all sources at once; ModelLoadError names the file."""
    with ThreadPoolExecutor(max_workers=min(8, len(sources)), thread_name_prefix="tokenizer") as pool:
        return dict(zip(sources, pool.map(_load_tokenizer, sources), strict=True))


def _load_tokenizer(source: str) -> tuple[Tokenizer, int]:
    checkpoint = open_checkpoint(source)
    tokenizer = checkpoint.tokenizer()
    if tokenizer is None:
        raise ModelLoadError(f"{source}: it has no tokenizer, so that its text cannot be served over HTTP")
    return tokenizer, checkpoint.model_config().max_position_embeddings


def _context_length(model: ModelArgs, max_position_embeddings: int) -> int:
    return model.engine_config.max_model_len or max_position_embeddings


def _root_url() -> str:
    """Where Serve's proxies listen. Private to Serve, so a start must not hang on it."""
    try:
        from ray.serve.context import _get_global_client

        client: Any = _get_global_client()
        return str(client.root_url)
    except Exception as error:
        logger.warning("cannot tell the URL: %s", error)
        return "http://127.0.0.1:8000"
