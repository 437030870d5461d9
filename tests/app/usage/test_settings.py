from __future__ import annotations

import pytest

from app.usage.settings import split_url
from engine.errors import ConfigError


def test_a_buckets_url() -> None:
    assert split_url("s3://books") == ("books", "")
    assert split_url("s3://books/usage/eu/") == ("books", "usage/eu")


@pytest.mark.parametrize("url", ["", "books", "gs://books", "s3://", "s3:///usage"])
def test_what_is_none(url: str) -> None:
    with pytest.raises(ConfigError, match="must be s3://BUCKET"):
        split_url(url)
