"""The socket end to end: a real StreamServer and real ReplicaLinks on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator

import pytest

from app.replica.stream_server import StreamServer
from app.transport.connection import Limits
from app.transport.demand_messages import DemandShare, encode_demand
from app.transport.errors import AuthenticationError, FrameError, SilenceError, SlowReaderError
from app.transport.frames import Frame, FrameDecoder, encode_frame
from app.transport.handshake import ClientHandshake
from app.transport.link import Endpoint, Link, ReplicaLink
from app.transport.messages import Kind, encode_abort
from app.transport.submit_messages import Submission

SECRET = b"s" * 32
LIMITS = Limits(handshake_s=1.0, heartbeat_s=0.05, max_outgoing_bytes=1 << 20, max_blocked_s=0.4)


class Ingresses:
    """The replica's side: notes who comes, goes and aborts."""

    def __init__(self) -> None:
        self.events: list[tuple[object, ...]] = []

    def subscribed(self, ingress_id: str) -> None:
        self.events.append(("subscribed", ingress_id))

    def unsubscribed(self, ingress_id: str) -> None:
        self.events.append(("unsubscribed", ingress_id))

    def aborted(self, ingress_id: str, attempts: Iterable[int]) -> None:
        self.events.append(("aborted", ingress_id, *attempts))

    def stopped(self, ingress_id: str, attempt: int, index: int) -> None:
        self.events.append(("stopped", ingress_id, attempt, index))

    def submitted(self, ingress_id: str, submission: Submission) -> None:
        self.events.append(("submitted", ingress_id, submission))

    def demanded(self, ingress_id: str, share: DemandShare) -> None:
        self.events.append(("demanded", ingress_id, share))

    def synced(self, ingress_id: str, number: int) -> None:
        self.events.append(("synced", ingress_id, number))


class Replica:
    """The ingress's side: notes frames and losses."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.losses: list[Exception | None] = []

    def link_frame(self, _link: Link, frame: Frame) -> None:
        self.frames.append(frame)

    def link_down(self, _link: Link, cause: Exception | None) -> None:
        self.losses.append(cause)


class Served:
    def __init__(self, limits: Limits) -> None:
        self.ingresses = Ingresses()
        self.server = StreamServer("127.0.0.1", "epoch", SECRET, limits)
        self.server.start(self.ingresses)
        self.endpoint = Endpoint("127.0.0.1", self.server.port, "epoch")


@pytest.fixture
def served() -> Iterator[Served]:
    served = Served(LIMITS)
    yield served
    served.server.close()


async def until(condition: Callable[[], object], timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - the conditions are other threads'
            await asyncio.sleep(0.005)


def raw_client(endpoint: Endpoint) -> socket.socket:
    """A bare socket that has done the handshake: for what no well-behaved link would do."""
    client = ClientHandshake(SECRET, endpoint.epoch)
    connection = socket.create_connection(endpoint[:2])
    connection.sendall(client.opening())
    while client.version is None:
        (length,) = struct.unpack("<I", connection.recv(4, socket.MSG_WAITALL))
        (frame,) = FrameDecoder().feed(struct.pack("<I", length) + connection.recv(length, socket.MSG_WAITALL))
        connection.sendall(client.feed(frame))
    return connection


@pytest.mark.anyio
async def test_frames_go_both_ways_and_unknown_kinds_are_ignored(served: Served) -> None:
    replica = Replica()
    link = ReplicaLink(served.endpoint, "ingress", SECRET, replica, LIMITS)
    await until(lambda: ("subscribed", "ingress") in served.ingresses.events)
    share = DemandShare(0.5, 1.0, 20.0, 400.0, 3.0, 0.25)
    link.send(encode_frame(250, "from the future") + encode_demand(share) + encode_abort([1, 2]))
    await until(lambda: ("aborted", "ingress", 1, 2) in served.ingresses.events)
    assert ("demanded", "ingress", share) in served.ingresses.events
    data = encode_frame(Kind.LOAD, {}) + encode_frame(251)
    served.server.call_soon(served.server.send, "ingress", data)
    await until(lambda: {Kind.LOAD, 251} <= {frame.kind for frame in replica.frames})
    link.close()
    await until(lambda: ("unsubscribed", "ingress") in served.ingresses.events)
    assert not served.server.is_subscribed("ingress")


@pytest.mark.anyio
async def test_heartbeats_keep_an_idle_connection(served: Served) -> None:
    replica = Replica()
    link = ReplicaLink(served.endpoint, "ingress", SECRET, replica, LIMITS)
    await asyncio.sleep(LIMITS.heartbeat_s * (LIMITS.silent_heartbeats + 4))
    assert sum(frame.kind == Kind.HEARTBEAT for frame in replica.frames) >= LIMITS.silent_heartbeats
    assert replica.losses == []
    link.close()
    await until(lambda: not served.server.subscribers)


@pytest.mark.anyio
async def test_a_wrong_secret_never_gets_in_and_says_so(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    replica = Replica()
    link = ReplicaLink(served.endpoint, "intruder", b"x" * 32, replica, LIMITS)
    await until(lambda: "AuthenticationError" in caplog.text)
    link.close()
    assert served.ingresses.events == []
    assert replica.losses == []


@pytest.mark.anyio
async def test_a_link_redials_and_gives_up_when_told(served: Served) -> None:
    replica = Replica()
    link = ReplicaLink(served.endpoint, "ingress", SECRET, replica, LIMITS)
    await until(lambda: served.server.subscribers)
    connection = served.server._subscribers["ingress"]
    served.server.call_soon(connection.fail, FrameError("broken for the test"))
    await until(lambda: replica.losses and served.server.subscribers)
    link.stop_redialing()
    served.server.call_soon(served.server._subscribers["ingress"].close)
    await until(lambda: len(replica.losses) == 2)
    await asyncio.sleep(0.2)
    assert served.server.subscribers == ()


@pytest.mark.anyio
async def test_the_same_ingress_dialling_again_replaces_its_old_line(served: Served) -> None:
    first, second = Replica(), Replica()
    link = ReplicaLink(served.endpoint, "ingress", SECRET, first, LIMITS)
    await until(lambda: served.server.subscribers)
    link.stop_redialing()
    other = ReplicaLink(served.endpoint, "ingress", SECRET, second, LIMITS)
    await until(lambda: first.losses)
    assert [event[0] for event in served.ingresses.events] == ["subscribed", "unsubscribed", "subscribed"]
    assert served.server.is_subscribed("ingress")
    other.close()
    await until(lambda: not served.server.subscribers)


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack("<I", 1 << 30),
        struct.pack("<I", 3) + b"\xc1\xc1\xc1",
        encode_frame(Kind.ABORT, [1]),
    ],
    ids=["http", "huge", "no msgpack", "unauthenticated abort"],
)
def test_strangers_are_cut_off(served: Served, garbage: bytes) -> None:
    with socket.create_connection(served.endpoint[:2]) as stranger:
        stranger.settimeout(3)
        stranger.sendall(garbage)
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(100) == b""
    assert served.ingresses.events == []


def test_a_stranger_that_says_nothing_is_cut_off(served: Served) -> None:
    with socket.create_connection(served.endpoint[:2]) as stranger:
        stranger.settimeout(3)
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(1) == b""


@pytest.mark.parametrize("how", ["oversize", "abort before subscribe", "silent", "does not read", "reads slowly"])
def test_a_trusted_ingress_that_misbehaves_is_cut_off(how: str, caplog: pytest.LogCaptureFixture) -> None:
    limits = LIMITS._replace(max_frame_bytes=4096)
    if how in ("does not read", "reads slowly"):
        # Its silence must not be what ends it.
        limits = limits._replace(heartbeat_s=60.0)
    if how == "does not read":
        limits = limits._replace(max_blocked_s=60.0)
    served = Served(limits)
    try:
        with raw_client(served.endpoint) as ingress:
            ingress.settimeout(5)
            if how == "oversize":
                ingress.sendall(struct.pack("<I", 4097))
                expected: type[Exception] = FrameError
            elif how == "abort before subscribe":
                ingress.sendall(encode_abort([1]))
                expected = FrameError
            else:
                ingress.sendall(encode_frame(Kind.SUBSCRIBE, "ingress"))
                expected = SilenceError if how == "silent" else SlowReaderError
            deadline = time.monotonic() + 5
            flooding = how in ("does not read", "reads slowly")
            chunk = encode_frame(Kind.STEP, b"x" * (64 << 10))
            sent = 0
            while expected.__name__ not in caplog.text:
                assert time.monotonic() < deadline, caplog.text
                if flooding and served.server.subscribers and (how == "does not read" or sent < 100):
                    # "reads slowly": the kernel's buffers fill, but our own bound is never reached.
                    sent += 1
                    served.server.call_soon(served.server.send, "ingress", chunk)
                time.sleep(0.001)
        assert served.server.subscribers == () or how == "oversize"
    finally:
        served.server.close()


def test_authentication_error_is_logged_at_the_replica(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_connection(served.endpoint[:2]) as stranger:
        stranger.settimeout(3)
        stranger.sendall(ClientHandshake(SECRET, "epoch").opening() + encode_frame(3, b"\0" * 32))
        received = b""
        while data := stranger.recv(4096):
            received += data
    assert AuthenticationError.__name__.encode() in received
    assert AuthenticationError.__name__ in caplog.text
