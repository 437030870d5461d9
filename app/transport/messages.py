"""What replica and ingress say to each other once they trust each other.

    replica → ingress   STEP       one engine step's new tokens of all requests of that ingress, in columns
                        LOAD       the replica's load, and which attempts it includes
                        HEARTBEAT  "I live", answered by PONG
                        BLOCKS     what the prefix cache gained and lost: see block_messages
                        COUNTERS   what the replica counts for `/metrics`: see counter_messages
                        REFUSED    attempts of SUBMIT that it did not take; their Serve calls will say why
                        DRAINING   the replica will stop: move your requests within so many seconds
    ingress → replica   SUBSCRIBE  this ingress's id; the replica answers with its LOAD
                        ABORT      attempts whose reader has gone
                        STOP       one sequence of an attempt has all that its reader wanted; the others go on
                        SYNC       the last BLOCKS that this ingress knows of; the replica sends what came after
                        SUBMIT     a request, ahead of its Serve call: see submit_messages
                        DEMAND     this replica's share of what was asked for and waits there: see demand_messages
                        PONG       answer to HEARTBEAT

A request may be submitted more than once (a replica dies, drains or is full). Each submission is an attempt, a number
that its ingress uses once only, so that late tokens of an attempt given up cannot be taken for those of the next.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple, get_args

from app.transport.errors import FrameError
from app.transport.frames import Frame, encode_frame
from engine.outputs import FinishReason, SequenceOutput, TokenLogprobs

_FINISH_REASONS = frozenset(get_args(FinishReason))


class Kind(IntEnum):
    """Kinds of frames after the handshake."""

    STEP = 16
    LOAD = 17
    HEARTBEAT = 18
    DRAINING = 19
    BLOCKS = 20
    SNAPSHOT = 21
    COUNTERS = 22
    REFUSED = 23
    SUBSCRIBE = 32
    ABORT = 33
    PONG = 34
    SYNC = 35
    STOP = 36
    DEMAND = 37
    SUBMIT = 38


class StepRow(NamedTuple):
    """One sequence's part of a step.

    `output.request_id` is empty: the wire names the attempt, and the ingress knows whose it is. `final_count` is set
    on the request's last row: all tokens that this attempt has sent, which the reader compares with its own count.
    """

    attempt: int
    output: SequenceOutput
    final_count: int | None


@dataclass(slots=True)
class StepMessage:
    """Gathers one step's outputs of one ingress into one frame of columns.

    `indexes` and `counts` are sent empty in the usual case, all zeros and all ones. What most rows lack (finish
    reason, cached tokens, logprobs, final count) goes into `extras`, one entry a row that has any of it.
    """

    attempts: list[int] = field(default_factory=list)
    indexes: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    extras: list[tuple[Any, ...]] = field(default_factory=list)

    def add(self, attempt: int, output: SequenceOutput, final_count: int | None) -> None:
        """Append one output of the step."""
        is_first = output.num_cached_tokens or output.waited_s
        if final_count is not None or output.finish_reason or is_first or output.logprobs:
            self.extras.append(
                (
                    len(self.attempts),
                    output.finish_reason,
                    output.stop_token_id,
                    output.num_cached_tokens,
                    final_count,
                    output.logprobs,
                    output.waited_s,
                )
            )
        self.attempts.append(attempt)
        self.indexes.append(output.index)
        self.counts.append(len(output.token_ids))
        self.tokens.extend(output.token_ids)

    def encode(self) -> bytes:
        """The frame. Raises FrameError if the step exceeds the frame's bound."""
        indexes = self.indexes if any(self.indexes) else ()
        counts = self.counts if len(self.tokens) != len(self.attempts) or 0 in self.counts else ()
        return encode_frame(Kind.STEP, self.attempts, indexes, counts, self.tokens, self.extras)


def decode_step(frame: Frame) -> list[StepRow]:
    """The rows of a STEP frame, in the order the engine gave them. Raises FrameError."""
    try:
        attempts, indexes, counts, tokens, extras = frame.fields[:5]
        indexes = indexes or (0,) * len(attempts)
        counts = counts or (1,) * len(attempts)
        if sum(counts) != len(tokens):
            raise FrameError(f"STEP counts {sum(counts)} tokens and brings {len(tokens)}")
        extra_of = {extra[0]: extra for extra in extras}
        rows = []
        start = 0
        for row, (attempt, index, count) in enumerate(zip(attempts, indexes, counts, strict=True)):
            output = SequenceOutput("", index, list(tokens[start : start + count]))
            start += count
            extra = extra_of.get(row)
            rows.append(StepRow(attempt, output, _apply_extra(output, extra) if extra else None))
        return rows
    except (ValueError, TypeError, IndexError) as error:
        raise FrameError(f"malformed STEP: {error}") from error


def _apply_extra(output: SequenceOutput, extra: tuple[Any, ...]) -> int | None:
    _, finish_reason, stop_token_id, num_cached_tokens, final_count, logprobs = extra[:6]
    if finish_reason is not None and finish_reason not in _FINISH_REASONS:
        raise FrameError(f"STEP has an unknown finish reason {finish_reason!r}")
    output.finish_reason = finish_reason
    output.stop_token_id = stop_token_id
    output.num_cached_tokens = num_cached_tokens
    # Not sent by replicas of an older version.
    output.waited_s = float(extra[6]) if len(extra) > 6 else 0.0
    output.request_finished = final_count is not None
    if logprobs is not None:
        output.logprobs = [TokenLogprobs(entry[0], tuple((t, p) for t, p in entry[1])) for entry in logprobs]
    return None if final_count is None else int(final_count)


@dataclass(frozen=True, slots=True)
class LoadReport:
    """A replica's load at one moment.

    Attributes:
        num_blocks, num_free_blocks: KV blocks of the pool.
        num_empty_blocks: of the free ones, those whose content nobody could ask for again.
        cache_age_s: how long the cached block that is handed out next has lain unused; 0 while none is.
        num_waiting, num_running: requests; `num_waiting_tokens` are prompt tokens still to be computed for them.
        num_running_tokens: tokens whose keys and values the running ones hold.
        prefill_tokens_per_s: measured; 0 until a prompt has been computed.
        decode_step_s: measured seconds of a step that only decodes; 0 until known.
        decode_sequence_s: measured seconds that one more sequence adds to such a step; 0 until known.
        prefill_error, decode_sequence_error_s: standard errors of these two; 0 where they are exact, or not told.
        admitted: attempts of this ingress that the numbers include since the last report.
        adapters: that are resident or being loaded.
        num_free_adapter_slots: adapters that could be loaded without waiting for a request to end.
        adapter_load_s: measured seconds until an adapter that is not there can be used; 0 until known.
    """

    num_blocks: int = 0
    num_free_blocks: int = 0
    num_empty_blocks: int = 0
    cache_age_s: float = 0.0
    num_waiting: int = 0
    num_running: int = 0
    num_waiting_tokens: int = 0
    num_running_tokens: int = 0
    prefill_tokens_per_s: float = 0.0
    decode_step_s: float = 0.0
    decode_sequence_s: float = 0.0
    admitted: tuple[int, ...] = ()
    adapters: tuple[str, ...] = ()
    num_free_adapter_slots: int = 0
    adapter_load_s: float = 0.0
    prefill_error: float = 0.0
    decode_sequence_error_s: float = 0.0


_LOAD_FIELDS: dict[str, Callable[[Any], Any]] = {
    entry.name: type(entry.default) for entry in dataclasses.fields(LoadReport)
}


def encode_load(load: LoadReport) -> bytes:
    """LOAD is a map by name, so that a version can add what another does not know."""
    return encode_frame(Kind.LOAD, {name: getattr(load, name) for name in _LOAD_FIELDS})


def decode_load(frame: Frame) -> LoadReport:
    """Unknown names are ignored, missing ones take their default. Raises FrameError."""
    try:
        values = frame.fields[0]
        known = {name: kind(values[name]) for name, kind in _LOAD_FIELDS.items() if name in values}
        return LoadReport(**known)
    except (ValueError, TypeError, IndexError) as error:
        raise FrameError(f"malformed LOAD: {error}") from error


class Draining(NamedTuple):
    """The replica will be gone in `deadline_s` seconds; 0 means that its requests must move now."""

    deadline_s: float
    reason: str


def encode_draining(draining: Draining) -> bytes:
    """The DRAINING frame."""
    return encode_frame(Kind.DRAINING, *draining)


def decode_draining(frame: Frame) -> Draining:
    """Raises FrameError."""
    try:
        deadline_s, reason = frame.fields[:2]
        return Draining(float(deadline_s), str(reason))
    except (ValueError, TypeError) as error:
        raise FrameError(f"malformed DRAINING: {error}") from error


def encode_subscribe(ingress_id: str) -> bytes:
    """The SUBSCRIBE frame."""
    return encode_frame(Kind.SUBSCRIBE, ingress_id)


def decode_subscribe(frame: Frame) -> str:
    """The ingress's id. Raises FrameError."""
    ingress_id = frame.fields[0] if frame.fields else None
    if not isinstance(ingress_id, str) or not 0 < len(ingress_id) <= 256:
        raise FrameError("malformed SUBSCRIBE: an id of 1 to 256 characters expected")
    return ingress_id


def encode_abort(attempts: Iterable[int]) -> bytes:
    """The ABORT frame."""
    return encode_frame(Kind.ABORT, list(attempts))


def decode_abort(frame: Frame) -> tuple[int, ...]:
    """The attempts to abort. Raises FrameError."""
    return _decode_attempts(frame, "ABORT")


def encode_refused(attempts: Iterable[int]) -> bytes:
    """The REFUSED frame."""
    return encode_frame(Kind.REFUSED, list(attempts))


def decode_refused(frame: Frame) -> tuple[int, ...]:
    """The attempts that were refused. Raises FrameError."""
    return _decode_attempts(frame, "REFUSED")


def _decode_attempts(frame: Frame, kind: str) -> tuple[int, ...]:
    attempts = frame.fields[0] if frame.fields else None
    if not isinstance(attempts, tuple) or not all(type(attempt) is int for attempt in attempts):
        raise FrameError(f"malformed {kind}: an array of attempts expected")
    return attempts


def encode_stop(attempt: int, index: int) -> bytes:
    """The STOP frame."""
    return encode_frame(Kind.STOP, attempt, index)


def decode_stop(frame: Frame) -> tuple[int, int]:
    """The attempt, and which of its sequences is to end. Raises FrameError."""
    if len(frame.fields) < 2 or not all(type(field) is int for field in frame.fields[:2]):
        raise FrameError("malformed STOP: an attempt and a sequence expected")
    attempt, index = frame.fields[:2]
    return attempt, index


HEARTBEAT = encode_frame(Kind.HEARTBEAT)
PONG = encode_frame(Kind.PONG)
