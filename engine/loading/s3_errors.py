"""What S3's failures mean: which are worth another attempt, and what to do about the others."""

from __future__ import annotations

import errno
from http import HTTPStatus

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    NoRegionError,
    PartialCredentialsError,
)
from botocore.exceptions import ConnectionError as BotoConnectionError

from engine.errors import ModelLoadError

_REFUSED = {
    "AccessDenied",
    "AuthFailure",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "SignatureDoesNotMatch",
    "403",
}
_BUSY = {"RequestTimeout", "RequestTimeoutException", "SlowDown", "Throttling", "ThrottlingException"}


def is_transient(error: Exception) -> bool:
    """A broken connection or a busy server: another attempt may succeed."""
    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return (
            status >= HTTPStatus.INTERNAL_SERVER_ERROR
            or status == HTTPStatus.TOO_MANY_REQUESTS
            or _code(error) in _BUSY
        )
    return isinstance(error, BotoConnectionError | HTTPClientError | IncompleteReadError)


def explain(error: Exception, url: str, endpoint: str, attempts: int = 1) -> ModelLoadError:
    """The error to raise: names the object, what happened and what to do.

    Args:
        url: "s3://bucket/key".
        endpoint: where it was asked for.
        attempts: how often it was tried.
    """
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return ModelLoadError(
            f"{url}: no credentials were found ({error}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or "
            f"AWS_PROFILE, or give the machine or its service account a role"
        )
    if isinstance(error, NoRegionError):
        return ModelLoadError(f"{url}: no region is set; set AWS_REGION")
    if isinstance(error, ClientError):
        return ModelLoadError(f"{url}: {_meaning(error, endpoint, attempts)}")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ModelLoadError(
            f"{url}: {error.strerror}: what it fills of the disk cannot be written; free some space, or name another "
            f"place by XDG_CACHE_HOME; what has come is kept, and the next start goes on from there"
        )
    if is_transient(error):
        return ModelLoadError(
            f"{url}: the connection to {endpoint} failed {attempts} times ({error}); check the network and "
            f"AWS_ENDPOINT_URL; what has come is kept, and the next start goes on from there"
        )
    if isinstance(error, BotoCoreError | OSError):
        return ModelLoadError(f"{url}: {error}")
    raise error


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _meaning(error: ClientError, endpoint: str, attempts: int) -> str:
    code = _code(error)
    if code in _REFUSED:
        return (
            f"{endpoint} refuses these credentials ({code}); check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and "
            f"AWS_SESSION_TOKEN or the role, which must be allowed s3:ListBucket and s3:GetObject"
        )
    if code == "NoSuchBucket":
        return f"no such bucket at {endpoint}; check its name and AWS_ENDPOINT_URL"
    if code in ("NoSuchKey", "404"):
        return f"no such object at {endpoint}; it was removed, or its name is wrong"
    if code in ("PreconditionFailed", "412", "InvalidRange", "416"):
        return "the object has changed while it was read; start again"
    if code in ("PermanentRedirect", "301", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"):
        return f"the bucket is in another region ({code}); set AWS_REGION to the bucket's"
    if is_transient(error):
        return f"{endpoint} could not answer in {attempts} attempts ({code}); try again later"
    return f"{endpoint} answers {code}: {error.response.get('Error', {}).get('Message', '')}"
