"""Where the ledger of usage is kept."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, field_validator

from app.config.args import Args
from app.usage.settings import UsageSettings, split_url
from engine.errors import ConfigError


class UsageArgs(Args):
    """Usage by tenant, model and adapter, kept in files by each ingress replica; see app.usage.

    Attributes:
        directory: on each node that runs an ingress, or one that they share; its own for each application.
        roll_mb, roll_s: a segment that has grown so large or so old is closed, and added to the days' totals.
        fsync_s: a record is on the disk after so long; a power failure loses what is not.
        progress_s: how often the tokens of requests that still run are noted.
        keep_days: how long segments are kept once they are in the totals, which stay; null keeps them all.
        copy_to: `s3://BUCKET[/PREFIX]`: closed segments are copied there.
    """

    directory: str
    roll_mb: float = Field(default=16.0, gt=0, le=1024)
    roll_s: float = Field(default=3600.0, ge=1, le=86400)
    fsync_s: float = Field(default=1.0, ge=0.05, le=60)
    progress_s: float = Field(default=10.0, ge=0.05, le=3600)
    keep_days: float | None = Field(default=None, ge=0)
    copy_to: str | None = None

    @field_validator("directory")
    @classmethod
    def _check_directory(cls, value: str) -> str:
        if not Path(value).is_absolute():
            raise ValueError(f"{value!r} must be an absolute path: ingresses run in folders of Ray's")
        return value

    @field_validator("copy_to")
    @classmethod
    def _check_copy_to(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                split_url(value)
            except ConfigError as error:
                raise ValueError(str(error)) from None
        return value

    @property
    def settings(self) -> UsageSettings:
        """As the ledger takes them."""
        return UsageSettings(
            Path(self.directory),
            roll_bytes=int(self.roll_mb * (1 << 20)),
            roll_s=self.roll_s,
            sync_s=self.fsync_s,
            progress_s=self.progress_s,
            keep_days=self.keep_days,
            copy_to=self.copy_to,
        )
