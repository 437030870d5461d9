"""Every error that Quire raises on purpose.

    QuireError
    ├── ConfigError               a setting is unknown, malformed or contradicts another: the start stops
    ├── ModelLoadError            a checkpoint is missing, corrupt or not readable: the start stops
    │   └── UnsupportedModelError the checkpoint is sound, but its architecture or type is not supported
    ├── RequestError              the caller's fault; names the parameter (HTTP 400)
    │   ├── PromptTooLongError    the prompt leaves no room under `max_model_len` (HTTP 400)
    │   └── ModelNotFoundError    no model, or no adapter, of that name is served (HTTP 404)
    ├── AdapterUnavailableError   an adapter that was known can be loaded no more on this replica (HTTP 503)
    ├── OverloadedError           a bound on waiting work is reached; try again later (HTTP 429)
    └── EngineDeadError           the engine thread has failed or was shut down (HTTP 503)
        └── CommunicatorError     a rank of tensor parallelism is lost, late or out of step (HTTP 503)

The ingress maps `http_status` to the reply and the rest to an OpenAI error body.
"""

from __future__ import annotations

from collections.abc import Iterable


class QuireError(Exception):
    """Base of all errors that Quire raises on purpose."""

    http_status = 500


class ConfigError(QuireError):
    """A setting is unknown, malformed or contradicts another."""


class ModelLoadError(QuireError):
    """A checkpoint could not be read. The message is one line: which file, and why."""


class UnsupportedModelError(ModelLoadError):
    """The checkpoint names an architecture or a tensor type that Quire does not run."""

    def __init__(self, what: str, supported: Iterable[str]) -> None:
        super().__init__(f"{what} is not supported; supported: {', '.join(sorted(supported))}")


class RequestError(QuireError):
    """A request that can never be served as it stands.

    Args:
        message: what is wrong, with the value and the allowed range.
        param: the request parameter at fault, as the caller spelled it.
        code: a short machine-readable name, as OpenAI's `error.code`.
    """

    http_status = 400

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code

    def __reduce__(self) -> tuple[type, tuple[str, str | None, str | None]]:
        # Crosses process borders between replica and ingress with its fields intact.
        return type(self), (str(self), self.param, self.code)


class PromptTooLongError(RequestError):
    """The prompt, or the prompt and what it asks for, exceeds what the model can hold."""


class ModelNotFoundError(RequestError):
    """No model, or no adapter, of that name is served."""

    http_status = 404


class AdapterUnavailableError(QuireError):
    """An adapter was read and checked once, and can be loaded no more: its file has changed, or its disk has failed.
    Another replica may have it."""

    http_status = 503
    code = "adapter_unavailable"


class OverloadedError(QuireError):
    """A bound on waiting work is reached. `retry_after_s` is when a retry makes sense."""

    http_status = 429
    code = "overloaded"

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[type, tuple[str, float]]:
        return type(self), (str(self), self.retry_after_s)


class EngineDeadError(QuireError):
    """The engine thread has failed or was shut down; the replica must be replaced."""

    http_status = 503


class CommunicatorError(EngineDeadError):
    """A rank of tensor parallelism is lost, late or out of step; the message names it where that is known."""
