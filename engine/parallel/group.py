"""Which rank of a model a worker is, and where it meets the others: plain data, to be sent to the worker's process."""

from __future__ import annotations

import re
from dataclasses import dataclass

from engine.config_checks import check_integer
from engine.errors import ConfigError

_ADDRESS = re.compile(r"(?P<host>.+):(?P<port>\d{1,5})")
_SEGMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}")


@dataclass(frozen=True)
class TensorParallelGroup:
    """One rank's place among the ranks that hold one model together. Rank 0 draws the tokens that count.

    The ranks meet as their workers are made: by `address` where torch computes, by `segment` where the native CPU
    engine does, which needs all of them on one node.

    Attributes:
        num_local_ranks: ranks on this rank's node, this one included: they share its cores and its memory.
        address: "host:port" of rank 0, which listens there; a free port.
        segment: a name for the group's shared memory that nothing else on the node uses. Rank 0 creates it; it is gone
            from the file system once all have attached, or whoever has gives up waiting.
        timeout_s: the longest that a rank waits for the others in one collective.
        join_timeout_s: the longest that it waits for them to be made.
    """

    rank: int = 0
    world_size: int = 1
    num_local_ranks: int = 1
    address: str = ""
    segment: str = ""
    timeout_s: float = 20.0
    join_timeout_s: float = 120.0

    def __post_init__(self) -> None:
        check_integer("world_size", self.world_size, 1, 1024)
        check_integer("rank", self.rank, 0, self.world_size - 1)
        check_integer("num_local_ranks", self.num_local_ranks, 1, self.world_size)
        for name in ("timeout_s", "join_timeout_s"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 < value < 1e6:
                raise ConfigError(f"{name}={value!r} must be above 0 and below 1e6 seconds")
        if self.world_size == 1:
            return
        match = _ADDRESS.fullmatch(self.address)
        if match is None or not 0 < int(match["port"]) < 1 << 16:
            raise ConfigError(f"address={self.address!r} must be host:port")
        if not _SEGMENT.fullmatch(self.segment):
            raise ConfigError(f"segment={self.segment!r} must be a name of letters, digits, '.', '_' and '-'")

    @property
    def is_parallel(self) -> bool:
        return self.world_size > 1

    @property
    def on_one_node(self) -> bool:
        return self.num_local_ranks == self.world_size

    @property
    def host(self) -> str:
        return self.address.rpartition(":")[0]

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])


ALONE = TensorParallelGroup()
