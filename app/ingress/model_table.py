"""The models behind an ingress: its own application's, and those of other applications that its `user_config` lists.

The latter come and go while the ingress serves. Their handles are made when they are first listed, whether or not the
application runs yet: requests wait for its first replica, as they do in a cold start.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Protocol

from app.balancer.admission_settings import AdmissionSettings
from app.config import IngressUserConfig, ModelArgs, RemoteModel
from app.ingress.client import ModelClient
from app.ingress.models import ModelRegistry, ServedModel
from engine.errors import ConfigError, ModelLoadError
from engine.loading import open_checkpoint
from engine.tokenization import Tokenizer


class RetirableClient(ModelClient, Protocol):
    """A ModelClient that can be given up once its requests have ended."""

    def set_admission(self, settings: AdmissionSettings) -> None:
        """Admit requests by other settings from now on."""
        ...

    async def retire(self) -> None:
        """Wait until no request is left, then close."""
        ...


class ModelTable:
    """Keeps a registry in line with `user_config`.

    Args:
        own: models of the ingress's own application.
        connect: makes the client of another application's model.
    """

    def __init__(
        self, registry: ModelRegistry, own: Iterable[ServedModel], connect: Callable[[RemoteModel], RetirableClient]
    ) -> None:
        self._registry = registry
        self._own = list(own)
        self._connect = connect
        # By RemoteModel.connection.
        self._remote: dict[tuple[object, ...], tuple[ServedModel, RetirableClient]] = {}
        self._lock = asyncio.Lock()
        self._retiring: set[asyncio.Task[None]] = set()

    async def adopt(self, config: IngressUserConfig) -> None:
        """Take a new table over. Entries that are as they were keep their clients, and with them their connections.

        Raises:
            ConfigError, ModelLoadError: the old table stays in place as a whole.
        """
        async with self._lock:
            remote = {entry.connection: self._remote.get(entry.connection) for entry in config.models}
            for entry in config.models:
                if any(model.id == entry.id for model in self._own):
                    raise ConfigError(f"user_config.models: {entry.id!r} is a model of this application")
                if remote[entry.connection] is None:
                    # Off the loop: a tokenizer takes a good part of a second to load, and streams go on meanwhile.
                    tokenizer, context_length = await asyncio.to_thread(
                        load_tokenizer, entry.source, entry.chat_template
                    )
                    client = self._connect(entry)
                    model = ServedModel(entry.id, client, tokenizer, context_length, adapters=entry.adapters)
                    remote[entry.connection] = (model, client)
            served = [pair[0] for pair in remote.values() if pair is not None]
            try:
                self._registry.replace([*self._own, *served], config.aliases, config.splits)
            except ConfigError:
                self._retire(pair for key, pair in remote.items() if key not in self._remote)
                raise
            gone = [pair for key, pair in self._remote.items() if key not in remote]
            self._remote = {key: pair for key, pair in remote.items() if pair is not None}
            for entry in config.models:
                if entry.admission is not None:
                    self._remote[entry.connection][1].set_admission(entry.admission.settings)
            self._retire(gone)

    def _retire(self, pairs: Iterable[tuple[ServedModel, RetirableClient] | None]) -> None:
        for pair in pairs:
            if pair is not None:
                task = asyncio.get_running_loop().create_task(pair[1].retire(), name=f"retire {pair[0].id}")
                self._retiring.add(task)
                task.add_done_callback(self._retiring.discard)


def load_tokenizer(source: str, chat_template: str | None = None) -> tuple[Tokenizer, int]:
    """A source's tokenizer and its checkpoint's context length; ModelLoadError names the file."""
    checkpoint = open_checkpoint(source)
    tokenizer = checkpoint.tokenizer()
    if tokenizer is None:
        raise ModelLoadError(f"{source}: it has no tokenizer, so that its text cannot be served over HTTP")
    if chat_template is not None:
        tokenizer = tokenizer.with_chat_template(chat_template)
    # Read through the whole vocabulary now, rather than while the first request waits.
    _ = tokenizer.vocab_size
    return tokenizer, checkpoint.model_config().max_position_embeddings


def context_length(model: ModelArgs, max_position_embeddings: int) -> int:
    """Longest sequence as the configuration says, or else the checkpoint."""
    return model.engine_config.max_model_len or max_position_embeddings
