"""What an ingress keeps of one request: what came, for another replica to go on; what is unread, for its reader."""

from __future__ import annotations

import asyncio
import dataclasses
import time

from app.balancer import RequestTerms
from app.ingress.receipt import Receipt
from app.telemetry.request_trace import RequestTrace
from engine.errors import OverloadedError, QuireError
from engine.outputs import SequenceOutput
from engine.request import EngineRequest, ResumedSequence


class _SequenceJournal:
    """One sequence so far, whichever replicas made it."""

    __slots__ = ("cumulative_logprob", "finished", "stopped", "token_ids")

    def __init__(self, resumed: ResumedSequence) -> None:
        self.token_ids = list(resumed.token_ids)
        self.cumulative_logprob = resumed.cumulative_logprob
        self.finished = resumed.finished
        self.stopped = False


class RequestJournal:
    """Takes a request's outputs from its replicas, in order, and hands them to its one reader.

    What comes while the reader is away is coalesced, one output a sequence. All on one event loop.

    Args:
        max_unread: tokens, and entries of their logprobs, that may wait for the reader.
        receipt: to be filled in, if its reader wants one.
        trace: of the HTTP request that it is for, if that is sampled.
        terms: its class, tenant and deadline.
    """

    def __init__(
        self,
        request: EngineRequest,
        max_unread: int,
        receipt: Receipt | None = None,
        trace: RequestTrace | None = None,
        terms: RequestTerms | None = None,
    ) -> None:
        self.request = request
        self.terms = terms or RequestTerms()
        self.receipt = receipt
        self.trace = trace
        self.finished = False
        self.num_tokens = 0
        # The number of the attempt that feeds it, and how many there were; for whoever makes them to set.
        self.attempt = 0
        self.num_attempts = 0
        self.began_s = time.monotonic()
        self._max_unread = max_unread
        resumed = request.resumed or (ResumedSequence(),) * request.sampling_params.n
        self._sequences = [_SequenceJournal(sequence) for sequence in resumed]
        self._unread: list[SequenceOutput] = []
        self._num_unread = 0
        self._error: QuireError | None = None
        self._has_news = False
        self._waiting: asyncio.Future[None] | None = None

    @property
    def ended(self) -> bool:
        """No more will come: finished or failed."""
        return self.finished or self._error is not None

    @property
    def sequences_finished(self) -> bool:
        """Every sequence has its finish reason."""
        return all(sequence.finished for sequence in self._sequences)

    def add(self, output: SequenceOutput) -> None:
        """Record an output and let the reader have it.

        Raises:
            OverloadedError: the reader is too far behind; the caller ends the request.
        """
        sequence = self._sequences[output.index]
        if sequence.finished:
            return
        output.request_id = self.request.request_id
        sequence.token_ids += output.token_ids
        self.num_tokens += len(output.token_ids)
        self._num_unread += len(output.token_ids)
        if output.logprobs is not None:
            sequence.cumulative_logprob += sum(entry.logprob for entry in output.logprobs)
            self._num_unread += sum(len(entry.top) for entry in output.logprobs)
        sequence.finished = output.finish_reason is not None
        # Whether the request is finished is the client's to say, once the counts agree.
        output.request_finished = False
        if self._num_unread > self._max_unread:
            raise OverloadedError(
                f"request {self.request.request_id}: the reader is {self._num_unread} tokens behind, "
                f"at most {self._max_unread} are kept"
            )
        self._queue(output)
        self._wake()

    def stop(self, index: int) -> bool:
        """The reader needs no more of a sequence; whether it was still running."""
        sequence = self._sequences[index]
        if sequence.finished:
            return False
        sequence.finished = sequence.stopped = True
        return True

    def is_stopped(self, index: int) -> bool:
        """Whether the reader ended this sequence."""
        return self._sequences[index].stopped

    def finish(self) -> None:
        """Everything has come: the reader ends after what is unread."""
        self.finished = True
        last = self._unread[-1] if self._unread else None
        if last is None:
            last = SequenceOutput(self.request.request_id, len(self._sequences) - 1, [])
            self._unread.append(last)
        last.request_finished = True
        self._wake()

    def fail(self, error: QuireError) -> None:
        """The request cannot be finished: the reader gets `error` in place of what is unread."""
        if not self.ended:
            self._error = error
            self._unread.clear()
            self._wake()

    async def read(self) -> list[SequenceOutput]:
        """Wait for outputs and take them all; the last one says `request_finished`. Raises what `fail` was given."""
        if not self._has_news:
            # A future of its own: an Event keeps a queue of waiters, and there is one reader.
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        if self._error is not None:
            raise self._error
        outputs, self._unread = self._unread, []
        self._num_unread = 0
        self._has_news = False
        return outputs

    def resumed_request(self) -> EngineRequest:
        """The request as another replica has to go on with it."""
        if not any(sequence.token_ids for sequence in self._sequences):
            return self.request
        resumed = tuple(
            ResumedSequence(tuple(sequence.token_ids), sequence.cumulative_logprob, sequence.finished)
            for sequence in self._sequences
        )
        return dataclasses.replace(self.request, resumed=resumed)

    def _wake(self) -> None:
        self._has_news = True
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def _queue(self, output: SequenceOutput) -> None:
        for unread in reversed(self._unread):
            if unread.index == output.index:
                unread.token_ids += output.token_ids
                if output.logprobs is not None:
                    unread.logprobs = (unread.logprobs or []) + output.logprobs
                unread.finish_reason = output.finish_reason
                unread.stop_token_id = output.stop_token_id
                unread.num_cached_tokens = unread.num_cached_tokens or output.num_cached_tokens
                return
        self._unread.append(output)
