"""Segments in a bucket: `PREFIX/segments/WRITER-000001.jsonl`, each put there whole once it is closed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from app.usage.segment import SUFFIX
from app.usage.settings import split_url
from engine.loading.s3_client import Bucket, S3Object


class SegmentStore:
    """A bucket's segments. Credentials, region and endpoint come from AWS' standard environment.

    Raises:
        ConfigError: the URL is none; ModelLoadError, also of its methods: S3 does not do what it is asked.
    """

    def __init__(self, url: str) -> None:
        bucket, prefix = split_url(url)
        self._bucket = Bucket(bucket)
        self._prefix = f"{prefix}/segments/" if prefix else "segments/"

    def put(self, path: Path) -> None:
        """Copy a closed segment; again, if it is there already."""
        self._bucket.put(self._prefix + path.name, path.read_bytes())

    def list(self) -> list[S3Object]:
        """All segments."""
        return [item for item in self._bucket.list(self._prefix, "/") if item.key.endswith(SUFFIX)]

    def lines(self, item: S3Object) -> Iterator[bytes]:
        """A segment's lines."""
        data = bytearray()
        if item.size:
            self._bucket.read(item, range(item.size), lambda _, piece: data.extend(piece))
        return iter(bytes(data).splitlines(keepends=True))
