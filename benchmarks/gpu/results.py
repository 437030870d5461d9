"""What a visit measures: rows of a table, each against a ceiling of the same run or a peer, and the JSON object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Rates(NamedTuple):
    """What the device reaches at most, measured in the same run.

    Attributes:
        copy_bytes_per_s: of a copy within the device, bytes read and written.
        flops_per_s: of a bfloat16 matrix product of random numbers.
        to_host_bytes_per_s, to_device_bytes_per_s: of copies of pinned memory; 0 where not measured.
    """

    copy_bytes_per_s: float
    flops_per_s: float
    to_host_bytes_per_s: float = 0.0
    to_device_bytes_per_s: float = 0.0


class Timing(NamedTuple):
    """One operation: how long it takes, and what it moves or computes in that time.

    Attributes:
        by: "quire", or the peer whose time this is.
        num_bytes, flops: what the operation has to move and compute; the larger share of its ceiling counts.
        ceiling: "memory", "to_host" or "to_device", which of the copies `num_bytes` is held to.
    """

    name: str
    by: str
    seconds: float
    num_bytes: float = 0.0
    flops: float = 0.0
    ceiling: str = "memory"

    def share(self, rates: Rates) -> float:
        """Of the measured ceiling, what was reached."""
        bandwidth = {
            "memory": rates.copy_bytes_per_s,
            "to_host": rates.to_host_bytes_per_s,
            "to_device": rates.to_device_bytes_per_s,
        }[self.ceiling]
        least = max(self.num_bytes / bandwidth if bandwidth else 0.0, self.flops / rates.flops_per_s)
        return least / self.seconds


class Missing(NamedTuple):
    """A peer or an operation without a time, and why."""

    name: str
    by: str
    reason: str

    def line(self) -> str:
        return f"{self.name:44} {self.by:22} {self.reason}"


TABLE_HEADER = f"{'operation':44} {'by':22} {'us':>10} {'GB/s':>8} {'TFLOP/s':>8} {'ceiling':>8}"


def timing_line(item: Timing | Missing, rates: Rates) -> str:
    """A row of the table: what was reached, and of the operation's ceiling what share."""
    if isinstance(item, Missing):
        return item.line()
    rate = f"{item.num_bytes / item.seconds / 1e9:8.0f} {item.flops / item.seconds / 1e12:8.1f}"
    return f"{item.name:44} {item.by:22} {item.seconds * 1e6:10.1f} {rate} {item.share(rates):8.1%}"


def timings_json(items: Sequence[Timing | Missing], rates: Rates) -> dict[str, object]:
    return {
        "timings": [
            {
                "name": item.name,
                "by": item.by,
                "us": round(item.seconds * 1e6, 3),
                "share_of_ceiling": round(item.share(rates), 4),
            }
            for item in items
            if isinstance(item, Timing)
        ],
        "missing": [item._asdict() for item in items if isinstance(item, Missing)],
    }
