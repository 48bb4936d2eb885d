"""The boto3 client of an S3 service: endpoint, credentials, retries."""

# pyright: reportMissingTypeStubs=false
from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from boto3.s3.transfer import TransferConfig
from boto3.session import Session
from botocore.config import Config
from botocore.exceptions import BotoCoreError
from botocore.loaders import Loader
from botocore.session import Session as CoreSession

from pretrain_api.spec.job import S3Storage
from pretrain_store.errors import StoreRefused
from pretrain_store.port import RetryLimits

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

_THREADS = 8


def make_client(storage: S3Storage, environ: Mapping[str, str], limits: RetryLimits) -> S3Client:
    """Make a client with the credentials of `environ` or of boto3's chain; sends nothing. Raises StoreRefused."""
    endpoint = storage.endpoint or environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL") or None
    config = Config(
        retries={"mode": "standard", "total_max_attempts": limits.attempts},
        connect_timeout=limits.connect_seconds,
        read_timeout=limits.read_seconds,
        max_pool_connections=2 * _THREADS,
        # Servers other than AWS are seldom reached by a host name for each bucket.
        s3={"addressing_style": "path" if endpoint else "auto"},
        # Without TLS each request is signed with the sha256 of its body: a CRC32 beside that is work and finds no more.
        request_checksum_calculation="when_required" if (endpoint or "").startswith("http://") else "when_supported",
    )
    access, secret = environ.get("AWS_ACCESS_KEY_ID"), environ.get("AWS_SECRET_ACCESS_KEY")
    if bool(access) != bool(secret):
        raise StoreRefused(
            "S3 needs both AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and only one is set: set the other"
        )
    try:
        core: Any = CoreSession()
        core.register_component("data_loader", _service_models())
        session: Any = Session(
            botocore_session=core,
            aws_access_key_id=access or None,
            aws_secret_access_key=secret or None,
            aws_session_token=environ.get("AWS_SESSION_TOKEN") or None,
            region_name=storage.region,
        )
        return cast("S3Client", session.client("s3", endpoint_url=endpoint, config=config))
    except (BotoCoreError, ValueError) as error:
        raise StoreRefused(f"S3 cannot be used: {error}") from error


def transfer_config(part: int) -> TransferConfig:
    """Return the settings of transfers in parts of this many bytes."""
    return TransferConfig(
        multipart_threshold=part,
        multipart_chunksize=part,
        max_concurrency=_THREADS,
        preferred_transfer_client="classic",  # the CRT client fails on endpoints other than AWS
    )


@functools.cache
def _service_models() -> Any:
    """Return botocore's loader of service models, shared: each session of its own would read them again."""
    return Loader()
