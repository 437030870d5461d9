"""How the tokens of one request are drawn."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from engine.errors import RequestError

MAX_LOGPROBS = 20
MAX_N = 128
MAX_SEED = (1 << 64) - 1
MAX_LOGIT_BIAS = 1024
MAX_STOP_STRINGS = 16
# What may become a stop string is held back and looked through token by token, at its length squared.
MAX_STOP_LENGTH = 1024


@dataclass(frozen=True)
class SamplingParams:
    """Sampling of one request, with vLLM's names and meanings. Checked where it is made: RequestError names the field.

    Attributes:
        n: sequences to return; they share the prompt's blocks (§4.4).
        best_of: sequences to compute, of which the `n` best are returned once all have ended: with beam search the
            width, else those of the highest log-probability a token. None is `n`.
        use_beam_search: keep the `best_of` most likely sequences instead of drawing; needs temperature 0.
        length_penalty: beams rank by cumulative log-probability ÷ (generated length ** length_penalty).
        early_stopping: when a beam search ends: True, once it has `best_of` finished beams; False, when no running
            beam looks better at its present length; "never", when none could become better.
        max_tokens: output tokens at most; None means up to the engine's `max_model_len`.
        min_tokens: neither end-of-sequence nor stop tokens are drawn, nor stop strings matched, before this many.
        temperature: 0 is greedy.
        top_p: keep the smallest set of most likely tokens with at least this mass.
        top_k: keep this many most likely tokens; 0 or -1 keeps all.
        min_p: keep tokens at least this fraction as likely as the most likely one.
        repetition_penalty: divides positive and multiplies negative logits of tokens seen in prompt or output.
        presence_penalty, frequency_penalty: subtracted once, and once per occurrence, for tokens of the output.
        logit_bias: token id → added to its logit.
        logprobs: report the log-probability of each drawn token and of this many most likely ones, under the model's
            own distribution (before bias, penalties and temperature). None reports nothing.
        seed: of the counter-based generator; None takes the engine's.
        stop: strings that end the text, 16 of 1,024 characters at most; cut from it unless
            `include_stop_str_in_output`.
        stop_token_ids: ids that end the sequence, besides the model's end-of-sequence ids.
        ignore_eos: do not end at the model's end-of-sequence ids.
        skip_special_tokens: leave special tokens out of the text.
    """

    n: int = 1
    best_of: int | None = None
    use_beam_search: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _strings("stop", self.stop))
        object.__setattr__(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        _integer("n", self.n, 1, MAX_N)
        if self.best_of is not None:
            _integer("best_of", self.best_of, self.n, MAX_N)
        self._check_beam_search()
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, 1 << 31)
        _integer("min_tokens", self.min_tokens, 0, 1 << 31)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise _out_of_range("min_tokens", self.min_tokens, f"at most max_tokens={self.max_tokens}")
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _integer("top_k", self.top_k, -1, 1 << 31)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.seed is not None:
            _integer("seed", self.seed, 0, MAX_SEED)
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise _out_of_range(name, getattr(self, name), "true or false")

    def __reduce__(self) -> tuple[object, ...]:
        # A read-only mapping cannot be pickled; a plain one is made read-only again on arrival.
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        fields["logit_bias"] = dict(self.logit_bias)
        return _rebuild, (fields,)

    def _check_beam_search(self) -> None:
        _number("length_penalty", self.length_penalty, -10.0, 10.0)
        if not isinstance(self.use_beam_search, bool):
            raise _out_of_range("use_beam_search", self.use_beam_search, "true or false")
        if self.early_stopping not in (True, False, "never"):
            raise _out_of_range("early_stopping", self.early_stopping, 'true, false or "never"')
        if not self.use_beam_search:
            if self.length_penalty != 1.0 or self.early_stopping is not False:
                name = "length_penalty" if self.length_penalty != 1.0 else "early_stopping"
                raise _out_of_range(name, getattr(self, name), "left out without use_beam_search")
            return
        for name, neutral in (("temperature", 0.0), ("top_p", 1.0), ("min_p", 0.0)):
            if getattr(self, name) != neutral:
                raise _out_of_range(name, getattr(self, name), f"{neutral:g} with use_beam_search")
        if self.top_k > 0:
            raise _out_of_range("top_k", self.top_k, "0 with use_beam_search")

    # Read for every token of every step.

    @functools.cached_property
    def width(self) -> int:
        """Sequences that are computed: the beam width, or the samples that `n` are chosen from."""
        return self.n if self.best_of is None else self.best_of

    @functools.cached_property
    def ranks_at_end(self) -> bool:
        """Which sequences are returned is known only when all have ended, so nothing can be streamed."""
        return self.use_beam_search or self.width > self.n

    @functools.cached_property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @functools.cached_property
    def wants_only_arg_max(self) -> bool:
        """Of a row's logits, but for penalties and biases, nothing matters but which is the largest."""
        return self.greedy and self.logprobs is None and not self.ranks_at_end

    @functools.cached_property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


def _rebuild(fields: dict[str, object]) -> SamplingParams:
    return SamplingParams(**fields)  # type: ignore[arg-type]


def _out_of_range(name: str, value: object, allowed: str) -> RequestError:
    return RequestError(f"{name}={value!r} must be {allowed}", param=name, code="invalid_value")


def _integer(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise _out_of_range(name, value, f"an integer from {low} to {high}")


def _number(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    sound = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not sound or not low <= float(value) <= high or (open_low and value == low):  # type: ignore[arg-type]
        raise _out_of_range(name, value, f"a number {'above' if open_low else 'from'} {low:g} to {high:g}")


def _strings(name: str, value: object) -> tuple[str, ...]:
    items = (value,) if isinstance(value, str) else value
    if not isinstance(items, Iterable):
        raise _out_of_range(name, value, "a string or a list of strings")
    strings = tuple(items)
    if not all(isinstance(item, str) and item for item in strings):
        raise _out_of_range(name, value, "non-empty strings")
    if len(strings) > MAX_STOP_STRINGS:
        raise _out_of_range(name, f"{len(strings)} strings", f"at most {MAX_STOP_STRINGS}")
    longest = max(map(len, strings), default=0)
    if longest > MAX_STOP_LENGTH:
        raise RequestError(
            f"{name} holds a string of {longest} characters; at most {MAX_STOP_LENGTH} are allowed",
            param=name,
            code="invalid_value",
        )
    return strings


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, Iterable) or isinstance(value, str):
        raise _out_of_range(name, value, "a list of token ids")
    ids = tuple(value)
    if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in ids):
        raise _out_of_range(name, value, "a list of token ids")
    return ids


def _biases(value: object) -> Mapping[int, float]:
    if not isinstance(value, Mapping):
        raise _out_of_range("logit_bias", value, "a mapping of token ids to numbers")
    if len(value) > MAX_LOGIT_BIAS:
        raise _out_of_range("logit_bias", f"{len(value)} entries", f"at most {MAX_LOGIT_BIAS} entries")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        try:
            token_id = int(key)
        except (TypeError, ValueError):
            raise _out_of_range("logit_bias", key, "keyed by token ids") from None
        _number("logit_bias", bias, -100.0, 100.0)
        if token_id < 0:
            raise _out_of_range("logit_bias", key, "keyed by token ids")
        biases[token_id] = float(bias)
    return MappingProxyType(biases)
