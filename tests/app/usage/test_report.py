from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from app.usage import report
from app.usage import roll_up as module
from app.usage.records import encode_line
from app.usage.report import as_csv, as_json, read_usage, rows
from app.usage.roll_up import DAYS, roll_up
from app.usage.settings import UsageSettings
from app.usage.totals import UsageCounts
from app.usage.writer import SEGMENTS, UsageStats
from engine.errors import ConfigError
from tests.app.usage.helpers import MIDNIGHT, World, counts, record, segment


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A day before midnight that is added, the one after it that is not, and a request that runs."""
    lines = [record("1", MIDNIGHT - 60), record("2", MIDNIGHT - 30, tenant="bert", adapter="sql")]
    segment(tmp_path / SEGMENTS, "v-000001", b"".join(map(encode_line, lines))).close(carried=False)
    roll_up(UsageSettings(tmp_path), UsageStats())
    world = World(tmp_path)
    world.end(world.begin("3"))
    world.begin("4")
    world.writer.write()
    return tmp_path


def test_grouped(directory: Path) -> None:
    usage = read_usage(str(directory))
    one = UsageCounts(1, 0, 0, 10, 4, 5)
    fresh = UsageCounts(1, 0, 0, 10, 0, 5)
    assert rows(usage, ["tenant", "model"]) == [
        (("acme", "tiny"), UsageCounts(2, 0, 0, 20, 4, 10)),
        (("bert", "tiny"), one),
    ]
    assert rows(usage, ["day"]) == [(("2026-11-22",), UsageCounts(2, 0, 0, 20, 8, 10)), (("2026-11-23",), fresh)]
    assert [group for group, _ in rows(usage, ["adapter"])] == [("",), ("sql",)]
    assert rows(usage, ["day"], since="2026-11-23") == [(("2026-11-23",), fresh)]
    assert [group for group, _ in rows(usage, ["day"], until="2026-11-22")] == [("2026-11-22",)]
    assert usage.num_open == 1
    with pytest.raises(ConfigError, match="'user' is none of day, tenant, model, adapter"):
        rows(usage, ["user"])


def test_written(directory: Path) -> None:
    usage = read_usage(str(directory))
    found = rows(usage, ["tenant"])
    told = json.loads(as_json(["tenant"], found, usage))
    assert told["usage"][0] == {
        "tenant": "acme",
        "requests": 2,
        "unserved": 0,
        "interrupted": 0,
        "prompt_tokens": 20,
        "cached_tokens": 4,
        "output_tokens": 10,
    }
    assert (told["open_requests"], told["damaged_lines"]) == (1, 0)
    table = list(csv.DictReader(as_csv(["tenant"], found).splitlines()))
    assert (table[1]["tenant"], table[1]["prompt_tokens"]) == ("bert", "10")


def test_what_is_added_while_it_reads_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = b"".join(encode_line(record(str(number))) for number in range(5))
    for name in ("v", "w"):
        segment(tmp_path / SEGMENTS, f"{name}-000001", lines).close(carried=False)
    read = module.read_unclosed
    seen: list[object] = []

    def reads(*args: Path) -> object:
        # Another process adds both after the first was read.
        told = read(*args)
        seen.append(args)
        roll_up(UsageSettings(tmp_path), UsageStats())
        return told

    monkeypatch.setattr(report, "read_unclosed", reads)
    assert counts(tmp_path)["acme"].requests == 10
    assert len(seen) == 1


def test_a_torn_line_of_a_writer_that_is_gone_is_damage(tmp_path: Path) -> None:
    file = segment(tmp_path / SEGMENTS, "w-000001", encode_line(record()))
    with file.path.open("ab") as torn:
        torn.write(encode_line(record())[:50])
    assert read_usage(str(tmp_path)).num_damaged == 0, "it is being written just now"
    file.abandon()
    usage = read_usage(str(tmp_path))
    assert usage.num_damaged == 1
    roll_up(UsageSettings(tmp_path), UsageStats())
    assert read_usage(str(tmp_path)) == usage


def test_what_is_no_ledger(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no usage ledger"):
        read_usage(str(tmp_path))
    (tmp_path / SEGMENTS).mkdir()
    (tmp_path / DAYS).mkdir()
    (tmp_path / DAYS / "2026-11-23.json").write_text('{"version": 2}')
    with pytest.raises(ConfigError, match="version 2 is not known"):
        read_usage(str(tmp_path))
