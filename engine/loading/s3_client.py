"""A bucket: listing, heads, byte ranges and whole objects written, each tried again while the failure may pass."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, IncompleteReadError

from engine.errors import ConfigError, ModelLoadError
from engine.loading.s3_errors import explain, is_transient

CONNECTIONS = 16

_DEFAULT_ATTEMPTS = 6
_FIRST_DELAY_S = 0.2
_CHUNK_BYTES = 1 << 18
_T = TypeVar("_T")


class S3Object(NamedTuple):
    """One version of an object.

    Attributes:
        key: within its bucket.
        size: bytes.
        etag: with its quotes, as S3 compares it.
    """

    key: str
    size: int
    etag: str


class Bucket:
    """One bucket. Where it is and who asks comes from AWS' standard environment variables and files.

    AWS_ENDPOINT_URL (or AWS_ENDPOINT_URL_S3) names another service that speaks S3; AWS_MAX_ATTEMPTS how often a request
    is tried without any byte coming, 6 by default, with twice the wait after each.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._attempts = _attempts()
        config = Config(
            max_pool_connections=CONNECTIONS,
            retries={"total_max_attempts": 1},  # tried again here, where a body that breaks off goes on from its byte
            connect_timeout=5,
            read_timeout=30,
            # Ranges are asked for, and S3's checksums are of whole objects: see s3_checksum.py.
            response_checksum_validation="when_required",
        )
        try:
            # A session of its own: the default one keeps the credentials that it found first.
            self._client: Any = boto3.session.Session().client("s3", config=config)
        except (BotoCoreError, ValueError) as error:
            raise ModelLoadError(f"s3://{name}: {error}; check AWS_PROFILE, AWS_REGION and AWS_ENDPOINT_URL") from error
        self.endpoint = str(self._client.meta.endpoint_url)

    def url(self, key: str) -> str:
        return f"s3://{self.name}/{key}"

    def list(self, prefix: str, delimiter: str) -> list[S3Object]:
        """Objects whose keys begin with `prefix`, without those behind a further `delimiter`."""
        found: list[S3Object] = []
        token: dict[str, str] = {}
        while True:
            arguments = {"Bucket": self.name, "Prefix": prefix, "Delimiter": delimiter, **token}
            page = self._try(prefix, lambda given=arguments: self._client.list_objects_v2(**given))  # type: ignore[misc]
            found += [S3Object(each["Key"], each["Size"], each["ETag"]) for each in page.get("Contents", [])]
            if not page.get("IsTruncated"):
                return found
            token = {"ContinuationToken": page["NextContinuationToken"]}

    def head(self, item: S3Object, part: int | None = None) -> Mapping[str, Any]:
        """What S3 knows of an object, or of one part of its upload, checksums included."""
        arguments: dict[str, Any] = {"Bucket": self.name, "Key": item.key}
        if part is not None:
            arguments["PartNumber"] = part
        else:
            arguments.update(IfMatch=item.etag, ChecksumMode="ENABLED")
        answer: Mapping[str, Any] = self._try(item.key, lambda: self._client.head_object(**arguments))
        return answer

    def read(self, item: S3Object, part: range, take: Callable[[int, bytes], None]) -> None:
        """Read a range of an object's bytes. A connection that breaks is replaced from the byte where it broke.

        Args:
            take: called with each piece's offset in the object and its bytes, in order.

        Raises:
            ModelLoadError: the object has changed, or no more bytes come.
        """
        position, failures = part.start, 0
        while position < part.stop:
            before = position
            try:
                for chunk in self._stream(item, range(position, part.stop)):
                    take(position, chunk)
                    position += len(chunk)
            except (BotoCoreError, ClientError, OSError) as error:
                failures = 0 if position > before else failures + 1
                if not is_transient(error) or failures >= self._attempts:
                    raise explain(error, self.url(item.key), self.endpoint, failures) from error
                _wait(failures)

    def put(self, key: str, data: bytes) -> None:
        """Write an object whole, in place of what was there; S3 compares what comes with its checksum (CRC32)."""
        self._try(key, lambda: self._client.put_object(Bucket=self.name, Key=key, Body=data))

    def _stream(self, item: S3Object, part: range) -> Iterator[bytes]:
        answer = self._client.get_object(
            Bucket=self.name, Key=item.key, Range=f"bytes={part.start}-{part.stop - 1}", IfMatch=item.etag
        )
        expected = f"bytes {part.start}-{part.stop - 1}/{item.size}"
        if answer.get("ContentRange") != expected:
            raise ModelLoadError(
                f"{self.url(item.key)}: asked for {expected!r}, {self.endpoint} gives "
                f"{answer.get('ContentRange')!r}: the object is not what the listing said; start again"
            )
        came = 0
        for chunk in answer["Body"].iter_chunks(_CHUNK_BYTES):
            yield chunk
            came += len(chunk)
        if came < len(part):
            raise IncompleteReadError(actual_bytes=came, expected_bytes=len(part))

    def _try(self, key: str, request: Callable[[], _T]) -> _T:
        for failures in range(1, self._attempts + 1):
            try:
                return request()
            except (BotoCoreError, ClientError, OSError) as error:
                if not is_transient(error) or failures == self._attempts:
                    raise explain(error, self.url(key), self.endpoint, failures) from error
                _wait(failures)
        raise AssertionError("the last attempt returns or raises")


def _attempts() -> int:
    text = os.environ.get("AWS_MAX_ATTEMPTS", str(_DEFAULT_ATTEMPTS))
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"AWS_MAX_ATTEMPTS={text!r} must be a number of 1 or more")
    return int(text)


def _wait(failures: int) -> None:
    """Exponential backoff, with jitter so that replicas do not come back together."""
    time.sleep(_FIRST_DELAY_S * 2 ** max(0, failures - 1) * random.uniform(0.5, 1.0))
