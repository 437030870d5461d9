"""What S3 knows of an object's content: checksums of the whole, or of its upload's parts, and MD5s in ETags.

Forms, by Amazon's "Checking object integrity": a full-object checksum is the base64 of the digest; a composite one is
the digest of the parts' digests, with "-N" for N parts. An ETag is the MD5 of an object that was put at once, or of the
MD5s of N parts with "-N", unless it is encrypted with a key of KMS or of the customer.
"""

from __future__ import annotations

import base64
import hashlib
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

_READ_BYTES = 1 << 20
_ALGORITHMS = ("CRC64NVME", "CRC32C", "CRC32", "SHA1", "SHA256")  # the cheapest first


class Checksum(NamedTuple):
    """What an object should hold.

    Attributes:
        algorithm: "CRC64NVME", "CRC32C", "CRC32", "SHA1", "SHA256" or "MD5".
        digest: of the content, or of the digests of its parts.
        num_parts: of the upload whose parts' digests it may be made of; 0 if it cannot be.
        of_whole: it may be that of the whole content. Some services do not say which of the two it is.
    """

    algorithm: str
    digest: bytes
    num_parts: int
    of_whole: bool

    def matches(self, path: Path, part_bytes: list[int] | None = None) -> bool:
        """Whether a file holds that content; it is read once.

        Args:
            part_bytes: sizes of the upload's parts in order; None is the whole.
        """
        digests = []
        whole = part_bytes is None
        if part_bytes is None:
            part_bytes = [path.stat().st_size]
        with path.open("rb", buffering=0) as file:
            for num_bytes in part_bytes:
                update, finish = _running(self.algorithm)
                left = num_bytes
                while left:
                    chunk = file.read(min(left, _READ_BYTES))
                    if not chunk:
                        return False
                    update(chunk)
                    left -= len(chunk)
                digests.append(finish())
        if whole:
            return digests == [self.digest]
        update, finish = _running(self.algorithm)
        update(b"".join(digests))
        return finish() == self.digest


def checksum_of(head: Mapping[str, Any]) -> Checksum | None:
    """The best checksum in an answer to HeadObject, or None where S3 has none of the content.

    Args:
        head: asked for with ChecksumMode=ENABLED.
    """
    for algorithm in _ALGORITHMS:
        value = head.get(f"Checksum{algorithm}")
        if isinstance(value, str) and value:
            text, _, parts = value.partition("-")
            kind = head.get("ChecksumType", "COMPOSITE" if parts else "")
            num_parts = int(parts or str(head.get("ETag", "")).strip('"').partition("-")[2] or 0)
            may_be_parts = num_parts if kind != "FULL_OBJECT" else 0
            return Checksum(algorithm, base64.b64decode(text), may_be_parts, kind != "COMPOSITE")
    encrypted = head.get("ServerSideEncryption", "AES256") != "AES256" or head.get("SSECustomerAlgorithm")
    text, _, parts = str(head.get("ETag", "")).strip('"').partition("-")
    if encrypted or len(text) != 32 or set(text) - set("0123456789abcdef"):
        return None
    return Checksum("MD5", bytes.fromhex(text), int(parts or 0), not parts)


def _running(algorithm: str) -> tuple[Callable[[bytes], object], Callable[[], bytes]]:
    """Functions that take content in and that give the digest of what came."""
    if algorithm in ("MD5", "SHA1", "SHA256"):
        digest = hashlib.new(algorithm, usedforsecurity=False)
        return digest.update, digest.digest
    if algorithm == "CRC32":
        crc = _Crc(zlib.crc32, 4)
    else:
        from awscrt import checksums

        crc = _Crc(checksums.crc64nvme, 8) if algorithm == "CRC64NVME" else _Crc(checksums.crc32c, 4)
    return crc.update, crc.digest


class _Crc:
    def __init__(self, function: Callable[[bytes, int], int], width: int) -> None:
        self._function, self._width, self._value = function, width, 0

    def update(self, chunk: bytes) -> None:
        self._value = self._function(chunk, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(self._width, "big")
