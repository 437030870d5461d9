"""What the HTTP side asks of a model, wherever it runs: token ids in, step outputs out."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import NamedTuple, Protocol

from app.balancer import RequestTerms
from app.balancer.admission_settings import AdmissionSettings
from app.ingress.receipt import Receipt
from app.telemetry.model_samples import ModelTelemetry
from engine.outputs import SequenceOutput
from engine.request import EngineRequest


class ModelState(NamedTuple):
    """Where a model stands, as `/health` reports it.

    Attributes:
        model_id: of the model's entry in the configuration.
        ready: requests are accepted now; a model at zero replicas by policy is ready too.
        num_replicas: replicas that can take a request.
        detail: one line for people: "ready", "loading weights", why it failed ...
        max_model_len: longest sequence in tokens, prompt and output; None until a replica has told it.
        simulated: what device its replicas simulate; None for replicas that compute.
    """

    model_id: str
    ready: bool
    num_replicas: int
    detail: str
    max_model_len: int | None
    simulated: str | None = None


class ModelClient(Protocol):
    """One served model. The ingress knows nothing of replicas, sockets or Ray beyond this."""

    def generate(
        self, request: EngineRequest, receipt: Receipt | None = None, terms: RequestTerms | None = None
    ) -> AsyncGenerator[list[SequenceOutput], None]:
        """Yield the request's outputs in order, as they come; several are coalesced if the reader is late.

        Closing the generator early aborts the request on its replica. A replica that dies or drains is no error:
        the request goes on elsewhere and the reader sees one unbroken sequence.

        Args:
            receipt: filled in with where the request went, if given.
            terms: its class, tenant and deadline.

        Raises:
            RequestError: the replica refused the request; before the first yield.
            OverloadedError: a bound on waiting work is reached.
            EngineDeadError: no replica can finish it.
        """
        ...

    @property
    def admission(self) -> AdmissionSettings:
        """The classes that its requests may be of, and how they are admitted."""
        ...

    def stop(self, request_id: str, index: int) -> None:
        """The reader of a request needs no more of one of its sequences; what comes of it still may be ignored."""
        ...

    async def wait_ready(self, timeout_s: float) -> bool:
        """Wait until the model accepts requests; False if `timeout_s` passed first."""
        ...

    def state(self) -> ModelState:
        """The model's state now. Cheap, and never blocks."""
        ...

    def telemetry(self) -> ModelTelemetry:
        """What `/metrics` says of the model. Cheap, and never blocks."""
        ...
