"""Closed segments in a real S3 server, moto's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from app.usage.roll_up import KEPT, UNCOPIED, roll_up
from app.usage.settings import UsageSettings
from app.usage.totals import UsageCounts
from app.usage.writer import UsageStats
from engine.errors import ModelLoadError
from engine.loading import s3_client
from tests.app.usage.helpers import World, counts
from tests.engine.loading.s3_server import S3Server, running_s3, use_s3


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with running_s3() as running:
        yield running


@pytest.fixture
def s3(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    use_s3(monkeypatch, server.url)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    monkeypatch.setattr(s3_client, "_FIRST_DELAY_S", 0.001)
    return server


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def killed(directory: Path, writer: str = "w") -> None:
    """A process serves two requests, one in each of two segments, and is killed amid the second."""
    world = World(directory, writer, roll_bytes=500)
    world.end(world.begin("cmpl-1"))
    world.writer.write()
    world.begin("cmpl-2").tokens.completion_tokens = 2
    world.writer.note_progress()
    world.writer.write()
    world.crash()


EXPECTED = {"acme": UsageCounts(2, 0, 1, 20, 0, 7)}


def test_a_bucket_says_what_the_directories_do(s3: S3Server, tmp_path: Path) -> None:
    s3.client.create_bucket(Bucket="books")
    stats = UsageStats()
    for node in ("node-1", "node-2"):
        killed(tmp_path / node, node)
        roll_up(UsageSettings(tmp_path / node, copy_to="s3://books/usage/"), stats)
        assert counts(tmp_path / node) == EXPECTED
        assert names(tmp_path / node / KEPT) == [f"{node}-000001.jsonl", f"{node}-000002.jsonl"]
    assert not any(stats.errors.values())
    keys = [item["Key"] for item in s3.client.list_objects_v2(Bucket="books")["Contents"]]
    assert keys == [f"usage/segments/{node}-00000{number}.jsonl" for node in ("node-1", "node-2") for number in (1, 2)]
    found = counts("s3://books/usage")
    assert found == {"acme": UsageCounts(4, 0, 2, 40, 0, 14)}


def test_a_bucket_that_refuses_holds_nothing_up(s3: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    killed(tmp_path)
    settings, stats = UsageSettings(tmp_path, copy_to="s3://later"), UsageStats()
    for _ in range(2):
        roll_up(settings, stats)
        assert counts(tmp_path) == EXPECTED
        assert len(names(tmp_path / UNCOPIED)) == 2
    assert stats.errors["copy"] == 2
    assert caplog.text.count("segments cannot be copied: s3://later/segments/w-000001.jsonl: no such bucket") == 1
    s3.client.create_bucket(Bucket="later")
    roll_up(settings, stats)
    assert names(tmp_path / UNCOPIED) == []
    assert counts("s3://later") == counts(tmp_path) == EXPECTED


def test_a_crash_between_copying_and_saying_so_copies_again(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.client.create_bucket(Bucket="twice")
    killed(tmp_path)
    settings, rename = UsageSettings(tmp_path, copy_to="s3://twice"), Path.rename

    def crashes(path: Path, target: Path) -> Path:
        if target.parent.name == KEPT:
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", crashes)
        with pytest.raises(KeyboardInterrupt):
            roll_up(settings, UsageStats())
    roll_up(settings, UsageStats())
    assert counts("s3://twice") == counts(tmp_path) == EXPECTED


def test_a_ledger_that_cannot_be_read_is_an_error(s3: S3Server) -> None:  # noqa: ARG001 - the server is there
    with pytest.raises(ModelLoadError, match="s3://nowhere/segments/: no such bucket"):
        counts("s3://nowhere")
