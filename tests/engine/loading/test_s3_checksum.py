"""S3's checksums, against values that Amazon's own library and hashlib give."""

from __future__ import annotations

import base64
import hashlib
import zlib
from pathlib import Path

import pytest

from engine.loading.s3_checksum import Checksum, checksum_of

CONTENT = bytes(range(256)) * 5000


def b64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "object"
    path.write_bytes(CONTENT)
    return path


def test_digests_that_others_know(tmp_path: Path) -> None:
    """The check values of "123456789" in the catalogue of CRCs (reveng)."""
    path = tmp_path / "digits"
    path.write_bytes(b"123456789")
    for algorithm, value in {"CRC32": "cbf43926", "CRC32C": "e3069283", "CRC64NVME": "ae8b14860a799888"}.items():
        assert Checksum(algorithm, bytes.fromhex(value), 0, True).matches(path)
        assert not Checksum(algorithm, bytes.fromhex(value)[::-1], 0, True).matches(path)


def test_a_checksum_of_the_whole(file: Path) -> None:
    found = checksum_of({"ChecksumSHA256": b64(hashlib.sha256(CONTENT).digest()), "ChecksumType": "FULL_OBJECT"})
    assert found is not None
    assert (found.algorithm, found.num_parts, found.of_whole) == ("SHA256", 0, True)
    assert found.matches(file)
    file.write_bytes(CONTENT[:-1])
    assert not found.matches(file)


def test_a_checksum_of_parts(file: Path) -> None:
    parts = [CONTENT[:1_000_000], CONTENT[1_000_000:]]
    digests = b"".join(zlib.crc32(part).to_bytes(4, "big") for part in parts)
    value = b64(zlib.crc32(digests).to_bytes(4, "big"))
    sizes = [len(part) for part in parts]
    for head in ({"ChecksumCRC32": f"{value}-2"}, {"ChecksumCRC32": value, "ETag": '"00-2"'}):
        found = checksum_of(head)
        assert found is not None
        assert (found.num_parts, found.of_whole) == (2, "ETag" in head), "without a suffix it may be either"
        assert found.matches(file, sizes)
        assert not found.matches(file, sizes[::-1])
        assert not found.matches(file, [*sizes, 1]), "more than is there"


def test_the_cheapest_is_taken() -> None:
    head = {"ChecksumSHA256": b64(bytes(32)), "ChecksumCRC64NVME": b64(bytes(8)), "ETag": '"' + "0" * 32 + '"'}
    found = checksum_of(head)
    assert found is not None
    assert found.algorithm == "CRC64NVME"


def test_an_etag_is_an_md5_only_sometimes(file: Path) -> None:
    etag = f'"{hashlib.md5(CONTENT).hexdigest()}"'
    found = checksum_of({"ETag": etag, "ServerSideEncryption": "AES256"})
    assert found is not None
    assert found.matches(file)
    assert checksum_of({"ETag": etag, "ServerSideEncryption": "aws:kms"}) is None
    assert checksum_of({"ETag": etag, "SSECustomerAlgorithm": "AES256"}) is None
    assert checksum_of({"ETag": '"0x8DB5C2F3A1B2C3D"'}) is None
    assert checksum_of({}) is None
