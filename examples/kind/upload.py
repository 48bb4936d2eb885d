"""Copy a folder to S3: `python examples/kind/upload.py FOLDER s3://BUCKET/PREFIX`. Existing objects are kept.

The bucket is created if it does not exist. Service and credentials come from the environment, as for any AWS tool.
"""

from __future__ import annotations

import sys
from pathlib import Path
from urllib.parse import urlsplit

import boto3
from botocore.exceptions import ClientError


def upload(folder: Path, bucket: str, prefix: str) -> int:
    """Put every file whose key is missing or has another size; return their number."""
    s3 = boto3.client("s3")
    try:
        s3.head_bucket(Bucket=bucket)
    except ClientError as error:
        if error.response["Error"]["Code"] not in ("404", "NoSuchBucket"):
            raise
        s3.create_bucket(Bucket=bucket)
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/")
    there = {item["Key"]: item["Size"] for page in pages for item in page.get("Contents", ())}
    missing = [
        (path, key)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and there.get(key := f"{prefix}/{path.relative_to(folder).as_posix()}") != path.stat().st_size
    ]
    for path, key in missing:
        s3.upload_file(str(path), bucket, key)
    return len(missing)


if __name__ == "__main__":
    if len(sys.argv) != 3 or not sys.argv[2].startswith("s3://"):
        sys.exit("usage: upload.py FOLDER s3://BUCKET/PREFIX")
    target = urlsplit(sys.argv[2])
    count = upload(Path(sys.argv[1]), target.netloc, target.path.strip("/"))
    print(f"{sys.argv[2]}: {count} files put")
