"""Sequences of one adapter side by side: a batch's rows are then a few stretches, each of one product."""

from __future__ import annotations

import dataclasses
import itertools

from engine.scheduling import SchedulerOutput


def by_adapter(output: SchedulerOutput) -> SchedulerOutput:
    """The same step, its sequences ordered by their adapters' slots, the base's first; otherwise as they were."""
    slots = [item.adapter_slot for item in output.scheduled]
    if all(before <= after for before, after in itertools.pairwise(slots)):
        return output
    return dataclasses.replace(output, scheduled=tuple(sorted(output.scheduled, key=lambda item: item.adapter_slot)))
