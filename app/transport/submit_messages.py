"""How an ingress hands a request to a replica ahead of its Serve call: SUBMIT.

The Serve call follows with the same request unless that has ended by then, so that a message lost, or not understood,
costs time and nothing else.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from app.transport.errors import FrameError
from app.transport.frames import Frame, encode_frame
from app.transport.messages import Kind
from engine.errors import RequestError
from engine.request import EngineRequest, ResumedSequence
from engine.sampling_params import SamplingParams

# Of the handshake's versions the first that has SUBMIT.
SUBMIT_VERSION = 3

_PARAMS = {entry.name: entry for entry in dataclasses.fields(SamplingParams)}
# Its arrival the replica reckons itself, and a timeline is nobody else's.
_REQUEST = frozenset(entry.name for entry in dataclasses.fields(EngineRequest)) - {"arrival_time", "timeline"}


class Submission(NamedTuple):
    """What the Serve call of an attempt says, too: see ReplicaService.generate.

    Attributes:
        uncached_tokens: of its prompt, as far as its ingress knows what the replica has cached; 0 if that was not told.
    """

    attempt: int
    request: EngineRequest
    waited_s: float = 0.0
    trace: dict[str, str] | None = None
    uncached_tokens: int = 0


def encode_submit(submission: Submission) -> bytes:
    """The SUBMIT frame: maps by name, of sampling parameters those that are not as by default.

    Raises FrameError if it exceeds the frame's bound.
    """
    request = submission.request
    values: dict[str, Any] = {name: getattr(request, name) for name in _REQUEST}
    values["prompt_token_ids"] = list(request.prompt_token_ids)
    values["sampling_params"] = _params(request.sampling_params)
    values["resumed"] = [dataclasses.astuple(sequence) for sequence in request.resumed]
    return encode_frame(
        *(Kind.SUBMIT, submission.attempt, values, submission.waited_s, submission.trace, submission.uncached_tokens)
    )


def decode_submit(frame: Frame) -> Submission | None:
    """None for a request that says what is not known here, or that is refused: its call tells the same, and why.

    Raises FrameError.
    """
    try:
        attempt, values, waited_s, trace = frame.fields[:4]
        if type(attempt) is not int or (trace is not None and not _is_text(trace)):
            raise FrameError("malformed SUBMIT: an attempt, a request and its trace expected")
        # Not sent by ingresses of an older version.
        uncached_tokens = int(frame.fields[4]) if len(frame.fields) > 4 else 0
        values = dict(values)
        params = dict(values["sampling_params"])
        if not _REQUEST.issuperset(values) or not _PARAMS.keys() >= params.keys():
            return None
        values["prompt_token_ids"] = list(values["prompt_token_ids"])
        values["sampling_params"] = SamplingParams(**params)
        values["resumed"] = tuple(ResumedSequence(tuple(tokens), *rest) for tokens, *rest in values["resumed"])
        return Submission(attempt, EngineRequest(**values), float(waited_s), trace, uncached_tokens)
    except RequestError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise FrameError(f"malformed SUBMIT: {error!r}") from error


def _params(params: SamplingParams) -> dict[str, Any]:
    values = {}
    for name, entry in _PARAMS.items():
        value = getattr(params, name)
        if name == "logit_bias":
            value = dict(value)
            if not value:
                continue
        elif value == entry.default:
            continue
        values[name] = value
    return values


def _is_text(trace: Any) -> bool:
    return isinstance(trace, dict) and all(isinstance(part, str) for entry in trace.items() for part in entry)
