"""What an engine refuses at once: requests that it could never serve, however long they waited."""

from __future__ import annotations

from collections.abc import Callable, Container

from engine.config import CacheConfig, EngineConfig
from engine.errors import ConfigError, ModelNotFoundError, PromptTooLongError, RequestError
from engine.memory import BuddyAllocator, ReservationPolicy, run_size
from engine.model_config import ModelConfig
from engine.request import EngineRequest
from engine.sampling_params import SamplingParams


def resolve_max_model_len(config: EngineConfig, model: ModelConfig, num_blocks: int) -> int:
    """The longest sequence: as configured, or the checkpoint's cut to what the pool holds.

    Raises:
        ConfigError: what is configured exceeds the checkpoint's positions or the pool; where sequences reserve
            contiguous runs, the pool's longest one.
    """
    paged = config.reservation == "paged"
    longest = num_blocks if paged else BuddyAllocator(num_blocks).largest_free_run
    longest_tokens = longest * config.block_size
    if config.max_model_len is None:
        return min(model.max_position_embeddings, longest_tokens)
    if config.max_model_len > model.max_position_embeddings:
        raise ConfigError(
            f"max_model_len={config.max_model_len} exceeds the checkpoint's {model.max_position_embeddings} positions"
        )
    if config.max_model_len > longest_tokens:
        place = "" if paged else f"the longest run that reservation={config.reservation} finds in "
        raise ConfigError(
            f"max_model_len={config.max_model_len} does not fit {place}the KV pool of {num_blocks} blocks: {longest} x "
            f"{config.block_size} tokens = {longest_tokens} tokens; lower it or raise num_blocks"
        )
    return config.max_model_len


class RequestValidator:
    """Checks requests against the model and the pool. Stateless, so any thread may call it.

    Args:
        num_pinned_blocks: how many blocks shared prefixes hold for good, asked at each check.
        can_match_text: whether the engine has a tokenizer.
        adapters: the adapters that requests may name.
    """

    def __init__(
        self,
        model: ModelConfig,
        config: EngineConfig,
        cache: CacheConfig,
        max_model_len: int,
        num_pinned_blocks: Callable[[], int],
        can_match_text: bool,
        adapters: Container[str] = (),
    ) -> None:
        self._adapters = adapters
        self._num_pinned_blocks = num_pinned_blocks
        self._can_match_text = can_match_text
        self._vocab_size = model.vocab_size
        self._config = config
        self._cache = cache
        self._max_model_len = max_model_len

    def check(self, request: EngineRequest) -> None:
        """Raise RequestError if the request can never be served."""
        if request.adapter and request.adapter not in self._adapters:
            raise ModelNotFoundError(
                f"the adapter {request.adapter!r} does not exist", param="model", code="model_not_found"
            )
        self._check_tokens(request)
        self._check_lengths(request)
        self._check_group(request)

    def _check_tokens(self, request: EngineRequest) -> None:
        params = request.sampling_params
        named = (
            ("prompt", request.prompt_token_ids),
            ("stop_token_ids", params.stop_token_ids),
            ("logit_bias", params.logit_bias),
            ("resumed", [token for item in request.resumed for token in item.token_ids]),
        )
        for param, token_ids in named:
            if len(token_ids) and not 0 <= min(token_ids) <= max(token_ids) < self._vocab_size:
                bad = next(token for token in token_ids if not 0 <= token < self._vocab_size)
                raise RequestError(
                    f"{param} holds token id {bad}, outside the vocabulary of {self._vocab_size}",
                    param=param,
                    code="invalid_token_id",
                )

    def _check_lengths(self, request: EngineRequest) -> None:
        num_prompt = len(request.prompt_token_ids)
        if num_prompt >= self._max_model_len:
            raise PromptTooLongError(
                f"the prompt has {num_prompt} tokens; this model holds {self._max_model_len}, output included",
                param="prompt",
                code="context_length_exceeded",
            )
        max_tokens = request.sampling_params.max_tokens
        if max_tokens is not None and num_prompt + max_tokens > self._max_model_len:
            raise PromptTooLongError(
                f"the prompt's {num_prompt} tokens and max_tokens={max_tokens} exceed the {self._max_model_len} "
                "tokens that this model holds",
                param="max_tokens",
                code="context_length_exceeded",
            )
        for item in request.resumed:
            if num_prompt + len(item.token_ids) > self._max_model_len:
                raise PromptTooLongError("resumed sequences exceed max_model_len", param="resumed")

    def _check_group(self, request: EngineRequest) -> None:
        params = request.sampling_params
        seats = self._config.max_num_seqs
        if params.use_beam_search:
            seats = min(seats, self._config.max_num_batched_tokens)  # all beams draw in one step
        if params.width > seats:
            raise RequestError(
                f"{_name(params)}={params.width} exceeds the {seats} sequences that this model runs at once",
                param=_name(params),
                code="invalid_value",
            )
        if params.ranks_at_end and params.stop and not self._can_match_text:
            raise RequestError("stop strings need a tokenizer, which this model has not", param="stop")
        if self._config.reservation == "paged":
            self._check_blocks(request)
        else:
            self._check_runs(request)

    def _check_blocks(self, request: EngineRequest) -> None:
        """Whether the pool alone holds the group at its longest."""
        params = request.sampling_params
        num_prompt = len(request.prompt_token_ids)
        longest = self._max_model_len if params.max_tokens is None else num_prompt + params.max_tokens
        shared = num_prompt // self._cache.block_size
        worst = shared + params.width * (self._cache.blocks_for(longest) - shared)
        num_pinned = self._num_pinned_blocks()
        if worst > self._cache.num_blocks - num_pinned:
            raise RequestError(
                f"{_name(params)}={params.width} sequences of up to {longest} tokens need {worst} KV blocks; the pool "
                f"has {self._cache.num_blocks}, {num_pinned} of them pinned",
                param=_name(params),
                code="invalid_value",
            )

    def _check_runs(self, request: EngineRequest) -> None:
        """Whether the pool alone holds a contiguous run for each of the group's sequences."""
        params = request.sampling_params
        policy = ReservationPolicy(self._config.reservation, self._max_model_len)
        num_tokens = policy.num_tokens(len(request.prompt_token_ids), params.max_tokens)
        num_blocks = self._cache.blocks_for(num_tokens)
        if not BuddyAllocator(self._cache.num_blocks).can_allocate(num_blocks, params.width):
            raise RequestError(
                f"{_name(params)}={params.width} sequences reserve {num_tokens} tokens each "
                f"(reservation={policy.name}), a run of {run_size(num_blocks)} KV blocks; the pool of "
                f"{self._cache.num_blocks} blocks has not as many",
                param=_name(params),
                code="invalid_value",
            )


def _name(params: SamplingParams) -> str:
    """The parameter that says how many sequences are computed."""
    return "n" if params.best_of is None else "best_of"
