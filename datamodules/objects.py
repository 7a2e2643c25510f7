"""Files below an address: a folder, or a prefix in an S3 bucket.

S3 is meant as a protocol: Amazon, MinIO, Ceph, Cloudflare R2 and Google Cloud Storage all speak it. Credentials,
region and endpoint come from where every AWS tool takes them: ``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``,
``AWS_REGION``, ``AWS_ENDPOINT_URL``, ``AWS_PROFILE``, ``~/.aws``, the machine's role.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from datamodules.errors import DataError

_S3 = "s3://"


def is_remote(address: str) -> bool:
    """Whether an address is in S3 (otherwise it is a folder).

    Raises:
        DataError: it is of another kind.

    Example:
        >>> is_remote("s3://bucket/images"), is_remote("data/images")
        (True, False)
    """
    scheme, found, rest = address.partition("://")
    if not found:
        return False
    bucket, _, prefix = rest.partition("/")
    if f"{scheme}://" != _S3 or not bucket or not prefix.strip("/"):
        raise DataError(
            f"data.root: expected a folder or s3://bucket/folder, found '{address}'; other object stores answer to "
            "s3:// when AWS_ENDPOINT_URL names them."
        )
    return True


def download(address: str, name: str, file: BinaryIO) -> None:
    """Write a remote file into an open one.

    Raises:
        OSError: it cannot be had (FileNotFoundError: it is not there).
    """
    bucket, key = _bucket_and_key(address, name)
    client = _client(os.getpid())
    with _as_os_error(f"{address}/{name}"):
        client.download_fileobj(bucket, key, file)


def upload(file: Path, address: str) -> None:
    """Put a local file at a remote address, under its own name.

    Raises:
        OSError: it cannot be put there.
    """
    bucket, key = _bucket_and_key(address, file.name)
    client = _client(os.getpid())
    with _as_os_error(f"{address}/{file.name}"):
        client.upload_file(str(file), bucket, key)


def is_empty(address: str) -> bool:
    """Whether there is nothing below a remote address.

    Raises:
        OSError: it cannot be looked at.
    """
    bucket, prefix = _bucket_and_key(address, "")
    client = _client(os.getpid())
    with _as_os_error(address):
        return bool(client.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1)["KeyCount"] == 0)


def _bucket_and_key(address: str, name: str) -> tuple[str, str]:
    bucket, _, prefix = address.removeprefix(_S3).partition("/")
    return bucket, f"{prefix.strip('/')}/{name}"


@lru_cache(maxsize=1)
def _client(process: int) -> Any:
    """The connection of a process; a forked one must not use its parent's."""
    try:
        from boto3 import Session
        from botocore.config import Config
    except ImportError as error:
        raise streaming_missing("boto3") from error
    return Session().client("s3", config=Config(connect_timeout=10))


def streaming_missing(package: str) -> DataError:
    """What to say where the packages of streaming are not installed."""
    return DataError(
        f'data: expected the installed package {package}, found none; pip install "transfer-pipeline[streaming]".'
    )


@contextmanager
def _as_os_error(place: str) -> Iterator[None]:
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        kind = FileNotFoundError if error.response["Error"]["Code"] in ("404", "NoSuchKey") else OSError
        raise kind(f"{place}: {error}") from error
    except (Boto3Error, BotoCoreError) as error:
        raise OSError(f"{place}: {error}") from error
