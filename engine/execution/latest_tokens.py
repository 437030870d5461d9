"""What the latest step drew, for a device that computes each step at once but is asked for it ahead."""

from __future__ import annotations

import dataclasses

from engine.int32_buffer import Int32Array
from engine.scheduling import SamplerOutput, SchedulerOutput
from engine.sequence import PLACEHOLDER


class LatestTokens:
    """Fills placeholders with the tokens that the step before drew."""

    def __init__(self) -> None:
        self._drawn: dict[int, int] = {}  # by sequence

    def remember(self, drawn: SamplerOutput) -> None:
        self._drawn = {token.seq_id: token.token_id for token in drawn.tokens}

    def fill(self, output: SchedulerOutput) -> SchedulerOutput:
        """The step with all tokens known; what has no placeholder is not copied."""
        scheduled = tuple(
            item._replace(
                token_ids=self._known(item.seq_id, item.token_ids),
                samples=tuple(
                    sample._replace(token_ids=self._known(sample.seq_id, sample.token_ids)) for sample in item.samples
                ),
            )
            for item in output.scheduled
        )
        return dataclasses.replace(output, scheduled=scheduled)

    def _known(self, seq_id: int, token_ids: Int32Array) -> Int32Array:
        if token_ids[-1] != PLACEHOLDER:
            return token_ids
        known = token_ids.copy()
        known[-1] = self._drawn[seq_id]
        return known
