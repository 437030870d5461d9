from __future__ import annotations

import pytest

from app.transport.errors import AuthenticationError, EpochError, FrameError, VersionError
from app.transport.frames import Frame, FrameDecoder, encode_frame
from app.transport.handshake import ClientHandshake, Hand, ServerHandshake, Versions

SECRET = b"s" * 32


def parse(data: bytes) -> Frame:
    (frame,) = FrameDecoder().feed(data)
    return frame


def shake(client: ClientHandshake, server: ServerHandshake) -> None:
    challenge = server.feed(parse(client.opening()))
    welcome = server.feed(parse(client.feed(parse(challenge))))
    client.feed(parse(welcome))


def test_both_sides_agree_on_the_newest_common_version() -> None:
    client, server = ClientHandshake(SECRET, "e", Versions(2, 5)), ServerHandshake(SECRET, "e", Versions(1, 4))
    shake(client, server)
    assert client.version == server.version == 4


def test_versions_without_overlap_are_refused() -> None:
    with pytest.raises(VersionError, match="1 to 2 here, 3 to 4 there"):
        shake(ClientHandshake(SECRET, "e", Versions(3, 4)), ServerHandshake(SECRET, "e", Versions(1, 2)))


def test_an_ingress_refuses_a_replica_without_the_secret() -> None:
    with pytest.raises(AuthenticationError, match="the replica does not"):
        shake(ClientHandshake(SECRET, "e"), ServerHandshake(b"x" * 32, "e"))


def test_a_replica_refuses_an_ingress_without_the_secret() -> None:
    client, server = ClientHandshake(SECRET, "e"), ServerHandshake(SECRET, "e")
    server.feed(parse(client.opening()))
    with pytest.raises(AuthenticationError, match="the ingress does not"):
        server.feed(parse(encode_frame(Hand.PROOF, b"\0" * 32)))
    assert server.version is None


def test_a_proof_of_one_connection_is_worth_nothing_on_another() -> None:
    first, second = ServerHandshake(SECRET, "e"), ServerHandshake(SECRET, "e")
    client = ClientHandshake(SECRET, "e")
    hello = parse(client.opening())
    proof = client.feed(parse(first.feed(hello)))
    second.feed(hello)
    with pytest.raises(AuthenticationError):
        second.feed(parse(proof))


def test_the_replicas_proof_cannot_be_sent_back_as_ones_own() -> None:
    server = ServerHandshake(SECRET, "e")
    challenge = parse(server.feed(parse(ClientHandshake(SECRET, "e").opening())))
    with pytest.raises(AuthenticationError):
        server.feed(parse(encode_frame(Hand.PROOF, challenge.fields[-1])))


def test_versions_cannot_be_talked_down_on_the_way() -> None:
    client, server = ClientHandshake(SECRET, "e", Versions(1, 3)), ServerHandshake(SECRET, "e", Versions(1, 3))
    magic, lowest, _, nonce = parse(client.opening()).fields
    challenge = server.feed(parse(encode_frame(Hand.HELLO, magic, lowest, 1, nonce)))
    with pytest.raises(AuthenticationError):
        client.feed(parse(challenge))


def test_another_process_at_the_same_address_is_noticed() -> None:
    with pytest.raises(EpochError):
        shake(ClientHandshake(SECRET, "old"), ServerHandshake(SECRET, "new"))


@pytest.mark.parametrize(
    "frame",
    [
        encode_frame(Hand.HELLO),
        encode_frame(Hand.HELLO, "http", 1, 1, b"n" * 32),
        encode_frame(Hand.HELLO, "quire", 1, 1, b"short"),
        encode_frame(Hand.HELLO, "quire", "1", 1, b"n" * 32),
        encode_frame(Hand.PROOF, b"p" * 32),
        encode_frame(99),
    ],
)
def test_a_hello_that_is_none_is_refused(frame: bytes) -> None:
    with pytest.raises(FrameError):
        ServerHandshake(SECRET, "e").feed(parse(frame))
