"""Imported by the process from which ranks are forked when checkpoints are in S3: boto3, and what it reads at first."""

from pretrain_store import s3

s3.preload()
