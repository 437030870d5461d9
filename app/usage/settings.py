"""How usage is kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.errors import ConfigError

SCHEME = "s3://"


def split_url(url: str) -> tuple[str, str]:
    """Bucket and prefix of `s3://BUCKET[/PREFIX]`; ConfigError says what is wrong with it."""
    bucket, _, prefix = url.removeprefix(SCHEME).partition("/")
    if not url.startswith(SCHEME) or not bucket:
        raise ConfigError(f"{url!r} must be s3://BUCKET or s3://BUCKET/PREFIX")
    return bucket, prefix.strip("/")


@dataclass(frozen=True)
class UsageSettings:
    """How usage is kept. Times are in seconds.

    Attributes:
        directory: of the ledger; several processes, also of several nodes, may share one.
        roll_bytes, roll_s: a segment that has grown so large or so old is closed, and another begun.
        sync_s: how long a record may be in the system's memory only, where a power failure loses it.
        progress_s: how often the tokens of requests that still run are noted.
        keep_days: how long segments are kept after they have been added to the days' totals; None keeps them all.
        copy_to: `s3://BUCKET[/PREFIX]`, where closed segments are copied; None copies none.
    """

    directory: Path
    roll_bytes: int = 16 << 20
    roll_s: float = 3600.0
    sync_s: float = 1.0
    progress_s: float = 10.0
    keep_days: float | None = None
    copy_to: str | None = None
