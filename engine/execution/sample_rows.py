"""Which rows of a step want logits, and for which draws."""

from __future__ import annotations

from engine.scheduling import SampleRequest, SchedulerOutput


def sample_rows(output: SchedulerOutput) -> tuple[list[int], list[SampleRequest], list[int]]:
    """What to draw this step.

    Returns:
        The batch rows whose logits are needed; the draws; and for each draw the index of its row in that list.
    """
    batch_rows: list[int] = []
    requests: list[SampleRequest] = []
    logits_rows: list[int] = []
    end = 0
    for item in output.scheduled:
        end += len(item.token_ids)
        if item.samples:
            requests.extend(item.samples)
            logits_rows.extend([len(batch_rows)] * len(item.samples))
            batch_rows.append(end - 1)
    return batch_rows, requests, logits_rows


def stays_on_device(request: SampleRequest) -> bool:
    """Whether a device that draws for itself can draw this token and go on from it before the host has seen it.

    How the beams of a search go on, the host decides.
    """
    return not request.sampling_params.use_beam_search
