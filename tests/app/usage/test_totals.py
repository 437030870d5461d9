from __future__ import annotations

from app.usage.records import SegmentEnd, SegmentStart, UsageRecord, encode_line
from app.usage.totals import SegmentUsage, UsageCounts, UsageKey, segment_usage
from tests.app.usage.helpers import MIDNIGHT, record

KEY = UsageKey("acme", "tiny", "")


def usage(*lines: UsageRecord | SegmentEnd, goes_on: bool = False) -> SegmentUsage:
    return segment_usage([encode_line(line) for line in (SegmentStart(MIDNIGHT), *lines)], goes_on=goes_on)


def test_a_request_counts_once_by_its_last_record() -> None:
    told = usage(record(kind="begin", output_tokens=0), record(kind="progress", output_tokens=3), record())
    assert told.days == {"2026-11-23": {KEY: UsageCounts(1, 0, 0, 10, 4, 5)}}
    assert (told.began, told.num_open, told.num_damaged, told.num_records) == (MIDNIGHT, 0, 0, 3)


def test_on_the_day_on_which_it_ended() -> None:
    told = usage(record(kind="begin", at=MIDNIGHT - 1), record(at=MIDNIGHT), record("other", at=MIDNIGHT - 0.001))
    assert {day: totals[KEY].requests for day, totals in told.days.items()} == {"2026-11-23": 1, "2026-11-22": 1}


def test_a_prompt_that_was_never_computed_is_not_counted() -> None:
    told = usage(record(output_tokens=0, status=429))
    assert told.days["2026-11-23"][KEY] == UsageCounts(requests=1, unserved=1)


def test_requests_without_an_end_count_if_their_writer_has_ended() -> None:
    running = record(kind="progress", output_tokens=3)
    for last in ((), (SegmentEnd(carried=False),)):
        told = usage(running, *last)
        assert told.days["2026-11-23"][KEY] == UsageCounts(1, 0, 1, 10, 4, 3)
        assert told.num_open == 0
    for told in (usage(running, goes_on=True), usage(running, SegmentEnd(carried=True))):
        assert (told.days, told.num_open) == ({}, 1)


def test_damaged_lines_are_counted_and_others_read() -> None:
    data = [
        encode_line(record("first")),
        b"no json\n",
        encode_line(record("second"))[:-9],
        encode_line(record("third")),
    ]
    told = segment_usage(data)
    assert (told.days["2026-11-23"][KEY].requests, told.num_damaged, told.began) == (2, 2, None)


def test_others_may_go_first() -> None:
    rests: list[None] = []
    segment_usage([encode_line(record(str(number))) for number in range(1000)], pace=lambda: rests.append(None))
    assert len(rests) == 1000 // 128
