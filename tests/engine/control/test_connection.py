"""Both ends prove themselves; frames come whole; whoever dies or is late is noticed."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from engine.control.connection import Connection, ControlError, Invitation, Kind, admit, join


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.fixture
def pair() -> Iterator[tuple[Connection, Connection]]:
    left, right = (Connection(sock) for sock in socket.socketpair())
    yield left, right
    left.close()
    right.close()


def invitation(listener: socket.socket, secret: str = "secret", rank: int = 3) -> Invitation:
    return Invitation("127.0.0.1", listener.getsockname()[1], secret, rank)


def test_a_rank_joins_and_says_which_it_is(listener: socket.socket) -> None:
    with ThreadPoolExecutor(1) as pool:
        joining = pool.submit(join, invitation(listener))
        connection, rank = admit(listener.accept()[0], "secret")
        joined = joining.result(10.0)
        joined.send_json(Kind.READY, answer=42)
        assert rank == 3
        assert connection.expect(Kind.READY, 5.0).json() == {"answer": 42}
        joined.close()
        connection.close()


def test_a_stranger_is_turned_away_and_learns_nothing(listener: socket.socket) -> None:
    with ThreadPoolExecutor(1) as pool:
        joining = pool.submit(join, invitation(listener, "guess"), 5.0)
        with pytest.raises(ControlError, match="does not know the group's secret"):
            admit(listener.accept()[0], "secret", 5.0)
        with pytest.raises(ControlError):
            joining.result(10.0)


def test_an_echo_of_our_own_proof_is_no_proof(listener: socket.socket) -> None:
    def echo() -> None:
        with socket.create_connection(listener.getsockname()) as sock:
            while data := sock.recv(4096):
                sock.sendall(data)

    thread = threading.Thread(target=echo)
    thread.start()
    with pytest.raises(ControlError, match="no handshake"):
        admit(listener.accept()[0], "secret", 5.0)
    thread.join(10.0)


def test_nobody_there_is_an_error_that_says_where() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(ControlError, match=f"rank 1 cannot reach rank 0 at 127.0.0.1:{port}"):
        join(Invitation("127.0.0.1", port, "secret", 1), 5.0)


def test_the_end_of_the_other_process_is_noticed_at_once(pair: tuple[Connection, Connection]) -> None:
    left, right = pair
    right.close()
    began = time.monotonic()
    with pytest.raises(ControlError):
        left.receive(30.0)
    assert time.monotonic() - began < 5.0


def test_waiting_has_an_end(pair: tuple[Connection, Connection]) -> None:
    left, right = pair
    assert left.receive(0.05) is None
    with pytest.raises(ControlError, match="no LOADED within"):
        left.expect(Kind.LOADED, 0.05)
    with pytest.raises(ControlError, match="nothing can be sent"):
        right.send(Kind.STEP, bytes(1 << 24), 0.1)


def test_sending_does_not_change_how_long_the_receiver_waits(pair: tuple[Connection, Connection]) -> None:
    left, right = pair
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(left.receive, 30.0)
        time.sleep(0.05)
        left.send(Kind.BEAT, timeout_s=0.01)
        time.sleep(0.1)
        right.send(Kind.READY, b"{}")
        frame = waiting.result(10.0)
    assert frame is not None
    assert frame.kind == Kind.READY


def test_the_others_failure_is_the_answer_to_what_was_awaited(pair: tuple[Connection, Connection]) -> None:
    left, right = pair
    right.send(Kind.BEAT)
    right.send(Kind.FAILED, b"no such file")
    with pytest.raises(ControlError, match="no such file"):
        left.expect(Kind.LOADED, 5.0)


def test_a_frame_of_an_impossible_length_is_refused() -> None:
    left, right = socket.socketpair()
    connection = Connection(left)
    right.sendall(b"\xff\xff\xff\xff\x01")
    with pytest.raises(ControlError, match="a frame of -1 bytes"):
        connection.receive(5.0)
    connection.close()
    right.close()
