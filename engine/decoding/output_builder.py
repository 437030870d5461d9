"""Grows a request's text from a step's tokens: detokenises, matches stop strings, keeps the sums."""

from __future__ import annotations

import math

from engine.decoding.stop_checker import StopChecker
from engine.outputs import CompletionOutput, FinishReason, RequestOutput, SequenceOutput
from engine.request import EngineRequest
from engine.tokenization import IncrementalDetokenizer, Tokenizer


class RequestOutputBuilder:
    """One request's RequestOutput in the making.

    Args:
        eos_token_ids: of the model; ending on one of them is no `stop_reason`.
        tokenizer: None leaves texts empty and stop strings unmatched, for models without a tokenizer.
    """

    def __init__(
        self,
        request: EngineRequest,
        eos_token_ids: tuple[int, ...],
        tokenizer: Tokenizer | None,
        prompt: str | None = None,
    ) -> None:
        params = request.sampling_params
        self._eos_token_ids = () if params.ignore_eos else eos_token_ids
        self.output = RequestOutput(
            request.request_id,
            prompt,
            list(request.prompt_token_ids),
            [CompletionOutput(index) for index in range(params.n)],
        )
        self._completions = [_Completion(out, request, tokenizer) for out in self.output.outputs]

    def add(self, output: SequenceOutput) -> bool:
        """Take in one sequence's new tokens.

        Returns:
            Whether a stop string has just ended this sequence, so that the engine may stop computing it.
        """
        if self.output.outputs[output.index].finish_reason is not None:
            return False  # a stop string ended it; what was under way when it did is dropped
        self.output.num_cached_tokens = output.num_cached_tokens
        stopped = self._completions[output.index].add(output, self._eos_token_ids)
        self.output.finished = all(out.finish_reason is not None for out in self.output.outputs)
        return stopped


class _Completion:
    def __init__(self, output: CompletionOutput, request: EngineRequest, tokenizer: Tokenizer | None) -> None:
        params = request.sampling_params
        self._output = output
        self._params = params
        self._detokenizer = (
            IncrementalDetokenizer(tokenizer, params.skip_special_tokens, continuation=True) if tokenizer else None
        )
        self._stop_checker = StopChecker(params.stop, params.include_stop_str_in_output) if params.stop else None

    def add(self, new: SequenceOutput, eos_token_ids: tuple[int, ...]) -> bool:
        output = self._output
        output.token_ids.extend(new.token_ids)
        if new.logprobs is not None:
            output.logprobs = [*(output.logprobs or []), *new.logprobs]
            output.cumulative_logprob = math.fsum(item.logprob for item in output.logprobs)
        if new.cumulative_logprob is not None:
            output.cumulative_logprob = new.cumulative_logprob
        output.finish_reason = new.finish_reason
        if new.stop_token_id is not None and new.stop_token_id not in eos_token_ids:
            output.stop_reason = new.stop_token_id
        return self._add_text(new.token_ids, new.stop_token_id, new.finish_reason)

    def _add_text(self, token_ids: list[int], stop_token_id: int | None, reason: FinishReason | None) -> bool:
        if self._detokenizer is None:
            return False
        if stop_token_id is not None and not self._params.include_stop_str_in_output:
            token_ids = token_ids[:-1]  # the stop token ends the text, it is not part of it
        text = self._detokenizer.append(token_ids)
        if reason is not None:
            text += self._detokenizer.flush()
        if self._stop_checker is None:
            self._output.text += text
            return False
        can_stop = len(self._output.token_ids) >= self._params.min_tokens
        released, matched = self._stop_checker.append(text, can_stop)
        self._output.text += released
        if matched is None:
            if reason is not None:
                self._output.text += self._stop_checker.flush()
            return False
        self._output.finish_reason, self._output.stop_reason = "stop", matched
        return reason is None
