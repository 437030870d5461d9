"""When a request was where in the engine: recorded only for requests that ask, as plain data."""

from __future__ import annotations

from typing import Literal, NamedTuple

PhaseKind = Literal["queue", "prefill", "decode", "swapped", "recompute"]


class Phase(NamedTuple):
    """A stretch of a request's life; times are seconds of the engine's clock.

    Attributes:
        kind: `queue` until its first step; `prefill` for each chunk of tokens computed without a draw or up to the
            first one; `decode` while tokens are drawn; `swapped` and `recompute` from a preemption to the step that
            brings it back or begins to compute it again.
        num_tokens: that the chunk computed; 0 for the other kinds.
    """

    kind: PhaseKind
    began: float
    ended: float
    num_tokens: int = 0


class RequestTimeline:
    """A request's phases, one after another; the engine writes it, whoever gave it reads it once the request has ended.

    Its size is bounded: chunks beyond MAX_CHUNKS lengthen the last one, and of phases beyond MAX_PHASES only the number
    is kept.

    Attributes:
        is_decoding: each of its steps draws a token; none of them is recorded.
        ended_at: seconds of the engine's clock; None while it lives.

    Args:
        queued_at: when the request was handed to the engine, in the engine's clock.
    """

    __slots__ = ("_began", "_has_drawn", "_kind", "_num_chunks", "ended_at", "is_decoding", "num_dropped", "phases")

    MAX_CHUNKS = 64
    MAX_PHASES = 256

    def __init__(self, queued_at: float) -> None:
        self.phases: list[Phase] = []
        self.num_dropped = 0
        self.is_decoding = False
        self.ended_at: float | None = None
        self._kind: PhaseKind | None = "queue"
        self._began = queued_at
        self._num_chunks = 0
        self._has_drawn = False

    @property
    def first_token_at(self) -> float | None:
        """When the first token was drawn; None before that."""
        return next((phase.began for phase in self.phases if phase.kind == "decode"), None)

    def started(self, at: float) -> None:
        """A step begins that computes a part of it: it waits no more."""
        if self._kind is not None and self._kind != "decode":
            self._close(at)

    def computed(self, began: float, ended: float, num_tokens: int, *, draws: bool) -> None:
        """A step has computed a part of it, from which a token is drawn or not. Steps may overlap."""
        if self.is_decoding or self.ended_at is not None:
            return
        last = self.phases[-1] if self.phases else None
        if not (self._has_drawn and draws and last is not None and last.kind == "swapped"):
            self._add_chunk(last, began, ended, num_tokens)
            began = ended
        if draws:
            self._kind, self._began = "decode", began
            self.is_decoding = self._has_drawn = True

    def preempted(self, at: float, *, swapped: bool) -> None:
        """Its blocks are taken: swapped out, or dropped to be computed again."""
        self._close(at)
        self._kind, self._began = "swapped" if swapped else "recompute", at
        self.is_decoding = False

    def end(self, at: float) -> None:
        """The request has ended, however it did."""
        self._close(at)
        self.is_decoding = False
        self.ended_at = at

    def _add_chunk(self, last: Phase | None, began: float, ended: float, num_tokens: int) -> None:
        if last is not None and last.kind == "prefill" and (last.ended == ended or self._num_chunks >= self.MAX_CHUNKS):
            # Several sequences of the group in one step, or too many steps.
            self.phases[-1] = last._replace(ended=ended, num_tokens=last.num_tokens + num_tokens)
            return
        self._num_chunks += 1
        self._add(Phase("prefill", began if last is None else max(began, last.ended), ended, num_tokens))

    def _close(self, at: float) -> None:
        if self._kind is not None:
            self._add(Phase(self._kind, self._began, at))
            self._kind = None

    def _add(self, phase: Phase) -> None:
        if len(self.phases) < self.MAX_PHASES:
            self.phases.append(phase)
        else:
            self.num_dropped += 1
