from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.usage.records import DamagedLineError, Line, SegmentEnd, SegmentStart, decode_line, encode_line
from tests.app.usage.helpers import record


@pytest.mark.parametrize("line", [record(), SegmentStart(1.5), SegmentEnd(carried=True)])
def test_a_line_is_a_json_object_and_comes_back(line: Line) -> None:
    data = encode_line(line)
    assert data.endswith(b"}\n")
    assert data.count(b"\n") == 1
    assert "crc" in json.loads(data)
    assert decode_line(data) == line


@given(st.text(), st.integers(0, 1 << 40), st.floats(0, 1e12))
def test_whatever_a_tenant_is_called(tenant: str, tokens: int, at: float) -> None:
    line = record(tenant=tenant, output_tokens=tokens, at=at)
    assert decode_line(encode_line(line)) == line


@given(st.data())
def test_a_line_that_is_torn_or_changed_is_not_read(data: st.DataObject) -> None:
    line = encode_line(record())
    torn = line[: data.draw(st.integers(0, len(line) - 1))]
    at, bit = data.draw(st.integers(0, len(line) - 1)), data.draw(st.integers(0, 7))
    changed = line[:at] + bytes([line[at] ^ 1 << bit]) + line[at + 1 :]
    for wrong in (torn, changed):
        with pytest.raises(DamagedLineError):
            decode_line(wrong)


def test_a_later_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.usage.records.VERSION", 2)
    later = encode_line(SegmentStart(1.0))
    monkeypatch.undo()
    with pytest.raises(DamagedLineError, match="version 2 is not known, only 1"):
        decode_line(later)


def test_other_fields_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.usage.records._encode", lambda fields: json.dumps(fields | {"cost": 1}))
    later = encode_line(record())
    monkeypatch.undo()
    with pytest.raises(DamagedLineError, match="cost"):
        decode_line(later)
