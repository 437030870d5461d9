"""A request's generation, without HTTP: engine requests in, pieces of text with their tokens out."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import NamedTuple

from app.balancer import RequestTerms
from app.ingress.merge import merge
from app.ingress.models import ServedModel
from app.ingress.receipt import FIELD, Receipt
from app.telemetry import spans
from app.telemetry.ingress_metrics import RequestRecord
from app.telemetry.request_trace import DetokenizeTrace, RequestTrace, current_trace, request_attributes
from engine.decoding.stop_checker import StopChecker
from engine.errors import EngineDeadError
from engine.outputs import SequenceOutput, TokenLogprobs
from engine.request import EngineRequest
from engine.sampling_params import SamplingParams
from engine.tokenization import IncrementalDetokenizer, Tokenizer


class ReportedToken(NamedTuple):
    """A token and its log-probabilities; `text_offset` is where its text begins in the completion, in characters."""

    token_id: int
    logprobs: TokenLogprobs
    text_offset: int


@dataclass(slots=True)
class ChoiceDelta:
    """What came to one choice since its last delta. All its deltas' texts joined are its text.

    Attributes:
        index: of the choice within the HTTP request.
        token_ids: tokens behind this and not yet reported, those of held-back text included.
        logprobs: tokens whose text has begun to be sent; empty unless asked for.
        stop_reason: the stop string, or the stop token id other than end-of-sequence, that ended it.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[ReportedToken] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class ChoiceText:
    """Turns one sequence's tokens into text, holding back what is no whole character or may become a stop string."""

    def __init__(self, index: int, tokenizer: Tokenizer, params: SamplingParams, *, continuation: bool) -> None:
        self._index = index
        self._params = params
        self._detokenizer = IncrementalDetokenizer(tokenizer, params.skip_special_tokens, continuation)
        self._stop_checker = StopChecker(params.stop, params.include_stop_str_in_output)
        self._delta = ChoiceDelta(index)
        self._held_logprobs: list[ReportedToken] = []
        self._detokenized_length = 0
        self._sent_length = 0
        self.num_tokens = 0
        self.finished = False
        self.finish_reason = ""

    def push(self, output: SequenceOutput) -> bool:
        """Take a step's tokens. Those after a stop string do not count: they are no part of the completion.

        Returns:
            Whether these tokens ended it, and the engine does not know.
        """
        if self.finished:
            return False
        for position, token_id in enumerate(output.token_ids):
            self.num_tokens += 1
            self._delta.token_ids.append(token_id)
            is_stop_token = output.stop_token_id is not None and position == len(output.token_ids) - 1
            if is_stop_token and not self._params.include_stop_str_in_output:
                break
            if output.logprobs is not None:
                self._held_logprobs.append(ReportedToken(token_id, output.logprobs[position], self._detokenized_length))
            self._append_text(self._detokenizer.push(token_id))
            if self._stop_checker.matched is not None:
                self._finish("stop", self._stop_checker.matched)
                return output.finish_reason is None
        if output.finish_reason is not None:
            self._finish_by_engine(output)
        return False

    def take(self) -> ChoiceDelta | None:
        """What came since the last call, or None if there is nothing to tell yet."""
        delta = self._delta
        if not (delta.text or delta.finish_reason):
            return None
        sent = 0
        while sent < len(self._held_logprobs) and (
            self._held_logprobs[sent].text_offset < self._sent_length
            or (self.finished and self._stop_checker.matched is None)
        ):
            sent += 1
        delta.logprobs, self._held_logprobs = self._held_logprobs[:sent], self._held_logprobs[sent:]
        self._delta = ChoiceDelta(self._index)
        return delta

    def _append_text(self, text: str) -> None:
        self._detokenized_length += len(text)
        can_stop = self.num_tokens >= self._params.min_tokens
        self._send(self._stop_checker.append(text, can_stop).text)

    def _send(self, text: str) -> None:
        self._delta.text += text
        self._sent_length += len(text)

    def _finish_by_engine(self, output: SequenceOutput) -> None:
        if output.finish_reason in ("abort", "error"):
            raise EngineDeadError(f"the engine ended the request early ({output.finish_reason})")
        self._append_text(self._detokenizer.flush())
        if self._stop_checker.matched is not None:
            self._finish("stop", self._stop_checker.matched)
            return
        self._send(self._stop_checker.flush())
        listed = output.stop_token_id in self._params.stop_token_ids
        self._finish(str(output.finish_reason), output.stop_token_id if listed else None)

    def _finish(self, reason: str, stop_reason: int | str | None) -> None:
        self.finished = True
        self.finish_reason = reason
        self._delta.finish_reason = reason
        self._delta.stop_reason = stop_reason


@dataclass(slots=True)
class Usage:
    """Tokens of one HTTP request so far."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0

    def as_dict(self) -> dict[str, object]:
        """As OpenAI's `usage`."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Generation:
    """The engine requests of one HTTP request, one for each prompt; choice `prompt * n + i` is sequence i of a prompt.

    `usage` grows as deltas are read. `terms` are those of the HTTP request; set before `deltas`.

    Args:
        name: what the response says its model is; the model's id if not given.
        continuation: the text continues the prompt's, and keeps a leading space of its own.
    """

    def __init__(
        self, model: ServedModel, requests: Sequence[EngineRequest], *, continuation: bool, name: str | None = None
    ) -> None:
        self._continuation = continuation
        self.model = model
        self.name = name or model.id
        self.requests = requests
        self.terms = RequestTerms()
        self.receipts: list[Receipt] = []
        self._record: RequestRecord | None = None
        self.usage = Usage(prompt_tokens=sum(len(request.prompt_token_ids) for request in requests))

    def record_in(self, record: RequestRecord) -> None:
        """Have a record told when tokens begin and end to come; after `terms` are set, before `deltas`."""
        self._record = record
        record.generates(self.model.id, self.terms.class_name, self.usage, self.num_choices)

    def trace_in(self, trace: RequestTrace, *, stream: bool) -> None:
        """Have a sampled request's trace say what is generated; before `deltas`."""
        request = self.requests[0]
        trace.generates(self.usage, request_attributes(request.sampling_params))
        trace.attributes |= {
            spans.REQUEST_MODEL: self.name,
            spans.REQUEST_STREAM: stream,
            spans.RESPONSE_MODEL: self.model.id,
            spans.RESPONSE_ID: request.request_id,
        }

    def keep_receipts(self) -> None:
        """Have `receipts` say where each engine request goes; before `deltas`."""
        self.receipts = [Receipt(request.request_id) for request in self.requests]

    def receipt_fields(self) -> dict[str, object]:
        """What the answer says of them: nothing unless they are kept."""
        return {FIELD: [receipt.as_dict() for receipt in self.receipts]} if self.receipts else {}

    @property
    def num_choices(self) -> int:
        return sum(request.sampling_params.n for request in self.requests)

    def deltas(self) -> AsyncGenerator[list[ChoiceDelta], None]:
        """Yield what comes to the choices, until each has its finish reason.

        Closing the generator aborts what is unfinished. Raises what ModelClient.generate raises.
        """
        first_choices = range(0, self.num_choices, max(1, self.num_choices // len(self.requests)))
        receipts: Sequence[Receipt | None] = self.receipts or [None] * len(self.requests)
        streams = [
            self._deltas_of(request, first, receipt, self._terms_of(number))
            for number, (request, first, receipt) in enumerate(zip(self.requests, first_choices, receipts, strict=True))
        ]
        # A generator around another costs every token its way through both.
        return streams[0] if len(streams) == 1 else merge(streams)

    def _terms_of(self, number: int) -> RequestTerms:
        """Of one of its engine requests: when all come again, each is known again."""
        return self.terms._replace(fingerprint=self.terms.fingerprint + number) if number else self.terms

    async def _deltas_of(
        self, request: EngineRequest, first_choice: int, receipt: Receipt | None, terms: RequestTerms
    ) -> AsyncGenerator[list[ChoiceDelta], None]:
        params = request.sampling_params
        texts = [
            ChoiceText(first_choice + index, self.model.tokenizer, params, continuation=self._continuation)
            for index in range(params.n)
        ]
        cached, begun = 0, False
        trace = current_trace()
        detokenizing: DetokenizeTrace | None = None
        try:
            # Closed at once when the last choice hits a stop string: the engine need not run to its token limit.
            async with aclosing(self.model.client.generate(request, receipt, terms)) as stream:
                async for outputs in stream:
                    if not begun:
                        begun = True
                        if self._record is not None:
                            self._record.first_tokens(outputs[0].waited_s)
                        if trace is not None:
                            trace.first_tokens()
                            detokenizing = DetokenizeTrace(trace)
                    if detokenizing is None:
                        cached = self._push(request, texts, outputs, cached)
                    else:
                        began_s = time.perf_counter()
                        cached = self._push(request, texts, outputs, cached)
                        detokenizing.busy_s += time.perf_counter() - began_s
                    deltas = [delta for text in texts if (delta := text.take()) is not None]
                    ended = all(text.finished for text in texts)
                    if trace is not None and trace.captures_content:
                        for delta in deltas:
                            trace.add_text(delta.index, delta.text)
                    if ended:
                        if self._record is not None:
                            self._record.last_tokens(text.finish_reason for text in texts)
                        if trace is not None:
                            trace.answered(request.request_id, first_choice, [text.finish_reason for text in texts])
                    if deltas:
                        yield deltas
                    if ended:
                        return
        finally:
            if detokenizing is not None:
                detokenizing.end()
        raise EngineDeadError("the engine's stream ended before the request was finished")

    def _push(
        self, request: EngineRequest, texts: list[ChoiceText], outputs: list[SequenceOutput], num_cached_tokens: int
    ) -> int:
        """Turn tokens into text, and count them; returns how many prompt tokens are known to have been cached."""
        before = sum(text.num_tokens for text in texts)
        for output in outputs:
            text = texts[output.index]
            if text.push(output) and len(texts) > 1:
                # It has run into a stop string, of which the engine knows nothing; the others go on.
                self.model.client.stop(request.request_id, output.index)
            if output.num_cached_tokens > num_cached_tokens:
                self.usage.cached_tokens += output.num_cached_tokens - num_cached_tokens
                num_cached_tokens = output.num_cached_tokens
        self.usage.completion_tokens += sum(text.num_tokens for text in texts) - before
        return num_cached_tokens
