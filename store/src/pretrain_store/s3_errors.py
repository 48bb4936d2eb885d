"""Translation of boto3's errors to this package's errors."""

# pyright: reportMissingTypeStubs=false
from __future__ import annotations

from typing import Any, cast

from boto3.exceptions import Boto3Error
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, IncompleteReadError, NoCredentialsError
from botocore.exceptions import ConnectionError as NoConnection

from pretrain_store.errors import (
    ConditionalPutUnsupported,
    CredentialsRejected,
    NoSuchBucket,
    ObjectExists,
    ObjectNotFound,
    StoreError,
    StoreRefused,
    StoreUnavailable,
)

S3_ERRORS = (ClientError, BotoCoreError, Boto3Error)
_MISSING = frozenset({"NoSuchKey", "NoSuchUpload", "404", "NotFound"})
_REFUSED_STATUS = frozenset({301, 307, 400, 401, 403, 404, 405})
_DENIED_STATUS = frozenset({401, 403})
_DENIED = frozenset({"ExpiredToken", "InvalidToken", "AuthorizationHeaderMalformed"})
"""Codes of status 400 that concern credentials."""
_TRANSIENT = frozenset(
    {"BadDigest", "IncompleteBody", "RequestTimeout", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"}
)
"""Codes of status 400 for requests damaged in transit."""


class PutConflict(StoreError):
    """409: another conditional put of the key is not decided yet."""


def translate(error: Exception, key: str, where: str) -> StoreError:
    """Return this package's error for one of S3_ERRORS, met at `key` of the store `where`."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ClientError):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        if isinstance(error, NoCredentialsError):
            return CredentialsRejected(f"{where}: {error}")
        transient = isinstance(error, (HTTPClientError, NoConnection, IncompleteReadError, Boto3Error))
        return (StoreUnavailable if transient else StoreRefused)(f"{where}: {error}")
    response = cast("dict[str, Any]", cause.response)
    code = str(response.get("Error", {}).get("Code", ""))
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return _of_response(code, status, error, key, where)


def _of_response(code: str, status: int, error: Exception, key: str, where: str) -> StoreError:
    if code in _MISSING:
        return ObjectNotFound(key)
    if code == "PreconditionFailed" or status == 412:
        return ObjectExists(key)
    if code == "ConditionalRequestConflict":
        return PutConflict(key)
    if code == "NotImplemented" or status == 501:
        return ConditionalPutUnsupported(f"{where} does not support the request ({error}): choose another store")
    if code == "NoSuchBucket":
        return NoSuchBucket(f"{where}: {error}")
    if status in _DENIED_STATUS or code in _DENIED:
        return CredentialsRejected(f"{where}: {error}")
    if status in _REFUSED_STATUS and code not in _TRANSIENT:
        return StoreRefused(f"{where}: {error}")
    return StoreUnavailable(f"{where}: {error}")
