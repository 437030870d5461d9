"""The ledger's lines: a JSON object each, whose last field is a checksum of what comes before it.

    {"kind":"end","id":"cmpl-1","at":1795438800.25,"tenant":"acme",...,"crc":"5a0c1f3e"}

Every record is whole by itself, so that the last one of a request says all that is known of it.
"""

from __future__ import annotations

import json
import zlib
from typing import Any, Literal, NamedTuple

VERSION = 1

RecordKind = Literal["begin", "progress", "end"]

_CHECKSUM = b',"crc":"%08x"}\n'
_CHECKSUM_LENGTH = len(_CHECKSUM % 0)
_encode = json.JSONEncoder(separators=(",", ":")).encode


class UsageRecord(NamedTuple):
    """What is known of a request.

    Attributes:
        kind: `begin` when it is sound and goes to a model, `progress` while it runs, `end` when its answer has ended.
        request_id: as its answer has it (`cmpl-...`, `chatcmpl-...`).
        at: Unix seconds.
        adapter: of the model; empty for the model itself.
        status: HTTP status, 499 for a client that went away; 0 before the end.
        finish: why its choices ended, `length`, `stop` or both; empty if not all did.
    """

    kind: RecordKind
    request_id: str
    at: float
    tenant: str
    model: str
    adapter: str
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    status: int = 0
    finish: str = ""


class SegmentStart(NamedTuple):
    """The first line of a segment; `at` in Unix seconds."""

    at: float


class SegmentEnd(NamedTuple):
    """The last line of a segment that is closed.

    Attributes:
        carried: its writer goes on with its open requests in the next segment; otherwise they have been cut off.
    """

    carried: bool


Line = UsageRecord | SegmentStart | SegmentEnd


class DamagedLineError(ValueError):
    """A line that was not written whole, or has changed since, or is of a later version."""


def encode_line(line: Line) -> bytes:
    """A line with its checksum and its end."""
    if isinstance(line, UsageRecord):
        fields = line._asdict()
        fields["id"] = fields.pop("request_id")
    elif isinstance(line, SegmentStart):
        fields = {"kind": "segment", "version": VERSION, "at": line.at}
    else:
        fields = {"kind": "closed", "carried": line.carried}
    head = _encode(fields)[:-1].encode()
    return head + _CHECKSUM % zlib.crc32(head)


def decode_line(data: bytes) -> Line:
    """The line of these bytes; DamagedLineError says what is wrong with them."""
    head = data[:-_CHECKSUM_LENGTH]
    if data[-_CHECKSUM_LENGTH:] != _CHECKSUM % zlib.crc32(head):
        raise DamagedLineError("its checksum is not that of its bytes")
    fields: dict[str, Any] = json.loads(head + b"}")
    try:
        if fields["kind"] == "segment":
            if fields["version"] != VERSION:
                raise DamagedLineError(f"version {fields['version']} is not known, only {VERSION}")
            return SegmentStart(fields["at"])
        if fields["kind"] == "closed":
            return SegmentEnd(fields["carried"])
        return UsageRecord(request_id=fields.pop("id"), **fields)
    except (KeyError, TypeError) as error:
        raise DamagedLineError(f"it has other fields than are known: {error}") from None
