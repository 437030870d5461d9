"""Messages reach every reader whole and in order, and nothing waits for ever or is left behind."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from engine.control import shared_ring
from engine.control.futex import futexes_work
from engine.control.shared_ring import NUM_SLOTS, SLOT_BYTES, RingError, RingReader, RingWriter

pytestmark = pytest.mark.skipif(not futexes_work(), reason="needs Linux on x86-64")


def ring(num_readers: int) -> tuple[RingWriter, list[RingReader]]:
    writer = RingWriter(num_readers)
    readers = [RingReader(writer.name, number) for number in range(num_readers)]
    writer.unlink()
    return writer, readers


def test_each_reader_gets_every_message_in_order() -> None:
    writer, readers = ring(3)
    messages = [os.urandom(size) for size in (0, 1, 700, 5000)] * 20
    found: list[list[bytes | None]] = [[], [], []]

    def read(number: int) -> None:
        for _ in messages:
            found[number].append(readers[number].take())

    threads = [threading.Thread(target=read, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for message in messages:
        writer.publish(message, 30.0)
    for thread in threads:
        thread.join(30.0)
    assert found == [messages] * 3


@pytest.mark.parametrize("size", [SLOT_BYTES, SLOT_BYTES + 1, 7 * SLOT_BYTES + 3])
def test_a_message_longer_than_a_slot_comes_whole(size: int) -> None:
    writer, (reader,) = ring(1)
    message = os.urandom(size)
    sender = threading.Thread(target=writer.publish, args=(message, 30.0))
    sender.start()
    assert reader.take() == message
    sender.join(30.0)


def test_numbers_wrap(monkeypatch: pytest.MonkeyPatch) -> None:
    writer, (reader,) = ring(1)
    last = (1 << 32) - 2
    writer._words[shared_ring._PUBLISHED] = writer._words[shared_ring._TAKEN] = last
    monkeypatch.setattr(shared_ring, "_POLL_S", 0.001)
    for number in range(2 * NUM_SLOTS):
        writer.publish(str(number).encode(), 1.0)
        assert reader.take() == str(number).encode()


def test_a_reader_that_takes_nothing_ends_the_writers_wait_and_is_named() -> None:
    writer, (_first, second) = ring(2)
    began = time.monotonic()
    for _ in range(NUM_SLOTS):
        writer.publish(b"x", 0.2)
    with pytest.raises(RingError, match="reader 0 has taken nothing"):
        writer.publish(b"x", 0.2)
    assert time.monotonic() - began < 5.0
    assert second.take() == b"x"


def test_a_roused_reader_goes_on_waiting_for_the_message() -> None:
    writer, (reader,) = ring(1)
    found: list[bytes | None] = []
    sleeper = threading.Thread(target=lambda: found.append(reader.take()))
    sleeper.start()
    for _ in range(3):
        time.sleep(0.02)
        writer.rouse()
    assert sleeper.is_alive()
    writer.publish(b"x", 1.0)
    sleeper.join(10.0)
    assert found == [b"x"]


def test_an_abort_ends_every_wait() -> None:
    writer, (reader,) = ring(1)
    raised: list[str] = []

    def read() -> None:
        with pytest.raises(RingError) as caught:
            reader.take()
        raised.append(str(caught.value))

    sleeper = threading.Thread(target=read)
    sleeper.start()
    time.sleep(0.05)
    writer.abort()
    sleeper.join(10.0)
    assert raised == ["aborted"]


def test_a_reader_that_is_no_longer_wanted_gets_nothing() -> None:
    _writer, (reader,) = ring(1)
    assert reader.take(lambda: False) is None


def test_no_name_is_left_once_readers_are_attached() -> None:
    writer = RingWriter(1)
    path = Path("/dev/shm") / writer.name
    assert path.stat().st_mode & 0o777 == 0o600
    RingReader(writer.name, 0)
    writer.unlink()
    writer.unlink()
    assert not path.exists()
    with pytest.raises(FileNotFoundError):
        RingReader(writer.name, 0)


@pytest.mark.parametrize("name", ["../etc/passwd", "quire-steps-", "quire-steps-../x", "psm_1"])
def test_no_other_file_is_opened_as_a_ring(name: str) -> None:
    with pytest.raises(ValueError, match="names no ring"):
        RingReader(name, 0)
