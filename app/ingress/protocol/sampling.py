"""The sampling parameters that chat and completion requests share."""

from __future__ import annotations

import secrets
from typing import Annotated, Any

from pydantic import AfterValidator

from app.ingress.protocol.base import RequestModel, invalid, no_op_only
from engine.errors import RequestError
from engine.sampling_params import MAX_SEED, SamplingParams


def _strings(value: Any) -> tuple[str, ...]:
    items = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) for item in items):
        raise invalid("must be a string or a list of strings")
    return tuple(items)


def _early_stopping(value: Any) -> Any:
    if not (value is None or isinstance(value, bool) or value == "never"):
        raise invalid('must be true, false or "never"')
    return value


class StreamOptions(RequestModel):
    """`continuous_usage_stats` is vLLM's: usage so far in every chunk. Obfuscation pads chunks against onlookers."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: Annotated[Any, no_op_only(False)] = None


class SamplingFields(RequestModel):
    """OpenAI's sampling parameters, then vLLM's; null means the default. Ranges are SamplingParams' to check."""

    model: str
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: Annotated[Any, AfterValidator(_strings)] = ()
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Labels of the caller's own bookkeeping: they ask for no behaviour.
    user: str | None = None

    best_of: int | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    early_stopping: Annotated[Any, AfterValidator(_early_stopping)] = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    cache_salt: str | None = None
    return_token_ids: bool | None = None

    @property
    def num_choices(self) -> int:
        """Completions a prompt is asked for; 1 unless given."""
        return 1 if self.n is None else self.n

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        return self.include_usage and self.stream_options is not None and self.stream_options.continuous_usage_stats

    def check_stream_options(self) -> None:
        """RequestError if stream options come without a stream."""
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is only allowed with stream=true", param="stream_options")

    def sampling_params(self, *, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """The engine's view; RequestError names a parameter that is out of range.

        A request without a seed gets one here, so that it continues the same on another replica.
        """
        given = {
            "n": self.n,
            "best_of": self.best_of,
            "use_beam_search": self.use_beam_search,
            "length_penalty": self.length_penalty,
            "early_stopping": self.early_stopping,
            "max_tokens": max_tokens,
            # A search draws nothing, so OpenAI's default of 1 would only be in its way.
            "temperature": 0.0 if self.use_beam_search and self.temperature is None else self.temperature,
            "top_p": self.top_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": self.logit_bias,
            "stop": self.stop,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "min_tokens": self.min_tokens,
            "stop_token_ids": self.stop_token_ids,
            "ignore_eos": self.ignore_eos,
            "include_stop_str_in_output": self.include_stop_str_in_output,
            "skip_special_tokens": self.skip_special_tokens,
            "logprobs": logprobs,
            "seed": self._engine_seed(),
        }
        present: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        # SamplingParams defaults to vLLM's 16 tokens; here None means "as many as fit" and is resolved later.
        params = SamplingParams(**{"max_tokens": None, **present})
        if self.stream and params.ranks_at_end:
            raise RequestError(
                "stream=true is not possible with use_beam_search or best_of above n: which sequences are returned "
                "is known only when all have ended",
                param="stream",
            )
        return params

    def _engine_seed(self) -> int | None:
        if self.seed is None:
            return None if self.temperature == 0 else secrets.randbits(63)
        # OpenAI's seeds are signed 64-bit integers, the engine's unsigned: the same bits.
        return self.seed & MAX_SEED if -(1 << 63) <= self.seed < 0 else self.seed
