"""The replicas that an ingress is connected to: dials those that Serve lists, feeds the balancer, tells who leaves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from app.balancer import Balancer
from app.balancer.block_follower import BlockFollower
from app.balancer.registry import ReplicaInfo
from app.transport.block_messages import decode_blocks, decode_snapshot, encode_sync
from app.transport.counter_messages import ReplicaCounters, decode_counters
from app.transport.errors import FrameError
from app.transport.frames import Frame
from app.transport.link import Endpoint, Link, LinkListener, ReplicaLink
from app.transport.messages import Kind, StepRow, decode_draining, decode_load, decode_refused, decode_step
from app.transport.submit_messages import SUBMIT_VERSION, Submission, encode_submit

logger = logging.getLogger("ray.serve")

# Running requests leave a stopping replica this long before Serve kills it, or after half its time if that is less.
DRAIN_MARGIN_S = 5.0


class Connector(NamedTuple):
    """What is taken from outside, so that tests need neither Ray nor sockets."""

    secret: Callable[[], bytes]
    connect: Callable[[Endpoint, str, bytes, LinkListener], Link]


class LinksListener(Protocol):
    """Who owns the requests."""

    def stepped(self, rows: Iterable[StepRow]) -> None:
        """A replica's step has brought tokens."""
        ...

    def refused(self, attempts: Iterable[int]) -> None:
        """A replica did not take these by SUBMIT; their calls will say why."""
        ...

    def lost(self, attempts: Iterable[int], reason: str) -> None:
        """The replica that these attempts were placed on has gone."""
        ...

    def leaving(self, attempts: Iterable[int], reason: str, *, only_waiting: bool) -> None:
        """The replica of these attempts leaves: move them, or only those that have no token yet."""
        ...

    def changed(self) -> None:
        """A replica has come up, gone, or begun to drain."""
        ...


@dataclass(slots=True)
class _Replica:
    """`up`: it has answered the subscription with its load. `listed`: Serve still names it."""

    replica_id: str
    info: ReplicaInfo
    link: Link
    follower: BlockFollower
    listed: bool = True
    up: bool = False
    draining: str = ""
    counters: ReplicaCounters | None = None


class ReplicaLinks:
    """One link a replica. All on one event loop."""

    def __init__(
        self, name: str, client_id: str, balancer: Balancer, connector: Connector, listener: LinksListener
    ) -> None:
        self._name = name
        self._client_id = client_id
        self._balancer = balancer
        self._connector = connector
        self._listener = listener
        self._secret = b""
        self._replicas: dict[str, _Replica] = {}
        self._by_link: dict[Link, _Replica] = {}

    async def fetch_secret(self) -> None:
        """Before the first `adopt`."""
        self._secret = await asyncio.to_thread(self._connector.secret)

    @property
    def live(self) -> list[ReplicaInfo]:
        """Replicas that can take a request."""
        return [replica.info for replica in self._replicas.values() if replica.up and not replica.draining]

    @property
    def demand_takers(self) -> list[str]:
        """Ids of the live replicas that want to be told the demand: those of a deployment that autoscales."""
        return [info.replica_id for info in self.live if info.metadata.get("wants_demand")]

    @property
    def hashing(self) -> tuple[str, int] | None:
        """The model's fingerprint and the block size with which replicas hash prompts; None until one has told."""
        for replica in self._replicas.values():
            fingerprint, block_size = (replica.info.metadata.get(name) for name in ("fingerprint", "block_size"))
            if isinstance(fingerprint, str) and isinstance(block_size, int):
                return fingerprint, block_size
        return None

    @property
    def counters(self) -> dict[str, ReplicaCounters]:
        """What the connected replicas have last told of themselves, by id; none of those of an older version."""
        return {
            replica.replica_id: replica.counters
            for replica in self._replicas.values()
            if replica.up and replica.counters is not None
        }

    @property
    def num_known(self) -> int:
        """Replicas that are dialled, connected or not."""
        return len(self._replicas)

    def send(self, replica_id: str, data: bytes) -> None:
        """Send frames to a replica, if it is connected."""
        replica = self._replicas.get(replica_id)
        if replica is not None:
            replica.link.send(data)

    def submit(self, replica_id: str, submission: Submission) -> bool:
        """Hand a request over ahead of its Serve call; whether it was sent. One that does not fit in a frame is not."""
        replica = self._replicas.get(replica_id)
        if replica is None or not replica.up or not _takes_submissions(replica.info):
            return False
        try:
            data = encode_submit(submission)
        except FrameError:
            return False
        replica.link.send(data)
        return True

    def close(self) -> None:
        """Hang up everywhere."""
        for replica in list(self._replicas.values()):
            replica.link.close()
            self._drop(replica)

    def adopt(self, infos: tuple[ReplicaInfo, ...]) -> None:
        """Serve's list: dial the new ones; those no longer on it are being stopped, or are dead."""
        for info in infos:
            endpoint = _endpoint(info)
            if info.replica_id not in self._replicas and endpoint is not None:
                link = self._connector.connect(endpoint, self._client_id, self._secret, self)
                replica = _Replica(info.replica_id, info, link, BlockFollower(info.replica_id, self._balancer))
                self._replicas[info.replica_id] = self._by_link[link] = replica
        listed = {info.replica_id for info in infos}
        for replica in list(self._replicas.values()):
            if replica.replica_id not in listed and replica.listed:
                self._unlisted(replica)
        self._listener.changed()

    def link_frame(self, link: Link, frame: Frame) -> None:
        """A frame of a replica. Raises FrameError."""
        replica = self._by_link.get(link)
        if replica is None:
            return
        if frame.kind == Kind.STEP:
            self._listener.stepped(decode_step(frame))
        elif frame.kind == Kind.LOAD:
            load = decode_load(frame)
            if replica.up:
                self._balancer.report(replica.replica_id, load)
                return
            replica.up = True
            metadata = replica.info.metadata
            seats = metadata.get("max_num_seqs")
            seats = seats if isinstance(seats, int) else 0
            self._balancer.add_replica(replica.replica_id, int(metadata["block_size"]), load, seats)
            if replica.draining:
                self._balancer.set_draining(replica.replica_id)
            link.send(encode_sync(replica.follower.connected()))
            self._move_waiting()
            self._listener.changed()
        elif frame.kind == Kind.BLOCKS:
            self._ask_again(replica, replica.follower.changed(decode_blocks(frame)))
        elif frame.kind == Kind.SNAPSHOT:
            self._ask_again(replica, replica.follower.replaced(decode_snapshot(frame)))
        elif frame.kind == Kind.REFUSED:
            self._listener.refused(decode_refused(frame))
        elif frame.kind == Kind.COUNTERS:
            replica.counters = decode_counters(frame)
            self._balancer.heard(replica.replica_id)
        elif frame.kind == Kind.DRAINING:
            draining = decode_draining(frame)
            self._drain(replica, draining.deadline_s, draining.reason)
        else:
            self._balancer.heard(replica.replica_id)

    def _ask_again(self, replica: _Replica, ask_from: int | None) -> None:
        if ask_from is not None:
            replica.link.send(encode_sync(ask_from))

    def link_down(self, link: Link, cause: Exception | None) -> None:
        """The line to a replica is lost, and with it every token on its way."""
        replica = self._by_link.get(link)
        if replica is None:
            return
        replica.up = False
        if not replica.listed:
            self._drop(replica)
        reason = f"the line to replica {replica.replica_id} was lost" + (f" ({cause})" if cause else "")
        self._listener.lost(self._balancer.remove_replica(replica.replica_id), reason)
        self._listener.changed()

    def _unlisted(self, replica: _Replica) -> None:
        replica.listed = False
        replica.link.stop_redialing()
        if not replica.up:
            replica.link.close()
            self._drop(replica)
            return
        # A dead replica's line breaks by itself; a stopping one has until Serve's timeout.
        timeout_s = float(replica.info.metadata.get("graceful_shutdown_timeout_s", 0.0))
        self._drain(replica, timeout_s - min(DRAIN_MARGIN_S, timeout_s / 2), "Serve stops it")

    def _drain(self, replica: _Replica, deadline_s: float, reason: str) -> None:
        """Use a replica no more: what waits there moves once another can take it, what runs at the deadline."""
        if not replica.draining:
            logger.info("Model %s: replica %s drains: %s", self._name, replica.replica_id, reason)
        replica.draining = reason
        self._balancer.set_draining(replica.replica_id)
        if deadline_s <= 0:
            self._leave(replica)
        else:
            self._move_waiting()
            asyncio.get_running_loop().call_later(deadline_s, self._leave, replica)
        self._listener.changed()

    def _move_waiting(self) -> None:
        if self._balancer.num_available:
            for replica in list(self._replicas.values()):
                if replica.draining:
                    booked = self._balancer.bookings_at(replica.replica_id)
                    self._listener.leaving(booked, replica.draining, only_waiting=True)

    def _leave(self, replica: _Replica) -> None:
        booked = self._balancer.bookings_at(replica.replica_id)
        self._listener.leaving(booked, replica.draining, only_waiting=False)

    def _drop(self, replica: _Replica) -> None:
        del self._replicas[replica.replica_id]
        del self._by_link[replica.link]


def default_connector() -> Connector:
    """Sockets, and the secret that Ray's control store keeps."""
    from app.transport.cluster_secret import cluster_secret

    return Connector(cluster_secret, ReplicaLink)


def _takes_submissions(info: ReplicaInfo) -> bool:
    protocol = info.metadata.get("protocol")
    return isinstance(protocol, (list, tuple)) and len(protocol) == 2 and protocol[1] >= SUBMIT_VERSION


def _endpoint(info: ReplicaInfo) -> Endpoint | None:
    """Where a replica listens, or None if its metadata does not say: it is none of ours."""
    metadata = info.metadata
    host, port, epoch = metadata.get("host"), metadata.get("port"), metadata.get("epoch")
    if isinstance(host, str) and isinstance(port, int) and isinstance(epoch, str) and "block_size" in metadata:
        return Endpoint(host, port, epoch)
    return None
